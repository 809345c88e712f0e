"""Recognizes causal masks: proves from the formula of their elements that they hide exactly the later keys."""

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import relax, te

from tvm_frontend.frontends.onnx.operators.context import Reading
from tvm_frontend.frontends.onnx.operators.symbolic import LARGE, Indexed, expression, is_one, position_symbols

HIDE_LATER = "hide_later"  # the kernel by which `passes.recover_attention` knows such scores
HIDDEN = -1e4  # a mask holds at most this for a hidden key: GPT-2's own code added that


def hidden_later(reading: Reading, scores: relax.Expr, mask: Indexed) -> relax.Expr | None:
    """Hide later keys in scores [.., T, T] by the lowest number, if that is what adding the mask does; else None."""
    shape = list(scores.ty.shape.values)
    if not is_causal(mask, shape):
        return None

    def hide_later(scores: te.Tensor) -> te.Tensor:
        lowest = tvm.tirx.min_value(scores.dtype)
        return te.compute(
            scores.shape,
            lambda *index: tvm.tirx.Select(index[-1] <= index[-2], scores(*index), lowest),
            name=HIDE_LATER,
        )

    return reading.builder.call_te(hide_later, scores, primfunc_name_hint=HIDE_LATER)


def is_causal(mask: Indexed, shape: list[Any]) -> bool:
    """Prove that a mask added to scores of a shape is 0 where key ≤ query and at most HIDDEN elsewhere.

    Scores are [.., T, T], and the proof holds for every T.
    """
    rank = len(mask.shape)
    if not 2 <= rank <= len(shape) or not same_sizes([*mask.shape[-2:], *shape[-2:]]):
        return False
    outer = zip(mask.shape[:-2], shape[-rank:-2], strict=True)
    if not all(is_one(dims[0]) or same_sizes(dims) for dims in outer):
        return False
    *before, first = position_symbols([*mask.shape[:-2], LARGE])[0]
    distance = tvm.tirx.Var("distance", "int64")
    analyzer = tvm.sym.Analyzer()
    for position in (*before, first, distance):
        if isinstance(position, tvm.tirx.Var):
            analyzer.bind(position, tvm.ir.Range(0, LARGE))

    def value(query: Any, key: Any) -> float | None:
        element = analyzer.simplify(expression(mask.at(*before, query, key), mask.dtype))
        number = isinstance(element, tvm.tirx.FloatImm | tvm.tirx.IntImm)
        return float(element.value) if number and mask.dtype != "bool" else None

    seen, hidden = value(first + distance, first), value(first, first + 1 + distance)
    return seen == 0 and hidden is not None and hidden <= HIDDEN


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
