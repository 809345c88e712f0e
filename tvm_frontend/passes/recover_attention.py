"""Makes causal attention that is spelled out one operator again, which `fuse_attention` knows."""

import re

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op
from tvm.relax.dpl import is_op, wildcard

from tvm_frontend.frontends.onnx.operators.masks import HIDE_LATER, HIDE_LATER_BY
from tvm_frontend.graph import Graph
from tvm_frontend.passes.rewrite import Matched, Rewriting, both_ways, calls, number_of, same_shape
from tvm_frontend.passes.score_bound import longest_vector

VANISHES = 105.0  # e to the power of minus this is 0 in float32
SWAP = [0, 2, 1, 3]  # [B, nh, T, hs] to [B, T, nh, hs], and back


def recover_attention(graph: Graph) -> Graph:
    """Rewrite softmax(hide_later(scale · q · kᵀ)) · v → attention, wherever the scale stands.

    q is [B, nh, T, hs], k and v are [B, nh, S, hs], the queries being the last T of S tokens.

    `hide_later` stands where the importer has proven a mask to be causal. Where the number that it adds to the score of
    a hidden key hides it among small scores alone, as -10000, the weights must bound the scores. A replacement of NaN
    by 0 after softmax, for rows that see no key, is dropped: each row sees itself.
    """
    rewriting = Rewriting(graph)
    weights, v = wildcard(), wildcard()
    attended = is_op("relax.matmul")(weights, v)

    def recover(call: relax.Expr, matched: Matched) -> relax.Expr | None:
        found = _scores(rewriting, matched[weights])
        if found is None:
            return None
        scores, hidden_by = found
        (product,), scale = _without_scale(rewriting, scores)
        product = rewriting.value(product)
        if not calls(product, "matmul"):
            return None
        (q, keys), inner = _without_scale(rewriting, *product.args)
        shape = list(q.ty.shape.values)
        if len(shape) != 4:
            return None
        B, nh, T, hs = shape
        S = scores.ty.shape.values[-1]
        shapes = [keys.ty.shape.values, matched[v].ty.shape.values]
        if not all(map(same_shape, shapes, ([B, nh, hs, S], [B, nh, S, hs]))):
            return None
        if hidden_by < np.inf and not _are_small(rewriting, q, keys, scale * inner, hidden_by):
            return None
        q, k, values = op.permute_dims(q, SWAP), _rows(rewriting, keys), op.permute_dims(matched[v], SWAP)
        scale = tvm.tirx.const(scale * inner, "float32")
        corner = "TopLeft" if same_shape([T], [S]) else "BottomRight"
        return op.permute_dims(op.nn.attention(q, k, values, scale=scale, causal_mask=corner), SWAP)

    rewriting.apply(attended, recover)
    return rewriting.finish()


def _are_small(rewriting: Rewriting, q: relax.Expr, keys: relax.Expr, scale: float, hidden_by: float) -> bool:
    """Tell if scale · q · kᵀ is so small that what is hidden by a number has an exponential of 0 beside any other."""
    lengths = [longest_vector(rewriting, q, 3), longest_vector(rewriting, keys, 2)]
    if lengths[0] is None or lengths[1] is None:
        return False
    return 2 * abs(scale) * lengths[0] * lengths[1] < hidden_by - VANISHES


def _scores(rewriting: Rewriting, weights: relax.Expr) -> tuple[relax.Expr, float] | None:
    """Find the scores that a causal softmax is taken of, and by which number later keys are hidden, infinite if surely.

    None if it is no such softmax.
    """
    value = rewriting.value(weights)
    if calls(value, "where"):  # 0 in place of NaN
        condition, nothing, weights = value.args
        condition = rewriting.value(condition)
        if not (calls(condition, "isnan") and condition.args[0].same_as(weights) and number_of(nothing) == 0):
            return None
        value = rewriting.value(weights)
    if not calls(value, "nn.softmax") or int(value.attrs.axis) not in (-1, len(value.ty.shape.values) - 1):
        return None
    hidden = rewriting.value(value.args[0])
    if not calls(hidden, "call_tir"):
        return None
    known = re.fullmatch(rf"{HIDE_LATER}\d*|{HIDE_LATER_BY}(\d+)_\d*", hidden.args[0].name_hint)
    return known and (hidden.args[1].fields[0], float(known[1] or np.inf))


def _without_scale(rewriting: Rewriting, *factors: relax.Expr) -> tuple[list[relax.Expr], float]:
    """Strip the numbers that the factors are multiplied or divided by, and give the product of these numbers too."""
    bare, scale = [], 1.0
    for factor in factors:
        value = rewriting.value(factor)
        while calls(value, "multiply") or calls(value, "divide"):
            ways = list(both_ways(value)) if calls(value, "multiply") else [tuple(value.args)]
            numbers = [(x, number) for x, y in ways if (number := rewriting.number(y)) is not None]
            if not numbers or not same_shape(numbers[0][0].ty.shape.values, value.ty.shape.values):
                break
            factor, number = numbers[0]
            scale = scale * number if calls(value, "multiply") else scale / number
            value = rewriting.value(factor)
        bare.append(factor)
    return bare, scale


def _rows(rewriting: Rewriting, keys: relax.Expr) -> relax.Expr:
    """Give k [B, T, nh, hs] from kᵀ [B, nh, hs, T], which some exports transpose as [B·nh, T, hs]."""
    transposed = rewriting.value(rewriting.value(keys).args[0]) if calls(rewriting.value(keys), "reshape") else keys
    merged = rewriting.value(transposed.args[0]) if calls(transposed, "permute_dims") else transposed
    if calls(merged, "reshape") and list(map(int, transposed.attrs.axes)) == [0, 2, 1]:
        B, nh, hs, T = keys.ty.shape.values
        k = merged.args[0]
        if same_shape(k.ty.shape.values, [B, nh, T, hs]) and same_shape(merged.ty.shape.values[1:], [T, hs]):
            return op.permute_dims(k, SWAP)
    return op.permute_dims(keys, [0, 3, 1, 2])
