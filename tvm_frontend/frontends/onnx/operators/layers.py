"""Converts operators that are a layer: products, LayerNorm, GELU, softmax, attention, the rows of a cache."""

from typing import Any

import numpy as np
import onnx
import tvm
from tvm import relax, te
from tvm.relax import op

from gpt.cli import UserError
from tvm_frontend.frontends.onnx.operators.context import Converter, Reading, Value, refuse_unless
from tvm_frontend.frontends.onnx.operators.masks import as_added, is_causal
from tvm_frontend.frontends.onnx.operators.shapes import before_reshape


def _matmul(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    return op.matmul(*map(reading.tensor, node.input))


def _gemm(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Convert a·b + c, a linear layer on [B·T, C], to the one on [B, T, C] that the passes know."""
    refuse_unless(attributes, alpha=1.0, beta=1.0, transA=0)
    a, b = reading.tensor(node.input[0]), reading.tensor(node.input[1])
    x = unmerged(reading, a)
    y = reading.emit(op.matmul(x, reading.emit(op.permute_dims(b)) if attributes.get("transB") else b))
    if len(node.input) > 2:
        y = reading.emit(op.add(y, reading.tensor(node.input[2])))
    return y if x is a else op.reshape(y, [a.ty.shape.values[0], y.ty.shape.values[-1]])


def unmerged(reading: Reading, a: relax.Expr) -> relax.Expr:
    """Undo the merging of B and T, and of heads, that made a [B·T, C]; give `a` itself if there was none."""
    C = a.ty.shape.values[-1]
    x = before_reshape(reading, a)
    B, T, *rest = x.ty.shape.values if len(x.ty.shape.values) > 2 else (None, None)
    if len(rest) == 1:
        return x if tvm.sym.Analyzer().can_prove_equal(rest[0], C) else a
    if len(rest) == 2 and tvm.sym.Analyzer().can_prove_equal(rest[0] * rest[1], C):
        return reading.emit(op.reshape(x, [B, T, C]))
    return a


def _layer_norm(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    refuse_unless(attributes, stash_type=1)
    x, gain = reading.tensor(node.input[0]), reading.tensor(node.input[1])
    if attributes.get("axis", -1) not in (-1, len(x.ty.shape.values) - 1):
        raise UserError(f"axis={attributes['axis']} is not supported, only the last one")
    if len(node.input) > 2:
        bias = reading.tensor(node.input[2])
    else:  # Relax's operator always adds one
        C = int(gain.ty.shape.values[0])
        bias = reading.add_weight(f"zeros_{C}", np.zeros(C, str(gain.ty.dtype)))
    return op.nn.layer_norm(x, gain, bias, axes=[-1], epsilon=attributes.get("epsilon", 1e-5))


def _gelu(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    exact = attributes.get("approximate", b"none") == b"none"
    return (op.nn.gelu if exact else op.nn.gelu_tanh)(reading.tensor(node.input[0]))


def _softmax(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    return op.nn.softmax(reading.tensor(node.input[0]), axis=attributes.get("axis", -1))


def _attention(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Convert ai.onnx Attention on q, k, v of [B, nh, T, hs]; Relax's takes [B, T, nh, hs]."""
    names = dict(zip(("q", "k", "v", "mask", "past key", "past value", "end"), node.input, strict=False))
    shapes = [reading.shape(name) for name in node.input[:3]]
    if names.get("mask") and (mask := reading.indexed(names["mask"])):
        *before, T, _ = shapes[0]
        if is_causal(as_added(mask[0]), [*before, T, shapes[1][-2]]):
            names["mask"], attributes = "", attributes | {"is_causal": 1}
    refuse_unless({"is_causal": 0} | attributes, is_causal=1, qk_matmul_output_mode=0, softcap=0.0)
    if any(names.get(name) for name in ("mask", "past key", "past value")):
        raise UserError("a mask or a growing cache is not supported; export with --with-cache for a preallocated one")
    if any(len(shape) != 4 for shape in shapes) or len({int(shape[1]) for shape in shapes}) != 1:
        raise UserError(f"q, k, v of shapes {shapes} are not supported, only [B, nh, T, hs] with one nh")
    scale = attributes.get("scale")
    if names.get("end"):
        q, k, v, end = (reading.tensor(names[name]) for name in ("q", "k", "v", "end"))
        return _attention_up_to(reading, q, k, v, end, scale)
    q, k, v = (op.permute_dims(reading.tensor(name), [0, 2, 1, 3]) for name in node.input[:3])
    y = op.nn.attention(q, k, v, scale=scale and tvm.tirx.const(scale, "float32"), causal_mask="TopLeft")
    return op.permute_dims(y, [0, 2, 1, 3])


def _attention_up_to(
    reading: Reading, q: relax.Expr, k: relax.Expr, v: relax.Expr, end: relax.Expr, scale: float | None
) -> relax.Expr:
    """Attend with q [B, nh, T, hs] to k, v [B, nh, S, hs]: sequence b fills end[b] rows, its queries the last."""
    scale = int(q.ty.shape.values[3]) ** -0.5 if scale is None else scale

    def scores_up_to(scores: te.Tensor, end: te.Tensor) -> te.Tensor:
        T = scores.shape[2]
        return te.compute(
            scores.shape,
            lambda b, h, t, s: te.if_then_else(
                s <= end[b] - T + t, scores[b, h, t, s], tvm.tirx.min_value(scores.dtype)
            ),
            name="scores_up_to",
        )

    emit = reading.builder.emit
    q = emit(op.multiply(q, relax.const(scale, q.ty.dtype)))
    scores = emit(op.matmul(q, emit(op.permute_dims(k, [0, 1, 3, 2]))))  # [B, nh, T, S]
    seen = reading.builder.emit_te(scores_up_to, scores, end, primfunc_name_hint="scores_up_to")
    return op.matmul(emit(op.nn.softmax(seen, axis=-1)), v)


def _tensor_scatter(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Convert ai.onnx TensorScatter: write rows [B, nh, T, hs] into cache [B, nh, S, hs] from pos[b] on."""
    refuse_unless({"axis": -2} | attributes, mode=b"linear")
    cache, rows, pos = (reading.tensor(name) for name in node.input)
    if len(cache.ty.shape.values) != 4 or attributes.get("axis", -2) not in (-2, 2):
        raise UserError("only axis 2 of [B, nh, S, hs] is supported")

    def tensor_scatter(cache: te.Tensor, rows: te.Tensor, pos: te.Tensor) -> te.Tensor:
        T = rows.shape[2]
        return te.compute(
            cache.shape,
            lambda b, h, s, d: te.if_then_else(
                te.all(s >= pos[b], s < pos[b] + T),
                rows[b, h, te.max(te.min(s - pos[b], T - 1), 0), d],
                cache[b, h, s, d],
            ),
            name="tensor_scatter",
        )

    return reading.builder.emit_te(tensor_scatter, cache, rows, pos, primfunc_name_hint="tensor_scatter")


CONVERTERS: dict[str, Converter] = {
    "Attention": _attention,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "Softmax": _softmax,
    "TensorScatter": _tensor_scatter,
}
