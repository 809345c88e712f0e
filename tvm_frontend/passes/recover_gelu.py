"""Makes a GELU that is spelled out one operator again, which `fuse_linear` puts in a product's epilogue."""

import math
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
from tvm import relax
from tvm.relax import op
from tvm.relax.dpl import is_op, wildcard

from tvm_frontend.graph import Graph
from tvm_frontend.passes.rewrite import Matched, Rewriting, both_ways, calls, number_of

FLOAT32 = 1e-6  # relative: some roundings of float32, of 6e-8 each, where a constant is a product of others


def recover_gelu(graph: Graph) -> Graph:
    """Rewrite x/2 · (1 + erf(x/√2)) → gelu(x); x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))) → gelu_tanh(x).

    Both in any order and grouping of factors; https://arxiv.org/abs/1606.08415.
    """
    rewriting = Rewriting(graph)

    def recover(call: relax.Expr, matched: Matched) -> relax.Expr | None:
        for gate in _gates(rewriting, call):
            for x, operator in _gated(rewriting, gate):
                if _is_product(rewriting, call, 0.5, [x, gate]):
                    return operator(x)
        return None

    rewriting.apply(is_op("relax.multiply")(wildcard(), wildcard()), recover)
    return rewriting.finish()


def _gates(rewriting: Rewriting, product: relax.Expr) -> Iterator[relax.Expr]:
    """List the factors that are sums."""
    value = rewriting.value(product)
    if calls(value, "multiply"):
        for factor in value.args:
            yield from _gates(rewriting, factor)
    elif calls(value, "add"):
        yield product


def _gated(rewriting: Rewriting, gate: relax.Expr) -> Iterator[tuple[relax.Expr, Callable[[relax.Expr], relax.Expr]]]:
    """List the candidates for x if the gate is that of a GELU, each with the GELU's operator."""
    for one, curve in both_ways(rewriting.value(gate)):
        inner = rewriting.value(curve)
        if not _close(number_of(rewriting.value(one)), 1):
            continue
        if calls(inner, "erf"):
            yield from ((x, op.nn.gelu) for x in _scaled(rewriting, inner.args[0], math.sqrt(0.5)))
        if calls(inner, "tanh"):
            for total in _scaled(rewriting, inner.args[0], math.sqrt(2 / math.pi)):
                for x, cubic in both_ways(rewriting.value(total)):
                    if _is_product(rewriting, cubic, 0.044715, [x, x, x]):
                        yield x, op.nn.gelu_tanh


def _scaled(rewriting: Rewriting, product: relax.Expr, scale: float) -> Iterator[relax.Expr]:
    """List the factors that are multiplied by a scale, or divided by its inverse."""
    value = rewriting.value(product)
    if calls(value, "multiply"):
        yield from (x for x, factor in both_ways(value) if _close(number_of(rewriting.value(factor)), scale))
    if calls(value, "divide") and _close(number_of(rewriting.value(value.args[1])), 1 / scale):
        yield value.args[0]


def _is_product(rewriting: Rewriting, product: relax.Expr, scale: float, factors: list[relax.Expr]) -> bool:
    """Tell if the product is that of these factors and of numbers that multiply to the scale."""
    numbers, found = 1.0, []

    def collect(expr: relax.Expr) -> None:
        nonlocal numbers
        value = rewriting.value(expr)
        if any(expr.same_as(factor) for factor in factors):
            found.append(expr)
        elif (number := number_of(value)) is not None:
            numbers *= number
        elif calls(value, "multiply"):
            for factor in value.args:
                collect(factor)
        elif calls(value, "power") and _close(number_of(rewriting.value(value.args[1])), 3):
            for _ in range(3):
                collect(value.args[0])
        else:
            found.append(expr)

    collect(product)
    for factor in factors:
        index = next((i for i, expr in enumerate(found) if expr.same_as(factor)), None)
        if index is None:
            return False
        del found[index]
    return not found and _close(numbers, scale)


def _close(number: float | None, expected: float) -> bool:
    """Tell if a number is the expected one as float32, bfloat16 or float16 hold it; the importer widens the latter."""
    if number is None:
        return False
    rounded = (float(np.array(expected).astype(dtype)) for dtype in (ml_dtypes.bfloat16, np.float16))
    return math.isclose(number, expected, rel_tol=FLOAT32) or any(number == each for each in rounded)
