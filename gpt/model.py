"""The reference GPT: a decoder-only transformer, pre-LN, with tied embeddings. Names as in nanoGPT."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.attention import CausalSelfAttention
from gpt.cli import UserError
from gpt.config import GPTConfig

GELU = {"gelu_tanh": "tanh", "gelu": "none"}  # our names of activations to torch's


class LayerNorm(nn.Module):
    """LayerNorm (https://arxiv.org/abs/1607.06450) over the last dimension, with an optional bias; eps as GPT-2's."""

    def __init__(self, n_embd: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-5)


class MLP(nn.Module):
    """Two linear layers with a GELU (https://arxiv.org/abs/1606.08415) between them: [B, T, C] to [B, T, C]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate=GELU[config.activation])
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C]
        x = self.gelu(self.c_fc(x))  # [B, T, 4C]
        return self.dropout(self.c_proj(x))  # [B, T, C]


class Block(nn.Module):
    """One layer: attention, then MLP, each added to what it normalised: [B, T, C] to [B, T, C]."""

    def __init__(self, config: GPTConfig, attention: str) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config, attention)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C]
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # [B, T, C]


class GPT(nn.Module):
    """The whole model, freshly initialised from torch's global generator. State-dict names are GPT-2's.

    attention: `explicit` or `sdpa`; the numbers agree, the state dict is the same. Raises UserError for another.
    """

    def __init__(self, config: GPTConfig, attention: str = "explicit") -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config, attention) for _ in range(config.n_layer)),
                "ln_f": LayerNorm(config.n_embd, config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied: https://arxiv.org/abs/1608.05859
        self._initialise()

    def forward(self, ids: Tensor, last_only: bool = False) -> Tensor:
        """Logits [B, T, V] of the next token at each position, or [B, 1, V] of the last with `last_only`.

        ids: int64 [B, T], 1 <= T <= block_size, each in [0, V) (see `gpt.tokenizer.check_ids`). Raises UserError for
        another T.
        """
        T = ids.shape[1]
        if not 1 <= T <= self.config.block_size:
            raise UserError(
                f"a sequence of {T} tokens: the model takes 1 to block_size={self.config.block_size}; crop it"
            )
        positions = torch.arange(T, device=ids.device)  # [T]
        x = self.transformer.drop(self.transformer.wte(ids) + self.transformer.wpe(positions))  # [B, T, C]
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)  # [B, T, C]
        if last_only:
            x = x[:, -1:]  # [B, 1, C]
        return self.lm_head(x)  # [B, T, V] or [B, 1, V]

    def parameter_count(self) -> int:
        """How many numbers are learned: positions included, the tied embedding and head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _initialise(self) -> None:
        """GPT-2's: normal of std 0.02, residual projections scaled by 1/√(2·n_layer) (section 2.3 of its paper)."""
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats a token. logits: [B, T, V]; targets: int64 [B, T]."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # [B*T, V] against [B*T]
