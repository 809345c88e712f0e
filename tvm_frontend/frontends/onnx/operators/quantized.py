"""Converts operators on integers with a scale and a zero point, of ONNX and of com.microsoft.

A weight whose integers, scale and zero point are constants becomes the float32 weight that they stand for while the
file is read, so every kernel of a linear layer applies to it. Activations are rounded as the file says: to nearest,
ties to even, and kept within the integers' range.

A product of integers is exact. This project's int8 kernels round activations by row and symmetrically, and its int4
kernels in groups, which none of these operators does, so the integers go through the float32 product: sums of integers
are exact in float32, in any order, as long as no partial sum exceeds 2²⁴, and a weight with larger sums is divided
along k until that holds.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import tvm
from onnx import TensorProto
from tvm import relax, te
from tvm.relax import op

from gpt.cli import UserError
from tvm_frontend.frontends.onnx.operators import layers, shapes
from tvm_frontend.frontends.onnx.operators.context import Converter, Reading, Value, refuse_unless
from tvm_frontend.frontends.onnx.operators.contrib import (
    attention_of_projection,
    inputs_of,
    number,
    outputs_of,
    sizes_of,
    transposed,
)
from tvm_frontend.frontends.onnx.operators.symbolic import FEW, Indexed, elements, is_number, is_one

EXACT = 2**24  # float32 holds every integer up to this
LARGEST = 255  # of the magnitudes of an 8-bit integer less its zero point
RANGES = {
    "int4": (-8, 7),
    "uint4": (0, 15),
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-(2**15), 2**15 - 1),
    "uint16": (0, 2**16 - 1),
}
HELD_AS = {"int4": "int8", "uint4": "uint8"}  # 4-bit integers are computed in bytes
INTEGERS = {
    TensorProto.INT4: "int4",
    TensorProto.UINT4: "uint4",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "uint8",
    TensorProto.INT16: "int16",
    TensorProto.UINT16: "uint16",
}


def array_of(reading: Reading, name: str) -> np.ndarray | None:
    """Give the numbers of a value that is a constant of the file, or the transpose of one; None for another."""
    value = reading.values[name]
    if not isinstance(value, Indexed):
        return _array_in(reading, value)
    if not isinstance(value, Indexed) or not all(map(is_number, value.shape)):
        return None
    shape = [int(size) for size in value.shape]
    if np.prod(shape, dtype=int) > FEW:
        return None
    numbers = [getattr(each, "value", each) for each in elements(value)]
    if any(isinstance(each, tvm.ir.Expr) for each in numbers):
        return None
    return np.array(numbers, HELD_AS.get(value.dtype, value.dtype)).reshape(shape)


def _array_in(reading: Reading, expr: relax.Expr) -> np.ndarray | None:
    if isinstance(expr, tvm.ir.GenericConst):
        return expr.value.numpy()
    if not isinstance(expr, relax.Var):
        return None
    known = reading.values[expr.name] if expr.name in reading.weights else None
    if isinstance(known, relax.Var) and known.same_as(expr):
        return reading.weights[expr.name]
    value = reading.builder.lookup_binding(expr)
    if not isinstance(value, relax.Call) or value.op != tvm.ir.Op.get("relax.permute_dims"):
        return None
    array = _array_in(reading, value.args[0])
    axes = value.attrs.axes
    return None if array is None else np.transpose(array, axes and [int(axis) for axis in axes])


def operand(reading: Reading, name: str) -> relax.Expr:
    """Give a scale, a zero point or integers as a tensor: one number as a constant [], 4 bits in bytes."""
    array = array_of(reading, name)
    if array is None:
        x = reading.tensor(name)
        if str(x.ty.dtype) in HELD_AS:
            raise UserError(f"{name!r} of type {x.ty.dtype} is not supported, only as a constant")
        return x
    array = array.astype(HELD_AS.get(str(array.dtype), array.dtype), copy=False)
    if array.size == 1:
        return relax.const(array.reshape(()), str(array.dtype))
    return (
        reading.tensor(name)
        if name in reading.weights and reading.weights[name] is array
        else reading.add_weight(f"{name}.values", array)
    )


def folded(reading: Reading, node: onnx.NodeProto, array: np.ndarray) -> Value:
    """Give a constant result of a node, by the result's name."""
    reading.add_constant(node.output[0], array)
    return reading.values[node.output[0]]


