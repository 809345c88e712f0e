"""Joins the linear layers of q, k and v to one, whose thirds `fuse_attention` knows."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op
from tvm.relax.dpl import is_op, wildcard

from tvm_frontend.graph import Graph
from tvm_frontend.passes.rewrite import Matched, Rewriting, both_ways, calls, is_transpose, same_shape


@dataclass(frozen=True)
class _Projection:
    """Holds a linear layer, scale · (x · W + bias), with W [K, N]; name tells its weights from others."""

    x: relax.Expr
    weight: np.ndarray
    bias: np.ndarray | None
    scale: float
    name: str


def merge_projections(graph: Graph) -> Graph:
    """Rewrite attention to q, k, v, each reshape(scale · (x · W + bias)) of one x → thirds of one linear layer of x.

    Each of its numbers is the sum of the same products as before. Scales go to that of attention, but for one of v.
    """
    rewriting = Rewriting(graph)
    heads = [is_op("relax.reshape")(wildcard(), wildcard()) for _ in range(3)]

    def merge(call: relax.Expr, matched: Matched) -> relax.Expr | None:
        shape = list(call.args[0].ty.shape.values)
        if str(call.attrs.causal_mask) != "TopLeft" or call.attrs.window_size is not None:
            return None
        if not all(same_shape(each.ty.shape.values, shape) for each in call.args):
            return None
        found = [_projection(rewriting, matched[each].args[0]) for each in heads]
        projections = [each for each in found if each is not None]
        if len(projections) < 3 or any(not each.x.same_as(projections[0].x) for each in projections):
            return None
        q, k, v = projections
        C = int(shape[2]) * int(shape[3])
        if v.scale != 1 or any(each.weight.shape[1] != C or each.weight.dtype != np.float32 for each in projections):
            return None
        B, T, *rest = q.x.ty.shape.values
        if len(rest) != 1 or not same_shape([B, T], shape[:2]):
            return None
        name = "+".join(each.name for each in projections)
        weight = rewriting.add_weight(name, lambda: np.concatenate([each.weight for each in projections], axis=1))
        qkv = op.matmul(q.x, weight)
        if any(each.bias is not None for each in projections):
            biases = [np.zeros(C, np.float32) if each.bias is None else each.bias for each in projections]
            qkv = op.add(qkv, rewriting.add_weight(f"{name}.bias", lambda: np.concatenate(biases)))
        thirds = op.split(qkv, 3, axis=2)
        scale = (int(shape[3]) ** -0.5 if call.attrs.scale is None else float(call.attrs.scale)) * q.scale * k.scale
        parts = (op.reshape(relax.TupleGetItem(thirds, i), shape) for i in range(3))
        return op.nn.attention(*parts, scale=tvm.tirx.const(scale, "float32"), causal_mask="TopLeft")

    rewriting.apply(is_op("relax.nn.attention")(*heads), merge)
    return rewriting.finish()


def _projection(rewriting: Rewriting, expr: relax.Expr) -> _Projection | None:
    """Give the linear layer that a value is, if nothing else reads what it computes."""
    value: Any = rewriting.value_read_once(expr)
    scale, bias, names = 1.0, None, []
    if calls(value, "multiply"):
        numbers = [(number, x) for x, y in both_ways(value) if (number := rewriting.number(y)) is not None]
        scale, inner = numbers[0] if numbers else (1.0, expr)
        value = rewriting.value_read_once(inner)
    if calls(value, "add"):
        biases = [(y, x) for x, y in both_ways(value) if rewriting.weight(y) is not None]
        if not biases:
            return None
        addend, inner = biases[0]
        bias, value = rewriting.weight(addend), rewriting.value_read_once(inner)
        names.append(rewriting.name(addend))
    if not calls(value, "matmul"):
        return None
    x, factor = value.args
    turned = rewriting.value(factor)
    is_turned = is_transpose(turned)
    factor = turned.args[0] if is_turned else factor
    weight = rewriting.weight(factor)
    if weight is None or weight.ndim != 2:
        return None
    weight = weight.T if is_turned else weight
    if bias is not None and bias.shape != weight.shape[1:]:
        return None
    names.append(rewriting.name(factor) + (".transposed" if is_turned else ""))
    return _Projection(x, weight, bias, scale, ",".join(names))
