"""The shape of a model. No torch here, so that an exported or compiled model can be described without it."""

import math
from dataclasses import dataclass, fields
from typing import Any

from gpt.cli import UserError

MODELS = ("gpt", "bigram")
ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "quick_gelu", "silu", "tanh")
MOST = 2**31  # that a size may be: a product of two of them still fits in 64 bits


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a decoder-only transformer, named as in nanoGPT (https://github.com/karpathy/nanoGPT).

    block_size: the longest sequence, in tokens. vocab_size: number of token ids. n_layer, n_head, n_embd: depth,
    heads a layer, width. dropout: probability, in training only. bias: biases in every Linear and LayerNorm (GPT-2
    has them). activation: `gelu_tanh` (GPT-2's approximation), `gelu` (exact), `relu`, `quick_gelu`, which is
    x · sigmoid(1.702 x), `silu` or `tanh`. tied_head: whether the head is the token embedding. model: `gpt`, or
    `bigram` for a table alone, whose shape `GPTConfig.bigram` gives. The others are named as in transformers'
    GPT2Config. n_inner: the MLP's width; None is 4 n_embd, and that is always kept as None. layer_norm_epsilon: what
    every LayerNorm adds to the variance. scale_attn_weights: whether scores are divided by √head_size;
    scale_attn_by_inverse_layer_idx: whether those of layer i, counted from 0, are also divided by i + 1. The defaults
    are GPT-2 124M's. Raises UserError (a ValueError) that names the field, its value and what is allowed.
    """

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    activation: str = "gelu_tanh"
    tied_head: bool = True
    model: str = "gpt"
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise UserError(f"model={self.model!r}: must be one of {', '.join(MODELS)}")
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value, least = getattr(self, name), 0 if (self.model, name) == ("bigram", "n_layer") else 1
            if type(value) is not int or not least <= value < MOST:
                raise UserError(f"{name}={value!r}: must be a whole number of at least {least} and below 2**31")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd}: must be a multiple of n_head={self.n_head}")
        for name in ("bias", "tied_head", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"):
            if type(getattr(self, name)) is not bool:
                raise UserError(f"{name}={getattr(self, name)!r}: must be True or False")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout}: must be in [0, 1)")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation={self.activation!r}: must be one of {', '.join(ACTIVATIONS)}")
        if self.n_inner is not None and (type(self.n_inner) is not int or not 1 <= self.n_inner < MOST):
            raise UserError(f"n_inner={self.n_inner!r}: must be a whole number of at least 1 and below 2**31, or None")
        if self.n_inner == 4 * self.n_embd:
            object.__setattr__(self, "n_inner", None)  # so that equal shapes are equal configs
        epsilon = self.layer_norm_epsilon
        if type(epsilon) not in (int, float) or not 0 <= epsilon < math.inf:
            raise UserError(f"layer_norm_epsilon={epsilon!r}: must be a finite number of at least 0")
        if self.model == "bigram":
            for name, value in _bigram_shape(self.vocab_size).items():
                if getattr(self, name) != value:
                    raise UserError(
                        f"{name}={getattr(self, name)!r}: must be {value!r} in a bigram; use GPTConfig.bigram"
                    )

    @classmethod
    def bigram(cls, vocab_size: int, block_size: int) -> "GPTConfig":
        """Return a bigram's shape: one row of V logits a token, and no layer. Raises UserError."""
        return cls(model="bigram", block_size=block_size, vocab_size=vocab_size, **_bigram_shape(vocab_size))

    @property
    def head_size(self) -> int:
        """Width of one attention head, hs = C / nh."""
        return self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        """Width of the MLP between its two layers: `n_inner`, or 4 n_embd where that is None."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    def attention_scale(self, layer: int) -> float:
        """Return by what a layer's scores q · k are multiplied before the softmax; GPT-2's is 1/√head_size."""
        scale = self.head_size**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


def config_from_json(found: dict[str, Any]) -> GPTConfig:
    """Return the config that `dataclasses.asdict` described; a field that an older file lacks has its default.

    Raises UserError for a field that this code does not know, and for impossible values.
    """
    known = {each.name for each in fields(GPTConfig)}
    if unknown := found.keys() - known:
        raise UserError(f"the config has fields that this code does not know: {', '.join(sorted(unknown))}")
    return GPTConfig(**found)


def _bigram_shape(vocab_size: int) -> dict[str, Any]:
    """Return the one value of each field that says nothing of a bigram, so that equal bigrams have equal configs."""
    return {
        "n_layer": 0,
        "n_head": 1,
        "n_embd": vocab_size,
        "dropout": 0.0,
        "bias": False,
        "activation": "gelu_tanh",
        "tied_head": False,
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }
