"""Causal self-attention: one meaning, more than one way to compute it."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.cli import UserError
from gpt.config import GPTConfig


def explicit(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Softmax(q kᵀ / √hs) v over the positions up to one's own, spelt out ("Attention is all you need", section 3.2.1).

    q, k, v: [B, nh, T, hs]; the result likewise. dropout: probability of dropping an attention weight.
    """
    T, hs = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) / math.sqrt(hs)  # [B, nh, T, T]
    # added, not masked_fill: compilers treat a float mask better than a boolean one
    later = torch.full((T, T), -math.inf, dtype=scores.dtype, device=scores.device).triu(1)  # [T, T]
    weights = F.dropout(F.softmax(scores + later, dim=-1), dropout)  # [B, nh, T, T]
    return weights @ v  # [B, nh, T, hs]


def sdpa(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """The same by torch's fused kernel, which never holds the T × T weights. Shapes as `explicit`."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # [B, nh, T, hs]


ATTENTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {"explicit": explicit, "sdpa": sdpa}


class CausalSelfAttention(nn.Module):
    """Multi-head attention between one fused projection to q, k, v and one back: [B, T, C] to [B, T, C].

    attention: a name in ATTENTIONS. Raises UserError for another.
    """

    def __init__(self, config: GPTConfig, attention: str) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise UserError(f"attention={attention!r}: must be one of {', '.join(ATTENTIONS)}")
        self.attend = ATTENTIONS[attention]
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C]
        B, T, C = x.shape
        nh, hs = self.n_head, C // self.n_head
        q, k, v = (part.view(B, T, nh, hs).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))  # [B, nh, T, hs]
        y = self.attend(q, k, v, self.dropout if self.training else 0.0)  # [B, nh, T, hs]
        y = y.transpose(1, 2).reshape(B, T, C)  # [B, T, C]
        return self.resid_dropout(self.c_proj(y))  # [B, T, C]
