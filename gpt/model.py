"""The reference GPT: a decoder-only transformer, pre-LN. Names as in nanoGPT."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.attention import CausalSelfAttention
from gpt.cache import KVCache
from gpt.cli import UserError
from gpt.config import GPTConfig

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "quick_gelu": lambda: QuickGELU(),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), another approximation of GELU (section 2 of https://arxiv.org/abs/1606.08415)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class LayerNorm(nn.Module):
    """LayerNorm (https://arxiv.org/abs/1607.06450) over the last dimension, with the config's epsilon and biases."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.epsilon = config.layer_norm_epsilon
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=self.epsilon)


class MLP(nn.Module):
    """Two linear layers with an activation between them, by default GELU (https://arxiv.org/abs/1606.08415).

    [B, T, C] to [B, T, C].
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_width, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]()
        self.c_proj = nn.Linear(config.mlp_width, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C]
        x = self.activation(self.c_fc(x))  # [B, T, mlp_width]
        return self.dropout(self.c_proj(x))  # [B, T, C]


class Block(nn.Module):
    """One layer: attention, then MLP, each added to what it normalised: [B, T, C] to [B, T, C]."""

    def __init__(self, config: GPTConfig, attention: str, layer: int = 0) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config, attention, layer)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:  # [B, T, C]
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))  # [B, T, C]


class Transformer(nn.ModuleDict):
    """All of a GPT but its head, by the names that GPT-2's state dict has."""

    wte: nn.Embedding
    wpe: nn.Embedding
    drop: nn.Dropout
    h: Iterable[Block]  # an nn.ModuleList, whose type does not tell of what
    ln_f: LayerNorm


class GPT(nn.Module):
    """The whole model, freshly initialised from torch's global generator. State-dict names are GPT-2's.

    attention: `per_head`, `explicit` or `sdpa`; the numbers agree, the state dict is the same. Raises UserError for
    another.
    """

    def __init__(self, config: GPTConfig, attention: str = "explicit") -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config, attention, layer) for layer in range(config.n_layer)),
                "ln_f": LayerNorm(config),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.transformer.wte.weight  # https://arxiv.org/abs/1608.05859
        self._initialise()

    def forward(self, ids: Tensor, last_only: bool = False, cache: KVCache | None = None) -> Tensor:
        """Return logits [B, T, V] of the next token at each position, or [B, 1, V] of the last with `last_only`.

        ids: int64 [B, T], each in [0, V) (see `gpt.tokenizer.check_ids`). cache: what came before them, if anything;
        they are appended to it, and all must fit in block_size. Raises UserError for a length out of range.
        """
        check_length(ids, cache, self.config)
        T, start = ids.shape[1], 0 if cache is None else cache.length
        positions = torch.arange(start, start + T, device=ids.device)  # [T]
        x = self.transformer.drop(self.transformer.wte(ids) + self.transformer.wpe(positions))  # [B, T, C]
        for block in self.transformer.h:
            x = block(x, cache)
        if cache is not None:
            cache.length += T
        x = self.transformer.ln_f(x)  # [B, T, C]
        if last_only:
            x = x[:, -1:]  # [B, 1, C]
        return self.lm_head(x)  # [B, T, V] or [B, 1, V]

    def parameter_count(self) -> int:
        """Return how many numbers are learned: positions included, a tied embedding and head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _initialise(self) -> None:
        """Draw as GPT-2: normal, std 0.02; residual projections scaled by 1/√(2·n_layer) (its paper's section 2.3)."""
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


def check_length(ids: Tensor, cache: KVCache | None, config: GPTConfig) -> None:
    """Raise UserError unless ids [B, T] are 1 to block_size tokens, with what is in the cache counted in."""
    T, start = ids.shape[1], 0 if cache is None else cache.length
    if not 1 <= T <= config.block_size - start:
        after = f" after {start} in the cache" if start else ""
        raise UserError(
            f"a sequence of {T} tokens{after}: the model takes 1 to block_size={config.block_size}; crop it"
        )


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats a token. logits: [B, T, V]; targets: int64 [B, T]."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # [B*T, V] against [B*T]
