"""Makes a LayerNorm that is spelled out one operator again, which `fuse_layer_norm` puts in a kernel."""

import numpy as np
from tvm import relax
from tvm.relax import op
from tvm.relax.dpl import is_op, wildcard

from tvm_frontend.graph import Graph
from tvm_frontend.passes.rewrite import Matched, Rewriting, both_ways, calls, number_of, same_shape


def recover_layer_norm(graph: Graph) -> Graph:
    """Rewrite (x - mean(x)) / √(mean((x - mean(x))²) + ε) · gain [+ bias] → layer_norm, over the last axis.

    Files of opsets below 17, which have no such operator, spell it out so; https://arxiv.org/abs/1607.06450.
    """
    rewriting = Rewriting(graph)

    def recover(call: relax.Expr, matched: Matched) -> relax.Expr | None:
        pairs = list(both_ways(call)) if calls(call, "add") else [(call, None)]
        for product, bias in pairs:
            value = rewriting.value(product)
            if not calls(value, "multiply"):
                continue
            for normal, gain in both_ways(value):
                if (found := _normalized(rewriting, normal)) is None:
                    continue
                x, epsilon = found
                C = x.ty.shape.values[-1:]
                if all(_is_vector(each, C) for each in (gain, bias) if each is not None):
                    offset = _zeros(rewriting, gain) if bias is None else bias
                    return op.nn.layer_norm(x, gain, offset, axes=[-1], epsilon=epsilon)
        return None

    rewriting.apply(is_op("relax.add")(wildcard(), wildcard()), recover)
    rewriting.apply(is_op("relax.multiply")(wildcard(), wildcard()), recover)
    return rewriting.finish()


def _is_vector(expr: relax.Expr, shape: list) -> bool:
    return isinstance(expr, relax.Var) and same_shape(expr.ty.shape.values, shape)


def _zeros(rewriting: Rewriting, gain: relax.Expr) -> relax.Var:
    C = int(gain.ty.shape.values[0])
    return rewriting.add_weight(f"zeros_{C}", lambda: np.zeros(C, str(gain.ty.dtype)))


def _normalized(rewriting: Rewriting, expr: relax.Expr) -> tuple[relax.Expr, float] | None:
    """Give x and ε if the value is x without its mean, divided by its standard deviation."""
    value = rewriting.value(expr)
    if calls(value, "divide"):
        deviation, spread = value.args
    elif calls(value, "multiply"):  # by the inverse
        for deviation, inverse in both_ways(value):
            inner = rewriting.value(inverse)
            if calls(inner, "rsqrt"):
                return _with_epsilon(rewriting, deviation, inner.args[0])
            if calls(inner, "divide") and number_of(rewriting.value(inner.args[0])) == 1:
                spread = inner.args[1]
                break
        else:
            return None
    else:
        return None
    root = rewriting.value(spread)
    return _with_epsilon(rewriting, deviation, root.args[0]) if calls(root, "sqrt") else None


def _with_epsilon(rewriting: Rewriting, deviation: relax.Expr, total: relax.Expr) -> tuple[relax.Expr, float] | None:
    """Give x and ε if the deviation is that of x from its mean, and the total its variance plus ε."""
    x = _centred(rewriting, deviation)
    value = rewriting.value(total)
    if x is None or not calls(value, "add"):
        return None
    for variance, epsilon in both_ways(value):
        number = number_of(rewriting.value(epsilon))
        square = _mean_of(rewriting, variance)
        if number is not None and square is not None and _is_square_of(rewriting, square, x):
            return x, number
    return None


def _centred(rewriting: Rewriting, expr: relax.Expr) -> relax.Expr | None:
    """Give x if the value is x - mean(x)."""
    value = rewriting.value(expr)
    if not calls(value, "subtract"):
        return None
    x, mean = value.args
    of = _mean_of(rewriting, mean)
    return x if of is not None and of.same_as(x) else None


def _mean_of(rewriting: Rewriting, expr: relax.Expr) -> relax.Expr | None:
    """Give what the value is the mean of, over the last axis, which stays with a size of 1."""
    value = rewriting.value(expr)
    if not calls(value, "mean") or not value.attrs.keepdims or value.attrs.axis is None:
        return None
    last = len(value.args[0].ty.shape.values) - 1
    return value.args[0] if [int(axis) for axis in value.attrs.axis] in ([-1], [last]) else None


def _is_square_of(rewriting: Rewriting, expr: relax.Expr, x: relax.Expr) -> bool:
    """Tell if the value is (x - mean(x))²."""
    value = rewriting.value(expr)
    if calls(value, "power"):
        base, exponent = value.args
        factors = [base] if number_of(rewriting.value(exponent)) == 2 else []
    else:
        factors = list(value.args) if calls(value, "multiply") else []
    centred = [_centred(rewriting, factor) for factor in factors]
    return bool(centred) and all(each is not None and each.same_as(x) for each in centred)