def spread(parameter: np.ndarray, shape: tuple[int, ...], axis: int, block: int) -> np.ndarray:
    """Make a scale or zero point broadcast to a shape: one for all, for each place of an axis, or for blocks of it."""
    if parameter.ndim <= 1 and parameter.size == 1:
        return parameter.reshape(())
    if block:
        return np.repeat(parameter, block, axis)[(slice(None),) * axis + (slice(shape[axis]),)]
    return parameter.reshape([-1 if each == axis else 1 for each in range(len(shape))])


def element_for(parameter: te.Tensor, index: tuple[Any, ...], axis: int, block: int) -> tvm.ir.Expr:
    """Give the scale or zero point of the element at an index: the same as `spread`."""
    if len(parameter.shape) == 0:
        return parameter()
    if len(parameter.shape) == 1:
        return parameter(0 if is_one(parameter.shape[0]) else index[axis])
    return parameter(*(tvm.tirx.floordiv(i, block) if each == axis else i for each, i in enumerate(index)))


def _axis_and_block(reading: Reading, scale: str, rank: int, attributes: dict[str, Any]) -> tuple[int, int]:
    """Give the axis of scales, from the front, and the length of their blocks, 0 for none."""
    block, axis = attributes.get("block_size", 0), attributes.get("axis", 1)
    per_tensor = len(reading.shape(scale)) == 0 or (len(reading.shape(scale)) == 1 and is_one(reading.shape(scale)[0]))
    if per_tensor:
        return 0, 0
    if not -rank <= axis < rank or (len(reading.shape(scale)) != (rank if block else 1)):
        raise UserError(
            f"a scale of shape {sizes_of(reading.shape(scale))} along axis {axis} of {rank} dimensions"
            f"{f' in blocks of {block}' if block else ''} is not supported"
        )
    return axis % rank, block


