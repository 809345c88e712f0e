"""Recognizes causal masks: proves from the formula of their elements that they hide exactly the later keys."""

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import relax, te

from tvm_frontend.frontends.onnx.operators.context import Reading
from tvm_frontend.frontends.onnx.operators.symbolic import (
    LARGE,
    Indexed,
    analyzer_of,
    expression,
    is_one,
    is_zero,
    position_symbols,
    simplified,
    sizes_in,
)

# The kernels by which `passes.recover_attention` knows scores whose later keys are hidden: by a number that no score
# makes up for, or by one, between this prefix and an underscore, that hides them where scores are small beside it.
HIDE_LATER, HIDE_LATER_BY = "hide_later", "hide_later_by_"
SURELY_HIDDEN = -1e30  # a mask that adds at most this hides a key beside any score below 1e29
HIDDEN = -1e4  # GPT-2's own code added this, and files of float16 have little more


def hidden_later(reading: Reading, scores: relax.Expr, mask: Indexed, *, chosen: bool = False) -> relax.Expr | None:
    """Hide later keys in scores [.., T, S] as the mask does, if it does nothing else; None if it does.

    chosen: the mask's number takes the place of a later key's score, and is not added to it.
    """
    hidden = hides_later(mask, list(scores.ty.shape.values))
    if hidden is None:
        return None

    T, S = scores.ty.shape.values[-2:]
    earlier = simplified(S - T)
    sizes = sizes_in(earlier)

    def hide_later(scores: te.Tensor, *passed: tvm.tirx.Var) -> te.Tensor:
        lowest, first = tvm.tirx.const(hidden, scores.dtype), earlier
        for size, given in zip(sizes, passed, strict=True):  # a kernel knows only the sizes of its arguments
            first = tvm.tirx.Let(size, given, first)
        return te.compute(
            scores.shape,
            lambda *index: tvm.tirx.Select(
                index[-1] <= index[-2] + first,
                scores(*index),
                lowest if chosen else scores(*index) + lowest,
            ),
            name=HIDE_LATER,
        )

    name = HIDE_LATER if hidden <= SURELY_HIDDEN else f"{HIDE_LATER_BY}{int(-hidden)}_"
    return reading.builder.call_te(hide_later, scores, *sizes, primfunc_name_hint=name)


def is_causal(mask: Indexed, shape: list[Any]) -> bool:
    """Prove that a mask added to scores [.., T, S] of a shape hides the later keys, surely, and does nothing else."""
    hidden = hides_later(mask, shape)
    return hidden is not None and hidden <= SURELY_HIDDEN


def hides_later(mask: Indexed, shape: list[Any]) -> float | None:
    """Give the number, at most HIDDEN, that a mask adds to the score of each later key if it adds 0 to all others.

    Scores are of a shape [.., T, S], the queries being the last T of the S keys. The proof holds for every T and S: the
    formula of the mask's element is simplified for a key that is any number of places before the query, and for one
    that is any number behind it.
    """
    rank = len(mask.shape)
    if mask.dtype == "bool" or not 2 <= rank <= len(shape):
        return None
    if not all(same_sizes(sizes) for sizes in zip(mask.shape[-2:], shape[-2:], strict=True)):
        return None
    outer = zip(mask.shape[:-2], shape[-rank:-2], strict=True)
    if not all(is_one(dims[0]) or same_sizes(dims) for dims in outer):
        return None
    *before, first, distance = position_symbols([*mask.shape[:-2], LARGE, LARGE])[0]
    earlier = simplified(shape[-1] - shape[-2])  # the number of keys that no query is of
    if not analyzer_of(earlier).can_prove(expression(earlier, "int64") >= 0):
        return None

    def value(query: Any, key: Any) -> float | None:
        element = mask.element(*before, query, key)
        element = analyzer_of(element).simplify(element)
        return float(element.value) if isinstance(element, tvm.tirx.FloatImm | tvm.tirx.IntImm) else None

    # By the place of the key where queries and keys are the same, and by that of the query.
    last = first if is_zero(earlier) else first + earlier
    seen = value(first + distance, first) if is_zero(earlier) else value(first, last - distance)
    hidden = value(first, last + 1 + distance)
    return hidden if seen == 0 and hidden is not None and hidden <= HIDDEN else None


def as_added(mask: Indexed) -> Indexed:
    """Turn a boolean mask, true for keys that are seen, into one that is added; leave one that is added as it is."""
    if mask.dtype != "bool":
        return mask

    def at(*index: Any) -> Any:
        nothing, lowest = tvm.tirx.const(0, "float32"), tvm.tirx.min_value("float32")
        return tvm.tirx.Select(expression(mask.at(*index), "bool"), nothing, lowest)

    return Indexed(mask.shape, "float32", at)


def same_sizes(sizes: Sequence[Any]) -> bool:
    """Tell if sizes, numbers or symbols, are provably equal."""
    analyzer = tvm.sym.Analyzer()
    return all(analyzer.can_prove_equal(sizes[0], size) for size in sizes)
