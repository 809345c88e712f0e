"""Converts operators that make shapes, count, and move elements without changing them."""

from itertools import accumulate
from math import prod
from typing import Any

import onnx
import tvm
import tvm_ffi
from tvm import relax, te
from tvm.relax import op

from gpt.cli import UserError
from tvm_frontend.frontends.onnx.operators.context import Converter, Reading, Value, computed, refuse_unless
from tvm_frontend.frontends.onnx.operators.symbolic import (
    LARGE,
    Indexed,
    bind_sizes,
    depends_on,
    elements,
    expression,
    is_number,
    is_one,
    listed,
    position_symbols,
    simplified,
)


def _shape(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    return listed(reading.shape(node.input[0])[attributes.get("start", 0) : attributes.get("end")])


def _range(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    start, stop, step = (reading.integers(name)[0] for name in node.input)
    if not is_number(step) or step < 1:
        raise UserError(f"step {step} is not supported, only numbers of at least 1")
    return Indexed([simplified((stop - start + step - 1) // step)], "int64", lambda i: start + i * step)


def _constant_of_shape(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    array = onnx.numpy_helper.to_array(attributes["value"]) if "value" in attributes else None
    value, dtype = (0.0, "float32") if array is None else (array.item(), str(array.dtype))
    return Indexed(reading.integers(node.input[0]), dtype, lambda *_: tvm.tirx.const(value, dtype))


def _trilu(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    (x,) = _followed(reading, node.input[0])
    k = reading.integers(node.input[1])[0] if len(node.input) > 1 else 0
    upper = attributes.get("upper", 1)

    def at(*index: Any) -> Any:
        row, column = (expression(position, "int64") for position in index[-2:])
        kept = row + k <= column if upper else column <= row + k
        return tvm.tirx.Select(kept, expression(x.at(*index), x.dtype), tvm.tirx.const(0, x.dtype))

    return Indexed(x.shape, x.dtype, at)


def _cumulative_sum(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Sum up equal numbers, as GPT-2's count of the documents in a sequence does, in which none begins."""
    refuse_unless(attributes, exclusive=0, reverse=0)
    (x,), (axis,) = _followed(reading, node.input[0]), reading.integers(node.input[1])
    axis %= len(x.shape)
    positions, analyzer = position_symbols(x.shape)
    if depends_on(analyzer.simplify(expression(x.at(*positions), x.dtype)), [positions[axis]]):
        raise UserError("only sums of equal numbers are supported")

    def at(*index: Any) -> Any:
        number = analyzer.simplify(expression(x.at(*index[:axis], positions[axis], *index[axis + 1 :]), x.dtype))
        return number * (index[axis] + 1)

    return Indexed(x.shape, x.dtype, at)


def _followed(reading: Reading, *names: str) -> list[Indexed]:
    if (found := reading.indexed(*names)) is None:
        raise UserError(f"{', '.join(map(repr, names))}: only values that follow from shapes are supported")
    return found


def _squeeze(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    shape = reading.shape(node.input[0])
    if len(node.input) > 1:
        axes = [axis % len(shape) for axis in reading.integers(node.input[1])]
    else:
        axes = [axis for axis, dim in enumerate(shape) if is_one(dim)]
    if found := reading.indexed(node.input[0]):
        return _without(found[0], axes)
    return op.squeeze(reading.tensor(node.input[0]), axes)


def _without(x: Indexed, axes: list[int]) -> Indexed:
    def at(*index: Any) -> Any:
        rest = iter(index)
        return x.at(*(0 if axis in axes else next(rest) for axis in range(len(x.shape))))

    return Indexed([dim for axis, dim in enumerate(x.shape) if axis not in axes], x.dtype, at)


def _unsqueeze(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    axes = reading.integers(node.input[1])
    if not (found := reading.indexed(node.input[0])):
        return op.expand_dims(reading.tensor(node.input[0]), axes)
    (x,) = found
    rank = len(x.shape) + len(axes)
    axes = [axis % rank for axis in axes]
    rest = iter(x.shape)
    shape = [1 if axis in axes else next(rest) for axis in range(rank)]
    return Indexed(shape, x.dtype, lambda *index: x.at(*(i for axis, i in enumerate(index) if axis not in axes)))


def _expand(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    wanted = reading.integers(node.input[1])
    if found := reading.indexed(node.input[0]):
        return expanded(found[0], broadcast(found[0].shape, wanted))
    return op.broadcast_to(reading.tensor(node.input[0]), broadcast(reading.shape(node.input[0]), wanted))


def broadcast(*shapes: list[Any]) -> list[Any]:
    """Give the shape that several broadcast to; of two dimensions, the first that is not known to be 1."""
    rank = max(map(len, shapes))
    padded = [[1] * (rank - len(shape)) + list(shape) for shape in shapes]
    return [next((dim for dim in dims if not is_one(dim)), 1) for dims in zip(*padded, strict=True)]


def expanded(x: Indexed, shape: list[Any]) -> Indexed:
    """Repeat the value to a shape."""
    behind = len(shape) - len(x.shape)
    return Indexed(
        shape,
        x.dtype,
        lambda *index: x.at(*(0 if is_one(dim) else i for dim, i in zip(x.shape, index[behind:], strict=True))),
    )


def _concat(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    pieces = reading.indexed(*node.input)
    if pieces is None:
        return op.concat([reading.tensor(name) for name in node.input], axis=attributes["axis"])
    if all(len(piece.shape) == 1 and is_number(piece.shape[0]) for piece in pieces):
        return listed([item for piece in pieces for item in elements(piece)], dtype=pieces[0].dtype)
    axis = attributes["axis"] % len(pieces[0].shape)
    joined = pieces[-1]
    for piece in pieces[-2::-1]:
        joined = _joined(piece, joined, axis)
    return joined


def _joined(first: Indexed, second: Indexed, axis: int) -> Indexed:
    """Join two values along an axis: to one formula, if the second counts on where the first ends."""
    length = first.shape[axis]

    def behind(*index: Any) -> Any:
        return expression(second.at(*index[:axis], simplified(index[axis] - length), *index[axis + 1 :]), second.dtype)

    def either(*index: Any) -> Any:
        if is_number(index[axis]) and is_number(length):
            return first.at(*index) if int(index[axis]) < int(length) else behind(*index)
        return tvm.tirx.Select(index[axis] < length, expression(first.at(*index), first.dtype), behind(*index))

    positions, analyzer = position_symbols(first.shape)
    same = analyzer.can_prove_equal(expression(first.at(*positions), first.dtype), behind(*positions))
    shape = [*first.shape[:axis], simplified(length + second.shape[axis]), *first.shape[axis + 1 :]]
    return Indexed(shape, first.dtype, behind if same else either)


def _slice(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    starts, stops = (reading.integers(name) for name in node.input[1:3])
    shape = reading.shape(node.input[0])
    axes = reading.integers(node.input[3]) if len(node.input) > 3 else list(range(len(starts)))
    axes = [axis % len(shape) for axis in axes]
    if len(node.input) > 4 and any(step != 1 for step in reading.integers(node.input[4])):
        raise UserError(f"steps {reading.integers(node.input[4])} are not supported, only 1")
    starts, stops = (
        [_slice_bound(position, shape[axis]) for position, axis in zip(positions, axes, strict=True)]
        for positions in (starts, stops)
    )
    stops = [  # an end before the start makes an empty piece
        max(start, stop) if is_number(start) and is_number(stop) else stop
        for start, stop in zip(starts, stops, strict=True)
    ]
    if not (found := reading.indexed(node.input[0])):
        return op.strided_slice(reading.tensor(node.input[0]), axes, starts, stops, assume_inbound=True)
    (x,) = found
    first = dict(zip(axes, starts, strict=True))
    sizes = {axis: simplified(stop - first[axis]) for axis, stop in zip(axes, stops, strict=True)}
    return Indexed(
        [sizes.get(axis, dim) for axis, dim in enumerate(shape)],
        x.dtype,
        lambda *index: x.at(*(simplified(i + first.get(axis, 0)) for axis, i in enumerate(index))),
    )


def _slice_bound(position: Any, size: Any) -> Any:
    """Resolve a bound of a slice, counted from 0: a negative one counts from the end, and none is beyond it."""
    if not is_number(position):
        return position
    if is_number(size):
        return min(max(position + size if position < 0 else position, 0), size)
    if abs(position) >= LARGE:
        return size if position > 0 else 0
    if abs(position) > 1:  # any length of at least 1 has a first and a last position
        raise UserError(f"position {position} of {getattr(size, 'name', size)} is not supported, as there may be fewer")
    return size - 1 if position < 0 else position


def _split(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    x, axis = reading.tensor(node.input[0]), attributes.get("axis", 0)
    if len(node.output) == 1:
        return x
    if len(node.input) > 1:
        parts: int | list[int] = list(accumulate(reading.integers(node.input[1])))[:-1]
    else:
        parts = attributes.get("num_outputs", len(node.output))
    pieces = reading.emit(op.split(x, parts, axis))
    return tuple(relax.TupleGetItem(pieces, i) for i in range(len(node.output)))


def _gather(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    axis = attributes.get("axis", 0)
    if not (found := reading.indexed(*node.input)):
        axis %= len(reading.shape(node.input[0]))
        return op.take(reading.tensor(node.input[0]), _from_the_front(reading, node, axis), axis=axis, mode="clip")
    x, rows = found
    axis %= len(x.shape)
    behind = axis + len(rows.shape)

    def at(*index: Any) -> Any:
        row = expression(rows.at(*index[axis:behind]), rows.dtype)
        return x.at(*index[:axis], simplified(_wrap(row, x.shape[axis])), *index[behind:])

    return Indexed([*x.shape[:axis], *rows.shape, *x.shape[axis + 1 :]], x.dtype, at)


def _from_the_front(reading: Reading, node: onnx.NodeProto, axis: int) -> relax.Expr:
    """The rows that a Gather takes, none of them negative: ONNX counts a negative one from the end of the axis."""
    rows, size = reading.values[node.input[1]], reading.shape(node.input[0])[axis]
    if not isinstance(rows, Indexed):
        tensor = reading.tensor(node.input[1])
        if node.input[0] in reading.weights and _is_checked(reading, tensor):
            return tensor
        return reading.emit(_wrapped(reading, tensor, size))
    positions, analyzer = position_symbols(rows.shape)
    row = expression(rows.at(*positions), rows.dtype)
    bind_sizes(analyzer, row)
    if analyzer.can_prove(row >= 0):
        return reading.tensor(node.input[1])
    wrapped = Indexed(rows.shape, rows.dtype, lambda *index: _wrap(expression(rows.at(*index), rows.dtype), size))
    return reading.emit(computed(reading, wrapped))


def _wrap(row: tvm.ir.Expr, size: Any) -> tvm.ir.Expr:
    return tvm.tirx.Select(row < 0, row + tvm.tirx.Cast(str(row.ty.dtype), expression(size, "int64")), row)


def _wrapped(reading: Reading, rows: relax.Expr, size: Any) -> relax.Expr:
    """A kernel that counts the negative ones of some rows from the end of an axis of that size."""
    sizes = [] if is_number(size) else [size]

    def from_the_front(rows: te.Tensor, *passed: Any) -> te.Tensor:
        last = passed[0] if passed else size  # a kernel knows no sizes but of its arguments
        return te.compute(rows.shape, lambda *index: _wrap(rows(*index), last), name="from_the_front")

    return reading.builder.call_te(from_the_front, rows, *sizes, primfunc_name_hint="from_the_front")


def _is_checked(reading: Reading, rows: relax.Expr) -> bool:
    """Tell whether rows are the graph's inputs or sums of them: token ids and positions, which a session checks."""
    if isinstance(rows, tvm.ir.GenericConst):
        return bool((rows.value.numpy() >= 0).all())
    binding = reading.builder.lookup_binding(rows) if isinstance(rows, relax.Var) else None
    if binding is None:
        return isinstance(rows, relax.Var)
    names = ("add", "arange", "astype", "broadcast_to", "expand_dims", "reshape", "squeeze")
    if not isinstance(binding, relax.Call) or binding.op not in [tvm.ir.Op.get(f"relax.{name}") for name in names]:
        return False
    parts = [part for part in binding.args if isinstance(part.ty, relax.TensorType)]
    return all(_is_checked(reading, part) for part in parts)


def _gather_nd(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    refuse_unless(attributes, batch_dims=0)
    x, rows = _followed(reading, *node.input)
    depth = int(rows.shape[-1])
    count = len(rows.shape) - 1

    def at(*index: Any) -> Any:
        row = [expression(rows.at(*index[:count], position), rows.dtype) for position in range(depth)]
        return x.at(*(simplified(_wrap(each, size)) for each, size in zip(row, x.shape, strict=False)), *index[count:])

    return Indexed([*rows.shape[:-1], *x.shape[depth:]], x.dtype, at)


def _reshape(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    before = reading.shape(node.input[0])
    after = _resolved(before, reading.integers(node.input[1]), bool(attributes.get("allowzero")))
    if not (found := reading.indexed(node.input[0])):
        x = before_reshape(reading, reading.tensor(node.input[0]))
        return x if _same(after, x.ty.shape.values) else op.reshape(x, after)
    (x,) = found
    if _same(before, after):
        return x
    if all(map(is_one, (*before, *after))):
        return Indexed(after, x.dtype, lambda *_: x.at(*(0 for _ in before)))
    positions, analyzer = position_symbols(before)
    if depends_on(element := analyzer.simplify(expression(x.at(*positions), x.dtype)), positions):
        return op.reshape(reading.emit(computed(reading, x)), after)
    return Indexed(after, x.dtype, lambda *_: element)


def _resolved(before: list[Any], wanted: list[Any], allow_zero: bool) -> list[Any]:
    """Resolve the shape that a Reshape asks for: 0 keeps a dimension, -1 takes the rest."""
    shape = [before[axis] if is_number(dim) and dim == 0 and not allow_zero else dim for axis, dim in enumerate(wanted)]
    rest = [dim for dim in shape if not is_number(dim) or dim != -1]
    left = simplified(prod(before) // prod(rest)) if len(rest) < len(shape) else None
    return [left if is_number(dim) and dim == -1 else dim for dim in shape]


def _same(left: list[Any], right: list[Any]) -> bool:
    return bool(tvm_ffi.structural_equal(relax.ShapeExpr(left), relax.ShapeExpr(right)))


def before_reshape(reading: Reading, x: relax.Expr) -> relax.Expr:
    """Give the tensor that was reshaped to this one, or this one itself."""
    if not isinstance(x, relax.Var):
        return x
    binding = reading.builder.lookup_binding(x)
    reshaped = isinstance(binding, relax.Call) and binding.op == tvm.ir.Op.get("relax.reshape")
    return binding.args[0] if reshaped else x


def _transpose(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    return op.permute_dims(reading.tensor(node.input[0]), attributes.get("perm"))


CONVERTERS: dict[str, Converter] = {
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cumulative_sum,
    "Expand": _expand,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