def _quantize_linear(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Convert QuantizeLinear: round x / scale, ties to even, add the zero point, and keep that within the range."""
    given = inputs_of(node, "x", "y_scale", "y_zero_point")
    zero = given.get("y_zero_point", "")
    asked = attributes.get("output_dtype", 0)
    dtype = reading.dtype(zero) if zero else INTEGERS.get(asked, f"number {asked}") if asked else "uint8"
    rank = len(reading.shape(given["x"]))
    axis, block = _axis_and_block(reading, given["y_scale"], rank, attributes)
    x, scale, offset = (array_of(reading, name) if name else None for name in (given["x"], given["y_scale"], zero))
    if x is not None and scale is not None and (offset is not None or not zero) and dtype in RANGES:
        lowest, highest = RANGES[dtype]
        y = np.rint(x.astype(np.float32) / spread(scale, x.shape, axis, block))
        y = y if offset is None else y + spread(offset.astype(np.float32), x.shape, axis, block)
        return folded(reading, node, np.clip(y, lowest, highest).astype(HELD_AS.get(dtype, dtype)))
    x = reading.tensor(given["x"])
    scale = operand(reading, given["y_scale"])
    whole = unmerged(reading, x) if not scale.ty.shape.values else x
    y = quantized(reading, whole, scale, operand(reading, zero) if zero else None, dtype, axis, block)
    return shaped_like(reading, y, x)


def unmerged(reading: Reading, x: relax.Expr) -> relax.Expr:
    """Give the [B, T, C] of which x [B·T, C] was made, as fused attention and linear layers take no other; else x."""
    return layers.unmerged(reading, x) if len(x.ty.shape.values) == 2 else x


def shaped_like(reading: Reading, y: relax.Expr, x: relax.Expr) -> relax.Expr:
    """Merge the dimensions of y [B, T, ...] again, if x is [B·T, ...]."""
    shape = [*x.ty.shape.values[:-1], y.ty.shape.values[-1]] if x.ty.shape.values else []
    return y if len(shape) == len(y.ty.shape.values) else reading.emit(op.reshape(y, shape))


def quantized(
    reading: Reading,
    x: relax.Expr,
    scale: relax.Expr | None,
    zero: relax.Expr | None,
    dtype: str,
    axis: int = 0,
    block: int = 0,
) -> relax.Expr:
    """Round x / scale (x itself if that is None) to integers of a type around a zero point, 0 if that is None."""
    if dtype not in RANGES:
        raise UserError(f"rounding to {dtype} is not supported, only to {', '.join(RANGES)}")
    bounds = [tvm.tirx.const(float(bound), "float32") for bound in RANGES[dtype]]

    def quantize(x: te.Tensor, *rest: te.Tensor) -> te.Tensor:
        parameters = iter(rest)
        scales = None if scale is None else next(parameters)
        zeros = None if zero is None else next(parameters)

        def at(*index: Any) -> tvm.ir.Expr:
            y = x(*index) if scales is None else x(*index) / element_for(scales, index, axis, block)
            y = tvm.tirx.nearbyint(y)
            if zeros is not None:
                y = y + tvm.tirx.Cast("float32", element_for(zeros, index, axis, block))
            return tvm.tirx.Cast(HELD_AS.get(dtype, dtype), te.min(te.max(y, bounds[0]), bounds[1]))

        return te.compute(x.shape, at, name="quantize")

    arguments = [x, *(each for each in (scale, zero) if each is not None)]
    return reading.builder.emit_te(quantize, *arguments, primfunc_name_hint="quantize")


def _dequantize_linear(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Convert DequantizeLinear: (x - zero point) · scale; of a constant, the weight that it stands for."""
    given = inputs_of(node, "x", "x_scale", "x_zero_point")
    zero = given.get("x_zero_point", "")
    refuse_other_types(reading, given["x"], "int32")
    rank = len(reading.shape(given["x"]))
    axis, block = _axis_and_block(reading, given["x_scale"], rank, attributes)
    x, scale, offset = (array_of(reading, name) if name else None for name in (given["x"], given["x_scale"], zero))
    if x is not None and scale is not None and (offset is not None or not zero):
        return folded(reading, node, dequantized_array(x, scale, offset, axis, block))
    x = operand(reading, given["x"])
    scale = operand(reading, given["x_scale"])
    whole = unmerged(reading, x) if not scale.ty.shape.values else x
    y = dequantized(reading, whole, scale, operand(reading, zero) if zero else None, axis, block)
    return shaped_like(reading, y, x)


def refuse_other_types(reading: Reading, name: str, *more: str) -> None:
    """Raise UserError if a value is not of integers of at most 16 bits, or of one of `more`."""
    if (dtype := reading.dtype(name)) not in (*RANGES, *more):
        raise UserError(f"{name!r} of type {dtype} is not supported, only {', '.join((*RANGES, *more))}")


def dequantized_array(
    x: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, axis: int = 0, block: int = 0
) -> np.ndarray:
    """Give (x - zero) · scale in float32, as ONNX Runtime computes it."""
    offset = 0 if zero is None else spread(zero.astype(np.int32), x.shape, axis, block)
    whole = x.astype(np.int32) - offset
    return whole.astype(np.float32) * spread(scale.astype(np.float32, copy=False), x.shape, axis, block)


def dequantized(
    reading: Reading, x: relax.Expr, scale: relax.Expr, zero: relax.Expr | None, axis: int = 0, block: int = 0
) -> relax.Expr:
    """Give (x - zero) · scale in float32."""

    def dequantize(x: te.Tensor, scale: te.Tensor, *zeros: te.Tensor) -> te.Tensor:
        def at(*index: Any) -> tvm.ir.Expr:
            whole = tvm.tirx.Cast("int32", x(*index))
            for each in zeros:
                whole = whole - tvm.tirx.Cast("int32", element_for(each, index, axis, block))
            return tvm.tirx.Cast("float32", whole) * element_for(scale, index, axis, block)

        return te.compute(x.shape, at, name="dequantize")

    arguments = [x, scale, *([] if zero is None else [zero])]
    return reading.builder.emit_te(dequantize, *arguments, primfunc_name_hint="dequantize")


def _dynamic_quantize_linear(
    reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]
) -> Value | tuple[Value, ...]:
    y, scale, zero = dynamically_quantized(reading, reading.tensor(node.input[0]))
    return outputs_of(node, y=y, y_scale=scale, y_zero_point=zero)


