"""Bounds the scores of attention by the weights, whatever the tokens.

A mask that adds -10000, as GPT-2's own code did, hides a key only if the scores of its row are no further apart. The
rows that LayerNorm gives are no longer than its gain and bias let them be, and a projection makes them longer by its
largest singular value at most.
"""

from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_frontend.passes.rewrite import Rewriting, calls, is_transpose, same_shape


def longest_vector(rewriting: Rewriting, expr: relax.Expr, axis: int) -> float | None:
    """Bound the length of the vectors along an axis of a value, for any input of the model.

    The value is that of a linear layer after LayerNorm, its columns in heads, moved and scaled. None for another value.
    """
    found = _layer(rewriting, expr, axis)
    if found is None:
        return None
    layer, size, columns, scale = found
    value: Any = rewriting.value(layer)
    bias = None
    if calls(value, "add"):
        x, y = value.args
        x, y = (y, x) if rewriting.weight(x) is not None else (x, y)
        bias, value = rewriting.weight(y), rewriting.value(x)
        if bias is None:
            return None
    if not calls(value, "matmul"):
        return None
    x, factor = value.args
    turned = rewriting.value(factor)
    weight = rewriting.weight(turned.args[0] if is_transpose(turned) else factor)
    normal = rewriting.value(x)
    if weight is None or weight.ndim != 2 or not calls(normal, "nn.layer_norm"):
        return None
    if [int(each) for each in normal.attrs.axes] not in ([-1], [len(x.ty.shape.values) - 1]):
        return None
    gain, offset = (rewriting.weight(each) for each in normal.args[1:3])
    if gain is None or offset is None:
        return None
    weight = (weight.T if is_transpose(turned) else weight).astype(np.float64)
    constant = (offset @ weight + (0 if bias is None else np.broadcast_to(bias, weight.shape[1:])))[columns]
    turns = (gain[:, None] * weight)[:, columns].reshape(len(weight), -1, size)  # [C, nh, hs]
    singular = [np.linalg.eigvalsh(head.T @ head)[-1] ** 0.5 for head in turns.transpose(1, 0, 2)]
    lengths = np.array(singular) * len(weight) ** 0.5 + np.linalg.norm(constant.reshape(-1, size), axis=1)
    return float(lengths.max()) * abs(scale)


def _layer(rewriting: Rewriting, expr: relax.Expr, axis: int) -> tuple[relax.Expr, int, slice, float] | None:
    """Follow an axis back to where it is a part of a linear layer's columns.

    Gives the layer, the axis' size, the columns, and the number that they are multiplied by since.
    """
    size: Any = expr.ty.shape.values[axis]
    if not isinstance(size, tvm.tirx.IntImm):
        return None
    axis, scale = axis % len(expr.ty.shape.values), 1.0
    while True:
        value: Any = rewriting.value(expr)
        if factor := _factor(rewriting, value):
            scale *= factor
        elif calls(value, "permute_dims") and value.attrs.axes is not None:
            axis = int(value.attrs.axes[axis])
        elif calls(value, "reshape"):
            after, before = (list(each.ty.shape.values) for each in (expr, value.args[0]))
            behind = len(after) - axis
            if axis == len(after) - 1 and not same_shape(after[-1:], before[-1:]):
                return _part(rewriting, value.args[0], int(size), scale)
            if len(before) < behind or not same_shape(after[-behind:], before[-behind:]):
                return None
            axis = len(before) - behind
        else:
            return None
        expr = value.args[0]


def _factor(rewriting: Rewriting, value: relax.Expr) -> float | None:
    """Give the number that a value is multiplied by, or divided by the inverse of, other than 0; None without one."""
    number = rewriting.number(value.args[1]) if calls(value, "multiply") or calls(value, "divide") else None
    return number and (number if calls(value, "multiply") else 1 / number)


def _part(
    rewriting: Rewriting, expr: relax.Expr, size: int, scale: float
) -> tuple[relax.Expr, int, slice, float] | None:
    """Give what `_layer` does for a value [.., N] whose columns are heads of a size."""
    value: Any = rewriting.value(expr)
    while factor := _factor(rewriting, value):
        scale, expr = scale * factor, value.args[0]
        value = rewriting.value(expr)
    layer, start = expr, 0
    if isinstance(value, relax.TupleGetItem):
        split: Any = rewriting.value(value.tuple_value)
        rank = len(expr.ty.shape.values)
        if not calls(split, "split") or int(split.attrs.axis) % rank != rank - 1:
            return None
        parts = [each.shape.values[-1] for each in split.ty.fields][: int(value.index)]
        if not all(isinstance(part, tvm.tirx.IntImm) for part in parts):
            return None
        layer, start = split.args[0], sum(map(int, parts))
    N = expr.ty.shape.values[-1]
    if not isinstance(N, tvm.tirx.IntImm) or int(N) % size:
        return None
    return layer, size, slice(start, start + int(N)), scale
