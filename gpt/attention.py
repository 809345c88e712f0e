"""Causal self-attention: one meaning, three ways to compute it, equal to rounding on the same weights.

Each takes q [B, nh, T, hs] and k, v [B, nh, S, hs] and gives [B, nh, T, hs]; q are the last T of the S positions (S is
T without a cache). dropout is the probability of dropping an attention weight, scale multiplies the scores q kᵀ.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt.cache import KVCache
from gpt.cli import UserError
from gpt.config import GPTConfig

# `sdpa` may run these, the preferred ones first; math is the formula in plain operations
SDPA_BACKENDS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def per_head(q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float) -> Tensor:
    """Follow the formula head by head and position by position, to be read; `explicit` does all heads at once."""
    heads = []
    for head in range(q.shape[1]):
        queries, keys, values = q[:, head], k[:, head], v[:, head]  # [B, T, hs], [B, S, hs], [B, S, hs]
        scores = queries @ keys.transpose(1, 2) * scale  # [B, T, S]
        weights = F.softmax(scores + _later(scores), dim=-1)  # [B, T, S], each row sums to 1
        heads.append(F.dropout(weights, dropout) @ values)  # [B, T, hs]
    return torch.stack(heads, dim=1)  # [B, nh, T, hs]


def explicit(q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float) -> Tensor:
    """Spell out softmax(q kᵀ · scale) v over the positions up to one's own ("Attention is all you need", 3.2.1)."""
    scores = q @ k.transpose(-2, -1) * scale  # [B, nh, T, S]
    weights = F.dropout(F.softmax(scores + _later(scores), dim=-1), dropout)  # [B, nh, T, S]
    return weights @ v  # [B, nh, T, hs]


def sdpa(q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float) -> Tensor:
    """Compute it by torch's fused kernel, which never holds the T × S weights; flash where it can run, on a GPU too."""
    T, S = q.shape[-2], k.shape[-2]
    with _flash_first(q.device):
        if T == S:
            return F.scaled_dot_product_attention(q, k, v, None, dropout, True, scale=scale)  # [B, nh, T, hs]
        seen = None if T == 1 else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)  # [T, S]
        return F.scaled_dot_product_attention(q, k, v, seen, dropout_p=dropout, scale=scale)  # [B, nh, T, hs]


def sdpa_backend(config: GPTConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Return what `sdpa` runs in training at block_size, as torch chooses: `flash`, `cudnn`, `efficient` or `math`."""
    q = torch.empty(1, config.n_head, config.block_size, config.head_size, device=device, dtype=dtype)
    with _flash_first(device):
        # torch's own choice; there is no public name for it
        chosen = torch._fused_sdp_choice(q, q, q, dropout_p=config.dropout, is_causal=True)
    return SDPBackend(chosen).name.removesuffix("_ATTENTION").lower()


ATTENTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, float, float], Tensor]] = {
    "per_head": per_head,
    "explicit": explicit,
    "sdpa": sdpa,
}


class CausalSelfAttention(nn.Module):
    """Multi-head attention between one fused projection to q, k, v and one back: [B, T, C] to [B, T, C].

    attention: a name in ATTENTIONS. layer: its place in a KV cache. Raises UserError for an unknown attention.
    """

    def __init__(self, config: GPTConfig, attention: str, layer: int = 0) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise UserError(f"attention={attention!r}: must be one of {', '.join(ATTENTIONS)}")
        self.attend = ATTENTIONS[attention]
        self.layer = layer
        self.n_head = config.n_head
        self.scale = config.attention_scale(layer)
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:  # [B, T, C]
        B, T, C = x.shape
        nh, hs = self.n_head, C // self.n_head
        q, k, v = (part.view(B, T, nh, hs).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))  # [B, nh, T, hs]
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # [B, nh, S, hs]
        y = self.attend(q, k, v, self.dropout if self.training else 0.0, self.scale)  # [B, nh, T, hs]
        y = y.transpose(1, 2).reshape(B, T, C)  # [B, T, C]
        return self.resid_dropout(self.c_proj(y))  # [B, T, C]


def _later(scores: Tensor) -> Tensor:
    """Return -inf where a key comes after its query, else 0: [T, S] for scores [..., T, S]."""
    T, S = scores.shape[-2:]
    # added, not masked_fill: compilers treat a float mask better than a boolean one
    return torch.full((T, S), -math.inf, dtype=scores.dtype, device=scores.device).triu(1 + S - T)


def _flash_first(device: torch.device) -> AbstractContextManager:
    """Ask torch for flash before its other kernels; a CPU has one order only, and asking costs time at each call."""
    return sdpa_kernel(SDPA_BACKENDS, set_priority=True) if device.type == "cuda" else nullcontext()