def dynamically_quantized(reading: Reading, x: relax.Expr) -> list[relax.Expr]:
    """Round x to uint8 over its whole range and 0; give the integers, their scale [] and their zero point []."""
    nothing, steps, one = (tvm.tirx.const(value, "float32") for value in (0.0, 255.0, 1.0))

    def scale_of(low: te.Tensor, high: te.Tensor) -> te.Tensor:
        width = te.max(high(), nothing) - te.min(low(), nothing)
        return te.compute((), lambda: tvm.tirx.Select(tvm.tirx.EQ(width, nothing), one, width / steps), name="scale")

    def zero_of(low: te.Tensor, scale: te.Tensor) -> te.Tensor:
        place = nothing - te.min(low(), nothing) / scale()
        kept = tvm.tirx.nearbyint(te.min(te.max(place, nothing), steps))
        return te.compute((), lambda: tvm.tirx.Cast("uint8", kept), name="zero_point")

    whole = unmerged(reading, x)
    low, high = reading.emit(op.min(whole)), reading.emit(op.max(whole))
    scale = reading.builder.emit_te(scale_of, low, high, primfunc_name_hint="scale")
    zero = reading.builder.emit_te(zero_of, low, scale, primfunc_name_hint="zero_point")
    return [shaped_like(reading, quantized(reading, whole, scale, zero, "uint8"), x), scale, zero]


def product(
    reading: Reading, a: relax.Expr, a_zero: relax.Expr | None, b: str, b_zero: str, turned: bool = False
) -> relax.Expr:
    """Give the int32 sums of (a - a_zero) · (b - b_zero), for 8-bit integers a [..., K] and b [K, N] or b [..., K, N].

    a_zero: of the shape [] or [1]. b: the name of the value, [N, K] if `turned`. b_zero: the name of one zero point or
    of one for each column, or "".
    """
    if a_zero is not None and not all(map(is_one, a_zero.ty.shape.values)):
        raise UserError(f"zero points of shape {sizes_of(a_zero.ty.shape.values)} of the left factor are not supported")
    refuse_other_types(reading, b)
    weight = array_of(reading, b)
    zeros = array_of(reading, b_zero) if b_zero else np.zeros((), np.int32)
    rank = len(a.ty.shape.values)
    if weight is None or weight.ndim != 2 or zeros is None or rank < 2:
        left = centred(reading, a, a_zero)
        right = centred(reading, reading.tensor(b), operand(reading, b_zero) if b_zero else None)
        return reading.emit(op.matmul(left, transposed(reading, right) if turned else right, out_dtype="int32"))
    weight = weight.T if turned else weight
    whole = weight.astype(np.int32) - spread(zeros.astype(np.int32).ravel(), weight.shape, 1, 0)
    x = reading.emit(op.astype(centred(reading, unmerged(reading, a), a_zero), "float32"))
    if len(x.ty.shape.values) == 2:  # the kernels of linear layers take three dimensions
        x = reading.emit(op.expand_dims(x, [0]))
    y = None
    for start, stop in exact_parts(whole):
        is_all = stop - start == len(whole)
        part = x if is_all else reading.emit(op.strided_slice(x, [len(x.ty.shape.values) - 1], [start], [stop]))
        name = f"{b}.less_{b_zero}_{start}_{stop}" + (".turned" if turned else "")
        factor = reading.add_weight(name, np.ascontiguousarray(whole[start:stop], np.float32))
        sums = reading.emit(op.astype(reading.emit(op.matmul(part, factor)), "int32"))
        y = sums if y is None else reading.emit(op.add(y, sums))
    return shaped_like(reading, y, a)


