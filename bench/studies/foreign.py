"""Tiny GPTs with random weights, laid out as other people's repositories lay theirs out.

nanoGPT, build-nanogpt and minGPT are no packages, so modules of the same parameter names and operators stand here; the
others are made by transformers. Runs in this project's environment and in the one that `make matrix` sets up, so it
imports nothing of the project that is not of these files.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bench.studies.foreign_feeds import LONGEST, VOCAB_SIZE

SEED = 7
LAYERS, WIDTH, HEADS = 2, 48, 4
LAST, WHOLE = "last", "whole"  # which positions a model gives logits of


class Norm(nn.Module):
    """Layer normalisation whose bias may be left out."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class WrittenGelu(nn.Module):
    """GELU by tanh, written out in elementary operators."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class Attention(nn.Module):
    """Causal self-attention, by PyTorch's operator or written out with a mask that is a buffer."""

    def __init__(self, heads: int, *, bias: bool, written: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
        self.c_proj = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.n_head, self.written = heads, written
        if written:
            self.bias: torch.Tensor
            self.register_buffer("bias", torch.tril(torch.ones(LONGEST, LONGEST)).view(1, 1, LONGEST, LONGEST))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # [B, nh, T, hs]
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.written:
            scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            scores = scores.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            y = functional.softmax(scores, dim=-1) @ v
        else:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class Block(nn.Module):
    """A layer. `activation` stands between the products of the MLP, under the name that the repository gives it."""

    def __init__(self, attention: Attention, name: str, activation: nn.Module, *, bias: bool, own_norm: bool) -> None:
        super().__init__()
        norm = (lambda: Norm(WIDTH, bias)) if own_norm else (lambda: nn.LayerNorm(WIDTH))
        self.ln_1, self.ln_2 = norm(), norm()
        self.attn = attention
        linear = {"c_fc": nn.Linear(WIDTH, 4 * WIDTH, bias=bias), "c_proj": nn.Linear(4 * WIDTH, WIDTH, bias=bias)}
        self.mlp = nn.ModuleDict({"c_fc": linear["c_fc"], name: activation, "c_proj": linear["c_proj"]})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        y = self.ln_2(x)
        for layer in self.mlp.values():
            y = layer(y)
        return x + y


class Gpt(nn.Module):
    """A decoder with a table of positions.

    logits: WHOLE gives them for all positions, float32 [B, T, V]; LAST for the last alone, [B, 1, V], as nanoGPT does
    where it is given no targets.
    """

    transformer: Any
    lm_head: Any

    def __init__(self, blocks: list[Block], norm: nn.Module, *, tied: bool, logits: str) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB_SIZE, WIDTH),
                "wpe": nn.Embedding(LONGEST, WIDTH),
                "h": nn.ModuleList(blocks),
                "ln_f": norm,
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCAB_SIZE, bias=False)
        self.logits = logits
        if tied:
            self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        _, t = idx.size()
        positions = torch.arange(0, t, dtype=torch.long, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        return self.lm_head(x[:, [-1], :] if self.logits == LAST else x)


def nanogpt(*, heads: int = HEADS, bias: bool = False, logits: str = LAST) -> Gpt:
    """nanoGPT's: exact GELU, attention by PyTorch's operator, biases left out if wanted, the last position alone."""
    blocks = [
        Block(Attention(heads, bias=bias, written=False), "gelu", nn.GELU(), bias=bias, own_norm=True)
        for _ in range(LAYERS)
    ]
    return Gpt(blocks, Norm(WIDTH, bias), tied=True, logits=logits)


def build_nanogpt(*, heads: int = HEADS) -> Gpt:
    """build-nanogpt's: GELU by PyTorch's tanh, attention by PyTorch's operator."""
    blocks = [
        Block(Attention(heads, bias=True, written=False), "gelu", nn.GELU("tanh"), bias=True, own_norm=False)
        for _ in range(LAYERS)
    ]
    return Gpt(blocks, nn.LayerNorm(WIDTH), tied=True, logits=WHOLE)


def mingpt(*, heads: int = HEADS) -> Gpt:
    """minGPT's: GELU, attention and its mask written out, a head of its own."""
    blocks = [
        Block(Attention(heads, bias=True, written=True), "act", WrittenGelu(), bias=True, own_norm=False)
        for _ in range(LAYERS)
    ]
    return Gpt(blocks, nn.LayerNorm(WIDTH), tied=False, logits=WHOLE)


OWN_LAYOUTS = {
    "nanogpt": nanogpt,
    "nanogpt-biases": lambda: nanogpt(bias=True, logits=WHOLE),
    "nanogpt-one-head": lambda: nanogpt(heads=1, logits=WHOLE),
    "build-nanogpt": build_nanogpt,
    "mingpt": mingpt,
    "mingpt-one-head": lambda: mingpt(heads=1),
}
# Of transformers: the class of the model's settings, and what they say.
_GPT2 = {"n_positions": LONGEST, "n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH}
_WIDE = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 128}
_ROTARY = {**_WIDE, "max_position_embeddings": LONGEST}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", _GPT2),
    "opt": (
        "OPT",
        {
            "hidden_size": WIDTH,
            "word_embed_proj_dim": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "ffn_dim": 128,
            "max_position_embeddings": LONGEST,
        },
    ),
    "gpt-neo": (
        "GPTNeo",
        {
            "hidden_size": WIDTH,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "max_position_embeddings": LONGEST,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 5,
        },
    ),
    "gpt-j": ("GPTJ", {**_GPT2, "rotary_dim": 4}),
    "gpt-neox": ("GPTNeoX", {**_ROTARY, "rotary_pct": 0.5}),
    "bloom": ("Bloom", {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS}),
    "llama": ("Llama", {**_ROTARY, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2", {**_ROTARY, "num_key_value_heads": 2}),
}
MODELS = (*OWN_LAYOUTS, *TRANSFORMERS)


def make_model(name: str, attention: str = "sdpa", *, use_cache: bool = False) -> Any:
    """Make one of MODELS, with weights that are the same at each call, and large enough that all of them matter.

    attention: for transformers, `sdpa`, where the model has it, or `eager`. use_cache: whether those hand on keys and
    values.
    """
    torch.manual_seed(SEED)
    model: Any
    if name in OWN_LAYOUTS:
        model = OWN_LAYOUTS[name]()
    else:
        import transformers

        kind, settings = TRANSFORMERS[name]
        special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=VOCAB_SIZE, use_cache=use_cache, **settings, **special
        )
        classes = (f"{kind}ForCausalLM", f"{kind}LMHeadModel")
        made = next(getattr(transformers, each) for each in classes if hasattr(transformers, each))
        config._attn_implementation = attention if made._supports_sdpa else "eager"
        model = made(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.15 if parameter.dim() == 2 else 0.1) * torch.randn_like(parameter)
    return model.eval()
