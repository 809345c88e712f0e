"""The sizes of a model that a comparison needs to know: those of a GPT, or of whatever is in somebody's ONNX file."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from gpt.config import GPTConfig
from gpt.costs import matmul_parameters


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder of any architecture.

    block_size: the longest sequence. vocab_size: the number of token ids. width: of what the head multiplies. weights:
    the numbers in the matrices of products. columns: of these matrices together. kept: the numbers in one token's keys,
    over all layers, and in its values, 0 if that is not known; heads: the parts of them that could have a scale.
    has_cache: whether it can go on from keys and values of earlier tokens. weight_bytes, kept_bytes: of the matrices
    and of one token's keys and values, as a file holds them; None if the precision says it. fixed: the one B and the
    one T that it takes, None for any. about: a few words for the report.
    """

    block_size: int
    vocab_size: int
    width: int
    weights: int
    columns: int
    kept: int
    heads: int
    has_cache: bool
    about: str
    weight_bytes: int | None = None
    kept_bytes: int | None = None
    fixed: tuple[int | None, int | None] = (None, None)


Model: TypeAlias = GPTConfig | Shape


def shape_of(model: Model) -> Shape:
    """Return the sizes of a model."""
    if isinstance(model, Shape):
        return model
    L, C, V = model.n_layer, model.n_embd, model.vocab_size
    is_bigram = model.model == "bigram"
    return Shape(
        block_size=model.block_size,
        vocab_size=V,
        width=C,
        weights=matmul_parameters(model),
        columns=0 if is_bigram else (5 * C + model.mlp_width) * L + V,  # 3C, C, n_inner and C in a layer; the head's
        kept=L * C,
        heads=L * model.n_head,
        has_cache=not is_bigram,
        about="a table of bigrams" if is_bigram else f"{L} layers, {model.n_head} heads, {C} wide",
    )


def fitted(model: Model, shapes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return shapes (B, T) with what the model fixes in the place of their own, each once."""
    B, T = shape_of(model).fixed
    return list(dict.fromkeys((B or rows, T or tokens) for rows, tokens in shapes))