def exact_parts(whole: np.ndarray) -> list[tuple[int, int]]:
    """Divide integers [K, N] along K so that no sum of a part's products with LARGEST in magnitude exceeds EXACT."""
    sums = np.abs(whole).cumsum(0, dtype=np.int64)  # [K, N]
    parts, start, before = [], 0, np.zeros(whole.shape[1], np.int64)
    while start < len(whole):
        within = ((sums[start:] - before) * LARGEST <= EXACT).all(1)
        stop = len(whole) if within.all() else start + int(np.argmin(within))
        parts.append((start, stop))
        start, before = stop, sums[stop - 1]
    return parts


def centred(reading: Reading, x: relax.Expr, zero: relax.Expr | None) -> relax.Expr:
    """Give x less its zero point, in int32."""
    whole = reading.emit(op.astype(x, "int32"))
    return whole if zero is None else reading.emit(op.subtract(whole, reading.emit(op.astype(zero, "int32"))))


def _matmul_integer(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    given = inputs_of(node, "A", "B", "a_zero_point", "b_zero_point")
    return _product_of(reading, given)


def _product_of(reading: Reading, given: dict[str, str], turned: bool = False) -> relax.Expr:
    """Multiply the inputs A and B of a node, less their zero points."""
    refuse_other_types(reading, given["A"])
    zero = operand(reading, given["a_zero_point"]) if "a_zero_point" in given else None
    return product(reading, operand(reading, given["A"]), zero, given["B"], given.get("b_zero_point", ""), turned)


def _scaled(reading: Reading, sums: relax.Expr, *scales: relax.Expr, bias: relax.Expr | None = None) -> relax.Expr:
    """Give sums · (the product of the scales) + bias, in float32."""
    scale = scales[0]
    for more in scales[1:]:
        scale = reading.emit(op.multiply(scale, more))
    y = reading.emit(op.multiply(reading.emit(op.astype(sums, "float32")), scale))
    return y if bias is None else reading.emit(op.add(y, bias))


def _matmul_integer_to_float(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    given = inputs_of(node, "A", "B", "a_scale", "b_scale", "a_zero_point", "b_zero_point", "bias")
    scales = [operand(reading, given[name]) for name in ("a_scale", "b_scale")]
    bias = reading.tensor(given["bias"]) if "bias" in given else None
    return _scaled(reading, _product_of(reading, given), *scales, bias=bias)


def _dynamic_quantize_matmul(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    given = inputs_of(node, "A", "B", "b_scale", "b_zero_point", "bias")
    a, scale, zero = dynamically_quantized(reading, reading.tensor(given["A"]))
    sums = product(reading, a, zero, given["B"], given.get("b_zero_point", ""))
    bias = reading.tensor(given["bias"]) if "bias" in given else None
    return _scaled(reading, sums, scale, operand(reading, given["b_scale"]), bias=bias)


def _q_linear_matmul(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    given = inputs_of(node, "A", "a_scale", "a_zero_point", "B", "b_scale", "b_zero_point", "y_scale", "y_zero_point")
    scales = [operand(reading, given[name]) for name in ("a_scale", "b_scale", "y_scale")]
    _refuse_many(scales[0], scales[2])
    ratio = reading.emit(op.divide(reading.emit(op.multiply(*scales[:2])), scales[2]))
    y = _scaled(reading, _product_of(reading, given), ratio)
    zero = given["y_zero_point"]
    return quantized(reading, y, None, operand(reading, zero), reading.dtype(zero))


def _refuse_many(*scales: relax.Expr) -> None:
    for scale in scales:
        if not all(map(is_one, scale.ty.shape.values)):
            raise UserError(f"a scale of shape {sizes_of(scale.ty.shape.values)} is not supported, only one number")


def _q_gemm(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Convert QGemm: alpha · a · b + c of integers, as floats, or rounded if a scale of the result is given."""
    given = inputs_of(
        node, "A", "a_scale", "a_zero_point", "B", "b_scale", "b_zero_point", "C", "y_scale", "y_zero_point"
    )
    refuse_unless(attributes, transA=0)
    sums = _product_of(reading, given, bool(attributes.get("transB", 0)))
    if "C" in given:
        sums = reading.emit(op.add(sums, operand(reading, given["C"])))
    scales = [operand(reading, given[name]) for name in ("a_scale", "b_scale")]
    _refuse_many(scales[0])
    alpha = [relax.const(attributes["alpha"], "float32")] if attributes.get("alpha", 1.0) != 1 else []
    if "y_scale" not in given:
        return _scaled(reading, sums, *alpha, *scales)
    ratio = reading.emit(op.multiply(*scales))
    ratio = reading.emit(op.multiply(*alpha, ratio)) if alpha else ratio
    y = _scaled(reading, sums, reading.emit(op.divide(ratio, operand(reading, given["y_scale"]))))
    zero = given.get("y_zero_point", "")
    return quantized(
        reading, y, None, operand(reading, zero) if zero else None, reading.dtype(zero) if zero else "uint8"
    )


def _q_attention(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value | tuple[Value, ...]:
    """Convert QAttention: Attention whose projection is a product of integers."""
    given = inputs_of(
        node, "A", "B", "bias", "a_scale", "b_scale", "mask_index", "a_zero_point", "b_zero_point", "past"
    )
    scales = [operand(reading, given[name]) for name in ("a_scale", "b_scale")]
    qkv = _scaled(reading, _product_of(reading, given), *scales, bias=reading.tensor(given["bias"]))
    return attention_of_projection(reading, node, attributes, given, qkv)


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Give the integers of `bits` bits that the bytes of the last axis hold, the lowest bits first."""
    parts = [packed >> shift & (2**bits - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(*packed.shape[:-1], -1)


def _constant_of(reading: Reading, name: str) -> np.ndarray:
    if (array := array_of(reading, name)) is None:
        raise UserError(f"{name!r} is computed, and only constants are supported there")
    return array


def block_weight(
    reading: Reading, packed: str, scales: str, zeros: str, bits: int, shape: tuple[int, ...], axis: int, block: int
) -> relax.Expr:
    """Give the float32 weight of integers of few bits, with a scale for each block of an axis.

    Bytes hold several of the last axis, of the weight's integers and of the zero points'. Without zero points it is the
    middle of the range if the integers are packed in bytes, 8 for 4 bits, and 0 for ONNX's own 4-bit types.
    """
    array, scale = _constant_of(reading, packed), _constant_of(reading, scales)
    in_bytes = reading.dtype(packed) == "uint8"
    parameters = [-(-size // block) if each == axis else size for each, size in enumerate(shape)]
    if zeros and reading.dtype(zeros) == "uint8":
        packed_zeros = _constant_of(reading, zeros).reshape(*parameters[:-1], -1)
        zero = unpacked(packed_zeros, bits)[..., : parameters[-1]]
    elif zeros:
        zero = _constant_of(reading, zeros).reshape(parameters)
    else:
        zero = np.array(2 ** (bits - 1) if in_bytes else 0)
    whole = unpacked(array.reshape(*shape[:-1], -1), bits)[..., : shape[-1]] if in_bytes else array
    zero = spread(zero.astype(np.float32), shape, axis, block)
    factor = spread(scale.reshape(parameters).astype(np.float32), shape, axis, block)
    return reading.add_weight(f"{packed}.{scales}.dequantized", (whole.astype(np.float32) - zero) * factor)


def _matmul_n_bits(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Convert MatMulNBits to a product by the float32 weight that it stands for.

    Its accuracy_level only allows engines to round more; what is computed here is the most accurate level.
    """
    given = inputs_of(node, "A", "B", "scales", "zero_points", "g_idx", "bias")
    if "g_idx" in given:
        raise UserError(f"input g_idx ({given['g_idx']!r}) is not supported")
    bits, shape = _bits_of(attributes), (number(attributes, "N"), number(attributes, "K"))
    zeros = given.get("zero_points", "")
    weight = block_weight(reading, given["B"], given["scales"], zeros, bits, shape, 1, number(attributes, "block_size"))
    y = op.matmul(reading.tensor(given["A"]), reading.emit(op.permute_dims(weight)))
    return op.add(reading.emit(y), reading.tensor(given["bias"])) if "bias" in given else y


def _bits_of(attributes: dict[str, Any]) -> int:
    if (bits := attributes.get("bits", 4)) not in (2, 4, 8):
        raise UserError(f"attribute bits={bits} is not supported, only 2, 4 and 8")
    return bits


def _gather_block_quantized(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Convert GatherBlockQuantized to a Gather of the float32 weight that its table stands for."""
    given = inputs_of(node, "data", "indices", "scales", "zero_points")
    bits, block = _bits_of(attributes), attributes.get("block_size", 128)
    shape = [int(size) for size in reading.shape(given["data"])]
    if reading.dtype(given["data"]) == "uint8":
        shape[-1] *= 8 // bits
    axis = attributes.get("quantize_axis", 1) % len(shape)
    zeros = given.get("zero_points", "")
    table = block_weight(reading, given["data"], given["scales"], zeros, bits, tuple(shape), axis, block)
    gather = onnx.helper.make_node("Gather", [table.name, given["indices"]], list(node.output))
    return shapes.CONVERTERS["Gather"](reading, gather, {"axis": attributes.get("gather_axis", 0)})


def _q_linear_of(function: Callable[[relax.Expr, relax.Expr], relax.Expr]) -> Converter:
    """Convert an operator on two factors of integers, each with a scale and a zero point, to rounded integers."""

    def convert(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
        a, b, (scale, zero) = node.input[:3], node.input[3:6], [*node.input[6:], ""][:2]
        y = reading.emit(function(*(_as_floats(reading, *names) for names in (a, b))))
        return _rounded(reading, y, scale, zero, reading.dtype(a[0]))

    return convert


def _q_linear_softmax(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Convert QLinearSoftmax. ONNX Runtime computes it by a table of integers, and may be one unit off."""
    x, (scale, zero) = node.input[:3], [*node.input[3:], ""][:2]
    if attributes["opset"] < 13 and attributes.get("axis", -1) not in (-1, len(reading.shape(x[0])) - 1):
        raise UserError(f"axis={attributes['axis']} of opset {attributes['opset']} is not supported, only the last one")
    y = reading.emit(op.nn.softmax(_as_floats(reading, *x), axis=attributes.get("axis", -1)))
    return _rounded(reading, y, scale, zero, reading.dtype(x[0]))


def _as_floats(reading: Reading, x: str, scale: str, zero: str) -> relax.Expr:
    """Give what integers with one scale and one zero point, or none, stand for."""
    factor, offset = operand(reading, scale), operand(reading, zero) if zero else None
    _refuse_many(factor, *([offset] if offset is not None else []))
    return dequantized(reading, operand(reading, x), factor, offset)


def _rounded(reading: Reading, y: relax.Expr, scale: str, zero: str, dtype: str) -> relax.Expr:
    return quantized(reading, y, operand(reading, scale), operand(reading, zero) if zero else None, dtype)


CONVERTERS: dict[str, Converter] = {
    "DequantizeLinear": _dequantize_linear,
    "DynamicQuantizeLinear": _dynamic_quantize_linear,
    "MatMulInteger": _matmul_integer,
    "QLinearMatMul": _q_linear_matmul,
    "QuantizeLinear": _quantize_linear,
    "com.microsoft.DequantizeLinear": _dequantize_linear,
    "com.microsoft.DynamicQuantizeMatMul": _dynamic_quantize_matmul,
    "com.microsoft.GatherBlockQuantized": _gather_block_quantized,
    "com.microsoft.MatMulIntegerToFloat": _matmul_integer_to_float,
    "com.microsoft.MatMulNBits": _matmul_n_bits,
    "com.microsoft.QAttention": _q_attention,
    "com.microsoft.QGemm": _q_gemm,
    "com.microsoft.QLinearAdd": _q_linear_of(op.add),
    "com.microsoft.QLinearMul": _q_linear_of(op.multiply),
    "com.microsoft.QLinearSoftmax": _q_linear_softmax,
    "com.microsoft.QuantizeLinear": _quantize_linear,
}
