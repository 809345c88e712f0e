"""The shape of a GPT. No torch here, so that an exported or compiled model can be described without it."""

from dataclasses import dataclass

from gpt.cli import UserError

ACTIVATIONS = ("gelu_tanh", "gelu")


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a decoder-only transformer, named as in nanoGPT (https://github.com/karpathy/nanoGPT).

    block_size: the longest sequence, in tokens. vocab_size: number of token ids. n_layer, n_head, n_embd: depth,
    heads a layer, width. dropout: probability, in training only. bias: biases in every Linear and LayerNorm (GPT-2
    has them). activation: `gelu_tanh` (GPT-2's approximation) or `gelu` (exact). The defaults are GPT-2 124M's.
    Raises UserError (a ValueError) that names the field, its value and what is allowed.
    """

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    activation: str = "gelu_tanh"

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"{name}={value!r}: must be a whole number of at least 1")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd}: must be a multiple of n_head={self.n_head}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout}: must be in [0, 1)")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation={self.activation!r}: must be one of {', '.join(ACTIVATIONS)}")

    @property
    def head_size(self) -> int:
        """Width of one attention head, hs = C / nh."""
        return self.n_embd // self.n_head
