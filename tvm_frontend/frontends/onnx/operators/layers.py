"""Converts operators that are a layer: products, LayerNorm, GELU, softmax."""

from typing import Any

import numpy as np
import onnx
import tvm
from tvm import relax
from tvm.relax import op

from gpt.cli import UserError
from tvm_frontend.frontends.onnx.operators.context import Converter, Reading, Value, refuse_unless
from tvm_frontend.frontends.onnx.operators.shapes import before_reshape


def _matmul(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    return op.matmul(*map(reading.tensor, node.input))


def _gemm(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Convert a·b + c, a linear layer on [B·T, C], to the one on [B, T, C] that the passes know."""
    refuse_unless(attributes, alpha=1.0, beta=1.0, transA=0)
    a, b = reading.tensor(node.input[0]), reading.tensor(node.input[1])
    x = _unmerged(reading, a)
    y = reading.emit(op.matmul(x, reading.emit(op.permute_dims(b)) if attributes.get("transB") else b))
    if len(node.input) > 2:
        y = reading.emit(op.add(y, reading.tensor(node.input[2])))
    return y if x is a else op.reshape(y, [a.ty.shape.values[0], y.ty.shape.values[-1]])


def _unmerged(reading: Reading, a: relax.Expr) -> relax.Expr:
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


CONVERTERS: dict[str, Converter] = {
    "Gelu": _gelu,
    "Gemm": _gemm,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "Softmax": _softmax,
}
