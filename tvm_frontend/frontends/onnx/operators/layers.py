"""Converts operators that are a layer: products, LayerNorm, GELU, softmax, attention, the rows of a cache."""

from functools import reduce
from math import prod
from typing import Any

import numpy as np
import onnx
import tvm
from tvm import relax
from tvm.relax import op

from gpt.cli import UserError
from tvm_frontend.frontends.onnx.operators.context import (
    Converter,
    Reading,
    Value,
    axes_of,
    axis_in,
    computed,
    given,
    known,
    refuse_unless,
)
from tvm_frontend.frontends.onnx.operators.shapes import before_reshape
from tvm_frontend.frontends.onnx.operators.symbolic import (
    Indexed,
    elements,
    equal,
    is_number,
    listed,
    simplified,
)


def _matmul(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    left, right = map(reading.shape, node.input)
    if not left or not right:
        raise UserError("a product of a single number")
    reading.same_size(left[-1], right[-2] if len(right) > 1 else right[-1])
    reading.broadcast(left[:-2], right[:-2])
    return op.matmul(*map(reading.tensor, node.input))


def _gemm(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Convert alpha·a·b + beta·c, a linear layer on [B·T, C], to the one on [B, T, C] that the passes know."""
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    a, b = reading.tensor(node.input[0]), reading.tensor(node.input[1])
    a = reading.emit(op.permute_dims(a)) if attributes.get("transA") else a
    x = unmerged(reading, a)
    b = reading.emit(op.permute_dims(b)) if attributes.get("transB") else b
    reading.same_size(x.ty.shape.values[-1], b.ty.shape.values[0])
    y = _scaled(reading, reading.emit(op.matmul(x, b)), alpha)
    rows = [a.ty.shape.values[0], y.ty.shape.values[-1]]
    if given(node, 2):
        c = _scaled(reading, reading.tensor(node.input[2]), beta)
        if len(c.ty.shape.values) == 2 and x is not a:  # of [B·T, N] or [1, N]
            y, x = reading.emit(op.reshape(y, rows)), a
        reading.broadcast(list(y.ty.shape.values), list(c.ty.shape.values))
        y = reading.emit(op.add(y, c))
    return y if x is a else op.reshape(y, rows)


def _scaled(reading: Reading, x: relax.Expr, factor: float) -> relax.Expr:
    return x if factor == 1.0 else reading.emit(op.multiply(x, relax.const(factor, str(x.ty.dtype))))


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
    rank = len(x.ty.shape.values)
    axes = list(range(axis_in(attributes.get("axis", -1), rank), rank))
    shape = list(x.ty.shape.values)[axes[0] :]
    gain = _of_shape(reading, gain, shape)
    if given(node, 2):
        bias = _of_shape(reading, reading.tensor(node.input[2]), shape)
    elif len(axes) == 1 and is_number(shape[0]):  # Relax's operator always adds one
        C = int(shape[0])
        bias = reading.add_weight(f"zeros_{C}", np.zeros(C, str(gain.ty.dtype)))
    else:
        bias = reading.emit(op.zeros(shape, str(gain.ty.dtype)))
    axes = [-1] if len(axes) == 1 else axes
    return op.nn.layer_norm(x, gain, bias, axes=axes, epsilon=attributes.get("epsilon", 1e-5))


def _of_shape(reading: Reading, x: relax.Expr, shape: list[Any]) -> relax.Expr:
    """Repeat a tensor to a shape, if it is not of it."""
    found = list(x.ty.shape.values)
    if len(found) == len(shape) and all(equal(*sizes) for sizes in zip(found, shape, strict=True)):
        return x
    return reading.emit(op.broadcast_to(x, reading.broadcast(found, shape)))


def _rms_norm(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Convert x / √(mean(x²) + epsilon) · gain, over all axes from one on."""
    refuse_unless(attributes, stash_type=1)
    x, gain = reading.tensor(node.input[0]), reading.tensor(node.input[1])
    rank, dtype = len(x.ty.shape.values), str(x.ty.dtype)
    axes = list(range(axis_in(attributes.get("axis", -1), rank), rank))
    mean = reading.emit(op.mean(reading.emit(op.multiply(x, x)), axes, keepdims=True))
    mean = reading.emit(op.add(mean, relax.const(attributes.get("epsilon", 1e-5), dtype)))
    reading.broadcast(list(x.ty.shape.values), list(gain.ty.shape.values))
    return op.multiply(reading.emit(op.divide(x, reading.emit(op.sqrt(mean)))), gain)


def _rotary_embedding(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Convert ai.onnx RotaryEmbedding of x [B, nh, T, hs] or [B, T, nh · hs].

    cos and sin: [rows, r / 2], picked by the positions [B, T] where they are given, else [B, T, r / 2]; r of the hs
    numbers of a head are rotated: pairs of one half and the other, or of neighbours.
    """
    x = reading.tensor(node.input[0])
    shape, heads = list(x.ty.shape.values), attributes.get("num_heads", 0)
    if len(shape) == 3:
        if heads < 1 or not is_number(shape[2]) or int(shape[2]) % heads:
            raise UserError(f"num_heads={heads} of {shape[2]} channels")
        x = reading.emit(op.reshape(x, [*shape[:2], heads, int(shape[2]) // heads]))
    else:
        x = reading.emit(op.permute_dims(x, [0, 2, 1, 3]))  # [B, T, nh, hs]
    size = known(x.ty.shape.values[3], "the size of a head")
    rotated = attributes.get("rotary_embedding_dim", 0) or size
    tables = [reading.tensor(name) for name in node.input[1:3]]
    if given(node, 3):
        places = reading.tensor(node.input[3])
        tables = [reading.emit(op.take(table, places, axis=0, mode="clip")) for table in tables]
    for table in tables:
        if len(table.ty.shape.values) != 3 or not equal(table.ty.shape.values[2] * 2, rotated):
            raise UserError(f"cos and sin of shape {list(table.ty.shape.values)} for {rotated} numbers")
        reading.broadcast(list(x.ty.shape.values[:2]), list(table.ty.shape.values[:2]))
    neighbours = bool(attributes.get("interleaved", 0))
    cos, sin = (reading.emit(op.expand_dims(table, [2, 4] if neighbours else [2])) for table in tables)
    kept = None
    if rotated < size:
        parts = reading.emit(op.split(x, [rotated], axis=3))
        x, kept = (reading.emit(relax.TupleGetItem(parts, i)) for i in range(2))
    if neighbours:
        paired = [*x.ty.shape.values[:3], rotated // 2, 2]
        x = reading.emit(op.reshape(x, paired))
    halves = reading.emit(op.split(x, 2, axis=-1))
    first, second = (reading.emit(relax.TupleGetItem(halves, i)) for i in range(2))

    def of(left: relax.Expr, by: relax.Expr, right: relax.Expr, by_too: relax.Expr, join: Any) -> relax.Expr:
        return reading.emit(join(reading.emit(op.multiply(left, by)), reading.emit(op.multiply(right, by_too))))

    y = reading.emit(
        op.concat([of(first, cos, second, sin, op.subtract), of(first, sin, second, cos, op.add)], axis=-1)
    )
    if neighbours:
        y = reading.emit(op.reshape(y, [*paired[:3], rotated]))
    if kept is not None:
        y = reading.emit(op.concat([y, kept], axis=3))
    return op.reshape(y, shape) if len(shape) == 3 else op.permute_dims(y, [0, 2, 1, 3])


def _gelu(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    exact = attributes.get("approximate", b"none") == b"none"
    return (op.nn.gelu if exact else op.nn.gelu_tanh)(reading.tensor(node.input[0]))


def _softmax(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Convert Softmax and LogSoftmax; before opset 13 they take all axes from one on as one."""
    x = reading.tensor(node.input[0])
    shape = list(x.ty.shape.values)
    curve = op.nn.softmax if node.op_type == "Softmax" else op.nn.log_softmax
    axis = axis_in(attributes.get("axis", 1 if reading.opset < 13 else -1), len(shape))
    if reading.opset >= 13 or axis == len(shape) - 1:
        return curve(x, axis=attributes.get("axis", -1) if reading.opset >= 13 else -1)
    rows = [simplified(prod(shape[:axis])), simplified(prod(shape[axis:]))]
    return op.reshape(reading.emit(curve(reading.emit(op.reshape(x, rows)), axis=-1)), shape)


def _dropout(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> tuple[Value, ...]:
    training = given(node, 2)
    if training and reading.numbers(training) != [0]:
        raise UserError("training is not supported")
    mask = Indexed(reading.shape(node.input[0]), "bool", lambda *_: tvm.tirx.const(True, "bool"))
    return reading.values[node.input[0]], mask


def _reduce(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Convert a sum, mean, product or norm along axes, all of them if none is named."""
    shape, dtype = reading.shape(node.input[0]), reading.dtype(node.input[0])
    axes = axes_of(reading, node, attributes)
    keep = bool(attributes.get("keepdims", 1))
    if not axes:
        if attributes.get("noop_with_empty_axes", 0):
            return _noop(reading, node)
        axes = list(range(len(shape)))
    axes = sorted(axis_in(axis, len(shape)) for axis in axes)
    of_formula = {"ReduceMax": tvm.tirx.Max, "ReduceMin": tvm.tirx.Min, "ReduceSum": _plus, "ReduceProd": _times}
    found = reading.indexed(node.input[0])
    folds = node.op_type in of_formula and len(shape) <= 1 and dtype in ("int64", "int32")
    if found and folds and all(map(is_number, shape)):
        values = [tvm.tirx.const(e, "int64") if is_number(e) else e for e in elements(found[0])]
        folded = simplified(reduce(of_formula[node.op_type], values)) if values else 0
        return listed([folded], scalar=not (keep and shape), dtype=dtype)
    return _reduced(reading, node.op_type, reading.tensor(node.input[0]), axes, keep)


def _noop(reading: Reading, node: onnx.NodeProto) -> Value:
    """Give what a reduction along no axis makes of each single number."""
    x = reading.tensor(node.input[0])
    if node.op_type in ("ReduceL1", "ReduceL2"):
        return op.abs(x)
    if node.op_type == "ReduceSumSquare":
        return op.multiply(x, x)
    if node.op_type == "ReduceLogSum":
        return op.log(x)
    return reading.values[node.input[0]]


def _plus(x: Any, y: Any) -> Any:
    return x + y


def _times(x: Any, y: Any) -> Any:
    return x * y


def _reduced(reading: Reading, name: str, x: relax.Expr, axes: list[int], keep: bool) -> relax.Expr:
    emit = reading.emit
    dtype = str(x.ty.dtype)
    if dtype == "bool":
        return op.astype(emit(_reduced(reading, name, emit(op.astype(x, "int8")), axes, keep)), "bool")
    if name == "ReduceMean" and not dtype.startswith("float"):
        raise UserError(f"the mean of {dtype} is not supported")
    if name == "ReduceLogSumExp":
        largest = emit(op.max(x, axes, True))
        total = emit(op.sum(emit(op.exp(emit(op.subtract(x, largest)))), axes, keep))
        largest = largest if keep else emit(op.squeeze(largest, axes))
        return op.add(emit(op.log(total)), largest)
    if name in ("ReduceL2", "ReduceSumSquare"):
        x = emit(op.multiply(x, x))
    elif name == "ReduceL1":
        x = emit(op.abs(x))
    function = {"ReduceMean": op.mean, "ReduceMax": op.max, "ReduceMin": op.min, "ReduceProd": op.prod}.get(
        name, op.sum
    )
    y = emit(function(x, axes, keep))
    return op.sqrt(y) if name == "ReduceL2" else op.log(y) if name == "ReduceLogSum" else y


def _arg(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Convert ArgMax and ArgMin: the place of the first such number or, where asked for, of the last."""
    x = reading.tensor(node.input[0])
    shape = list(x.ty.shape.values)
    axis, keep = axis_in(attributes.get("axis", 0), len(shape)), bool(attributes.get("keepdims", 1))
    last = bool(attributes.get("select_last_index", 0))
    x = reading.emit(op.flip(x, axis)) if last else x
    place = reading.emit((op.argmax if node.op_type == "ArgMax" else op.argmin)(x, axis, keep))
    place = place if str(place.ty.dtype) == "int64" else reading.emit(op.astype(place, "int64"))
    if not last:
        return place
    end = reading.emit(computed(reading, listed([simplified(shape[axis] - 1)], scalar=True)))
    return op.subtract(end, place)


def _einsum(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    equation = attributes["equation"].decode().replace(" ", "")
    sizes: dict[str, Any] = {}
    for name, letters in zip(node.input, equation.split("->")[0].split(","), strict=False):
        shape = reading.shape(name)
        if len(shape) != len(letters):
            raise UserError(f"equation {equation!r} of {name!r} with {len(shape)} dimensions is not supported")
        for letter, size in zip(letters, shape, strict=True):
            sizes[letter] = reading.same_size(sizes.get(letter, size), size)
    return op.einsum(tuple(map(reading.tensor, node.input)), equation)


REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
CONVERTERS: dict[str, Converter] = {
    "ArgMax": _arg,
    "ArgMin": _arg,
    "Dropout": _dropout,
    "Einsum": _einsum,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "LayerNormalization": _layer_norm,
    "LogSoftmax": _softmax,
    "MatMul": _matmul,
    "RMSNormalization": _rms_norm,
    "RotaryEmbedding": _rotary_embedding,
    "Softmax": _softmax,
    **{f"Reduce{name}": _reduce for name in REDUCTIONS},
}
