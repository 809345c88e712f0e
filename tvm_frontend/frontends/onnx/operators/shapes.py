"""Converts operators that make shapes, count, and move elements without changing them."""

from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
import onnx
import tvm
import tvm_ffi
from tvm import relax, te
from tvm.relax import op

from gpt.cli import UserError
from tvm_frontend.frontends.onnx.operators.context import (
    Converter,
    Reading,
    Unequal,
    Value,
    axes_of,
    axis_in,
    computed,
    given,
    held_as,
    known,
    refuse_unless,
)
from tvm_frontend.frontends.onnx.operators.symbolic import (
    Indexed,
    analyzer_of,
    constant,
    depends_on,
    elements,
    equal,
    expression,
    flat,
    is_number,
    is_one,
    is_zero,
    listed,
    position_symbols,
    said,
    simplified,
    unflat,
)

BEYOND = 2**31 - 1  # what exporters write for a slice's end that is the axis' own


def _shape(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    return listed(reading.shape(node.input[0])[attributes.get("start", 0) : attributes.get("end")])


def _size(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    return listed([simplified(prod(reading.shape(node.input[0])))], scalar=True)


def _range(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    start, stop, step = (reading.integers(name)[0] for name in node.input)
    dtype = reading.dtype(node.input[0])
    start, stop, step = (_whole(number) for number in (start, stop, step))
    if not is_number(getattr(step, "value", step)):
        raise UserError(f"step {step} is not supported, only a number")
    step = getattr(step, "value", step)
    if dtype.startswith("float") and all(not isinstance(n, tvm.ir.Expr) for n in (start, stop, step)):
        count: Any = max(int(np.ceil((stop - start) / step)), 0)
    else:
        if not isinstance(step, int) or step == 0:
            raise UserError(f"step {step} is not supported where a length is not known, only whole numbers")
        count = simplified((stop - start + step - 1) // step if step > 0 else (start - stop - step - 1) // -step)
        count = max(count, 0) if is_number(count) else count
    if dtype == "int64" or dtype == "int32":
        return Indexed([count], dtype, lambda i: start + i * step)
    first, difference = (expression(number, dtype) for number in (start, step))
    return Indexed([count], dtype, lambda i: first + expression(i, dtype) * difference)


def _whole(number: Any) -> Any:
    """Give the integer that a float was cast from, or a plain number of a constant."""
    if isinstance(number, tvm.tirx.Cast) and str(number.value.ty.dtype) == "int64":
        return number.value
    if isinstance(number, tvm.tirx.FloatImm):
        number = float(number.value)
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _constant_of_shape(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    array = onnx.numpy_helper.to_array(attributes["value"]) if "value" in attributes else np.zeros(1, np.float32)
    array = array.astype(held_as(str(array.dtype)), copy=False)
    value, dtype = array.item(), str(array.dtype)
    return Indexed(reading.integers(node.input[0]), dtype, lambda *_: tvm.tirx.const(value, dtype))


def _eye_like(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    shape, k = reading.shape(node.input[0]), attributes.get("k", 0)
    dtype = reading.dtype(node.input[0])
    if "dtype" in attributes:
        dtype = held_as(str(onnx.helper.tensor_dtype_to_np_dtype(attributes["dtype"])))
    one, zero = tvm.tirx.const(1, dtype), tvm.tirx.const(0, dtype)

    def at(row: Any, column: Any) -> Any:
        row, column = expression(row, "int64"), expression(column, "int64")
        return tvm.tirx.Select(tvm.tirx.EQ(row + k, column), one, zero)

    return Indexed(shape, dtype, at)


def _trilu(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    k = reading.integers(given(node, 1))[0] if given(node, 1) else 0
    upper = attributes.get("upper", 1)
    shape, dtype = reading.shape(node.input[0]), reading.dtype(node.input[0])
    if len(shape) < 2:
        raise UserError(f"a triangle of {len(shape)} dimensions")

    def is_kept(*index: Any) -> tvm.ir.Expr:
        row, column = (expression(position, "int64") for position in index[-2:])
        return row + k <= column if upper else column <= row + k

    if found := reading.indexed(node.input[0]):
        (x,) = found
        zero = tvm.tirx.const(0, "int64" if dtype == "int32" else dtype)
        return Indexed(shape, dtype, lambda *index: tvm.tirx.Select(is_kept(*index), x.element(*index), zero))
    kept = reading.emit(computed(reading, Indexed(shape[-2:], "bool", is_kept)))
    tensor = reading.tensor(node.input[0])
    if dtype == "bool":
        return op.logical_and(kept, tensor)
    return op.where(kept, tensor, relax.const(0, dtype))


def _cumulative_sum(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Sum up along an axis: equal numbers as a formula, as GPT-2's count of the documents in a sequence does."""
    axis = axis_in(reading.numbers(node.input[1])[0], len(reading.shape(node.input[0])))
    exclusive, reverse = attributes.get("exclusive", 0), attributes.get("reverse", 0)
    if found := reading.indexed(node.input[0]):
        (x,) = found
        positions, analyzer = position_symbols(x.shape)
        if not depends_on(analyzer.simplify(x.element(*positions)), [positions[axis]]) and not (exclusive or reverse):

            def at(*index: Any) -> Any:
                number = simplified(x.element(*index[:axis], positions[axis], *index[axis + 1 :]))
                return number * expression(index[axis] + 1, "int64")

            if x.dtype in ("int64", "int32"):
                return Indexed(x.shape, x.dtype, at)
    tensor, dtype = reading.tensor(node.input[0]), reading.dtype(node.input[0])
    tensor = reading.emit(op.flip(tensor, axis)) if reverse else tensor
    summed = op.cumsum(tensor, axis, dtype=dtype, exclusive=bool(exclusive))
    return op.flip(reading.emit(summed), axis) if reverse else summed


def _squeeze(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    shape = reading.shape(node.input[0])
    axes = axes_of(reading, node, attributes)
    if axes is None:
        axes = [axis for axis, dim in enumerate(shape) if is_one(dim)]
    axes = [axis_in(axis, len(shape)) for axis in axes]
    for axis in axes:
        if not is_one(shape[axis]):
            reading.same_size(shape[axis], 1)
    if found := reading.indexed(node.input[0]):
        return _without(found[0], axes)
    return op.squeeze(reading.tensor(node.input[0]), axes) if axes else reading.tensor(node.input[0])


def _without(x: Indexed, axes: list[int]) -> Indexed:
    def at(*index: Any) -> Any:
        rest = iter(index)
        return x.at(*(0 if axis in axes else next(rest) for axis in range(len(x.shape))))

    return Indexed([dim for axis, dim in enumerate(x.shape) if axis not in axes], x.dtype, at)


def _unsqueeze(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    axes = axes_of(reading, node, attributes)
    if axes is None:
        raise UserError("axes are missing")
    rank = len(reading.shape(node.input[0])) + len(axes)
    axes = [axis_in(axis, rank) for axis in axes]
    if len(set(axes)) < len(axes):
        raise UserError(f"axes {axes} are not unique")
    if not (found := reading.indexed(node.input[0])):
        return op.expand_dims(reading.tensor(node.input[0]), axes) if axes else reading.tensor(node.input[0])
    (x,) = found
    rest = iter(x.shape)
    shape = [1 if axis in axes else next(rest) for axis in range(rank)]
    return Indexed(shape, x.dtype, lambda *index: x.at(*(i for axis, i in enumerate(index) if axis not in axes)))


def _expand(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    shape = reading.broadcast(reading.shape(node.input[0]), reading.integers(node.input[1]))
    if found := reading.indexed(node.input[0]):
        return expanded(found[0], shape)
    tensor = reading.tensor(node.input[0])
    return tensor if _same(shape, tensor.ty.shape.values) else op.broadcast_to(tensor, shape)


def expanded(x: Indexed, shape: list[Any]) -> Indexed:
    """Repeat the value to a shape."""
    behind = len(shape) - len(x.shape)
    return Indexed(
        shape,
        x.dtype,
        lambda *index: x.at(*(0 if is_one(dim) else i for dim, i in zip(x.shape, index[behind:], strict=True))),
    )


def _tile(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    shape, repeats = reading.shape(node.input[0]), reading.integers(node.input[1])
    if len(shape) != len(repeats):
        raise UserError(f"{len(repeats)} repeats of {len(shape)} dimensions")
    after = [simplified(dim * often) for dim, often in zip(shape, repeats, strict=True)]
    if found := reading.indexed(node.input[0]):
        (x,) = found
        return Indexed(
            after, x.dtype, lambda *index: x.at(*(simplified(i % dim) for i, dim in zip(index, shape, strict=True)))
        )
    tensor = reading.tensor(node.input[0])
    apart = reading.emit(op.reshape(tensor, [size for dim in shape for size in (1, dim)]))
    wide = [size for dim, often in zip(shape, repeats, strict=True) for size in (often, dim)]
    spread = reading.emit(op.broadcast_to(apart, wide))
    return op.reshape(spread, after)


def _concat(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    names = list(node.input)
    if "axis" not in attributes:
        raise UserError("attribute axis is missing")
    shapes = [reading.shape(name) for name in names]
    if len({len(shape) for shape in shapes}) > 1 or not shapes[0]:
        raise UserError(f"pieces of {', '.join(str(len(shape)) for shape in shapes)} dimensions")
    axis = axis_in(attributes["axis"], len(shapes[0]))
    for shape in shapes[1:]:
        for other, (left, right) in enumerate(zip(shapes[0], shape, strict=True)):
            if other != axis:
                reading.same_size(left, right)
    if len(shapes[0]) == 1:  # pieces of a shape of which some are empty
        names = [name for name, shape in zip(names, shapes, strict=True) if not is_zero(shape[0])] or names[:1]
    if len(names) == 1:
        return reading.values[names[0]]
    pieces = reading.indexed(*names)
    if pieces is None:
        return op.concat([reading.tensor(name) for name in names], axis=axis)
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
    axes = reading.numbers(node.input[3]) if given(node, 3) else list(range(len(starts)))
    axes = [axis_in(axis, len(shape)) for axis in axes]
    steps = reading.numbers(node.input[4]) if given(node, 4) else [1] * len(starts)
    if not len(axes) == len(starts) == len(stops) == len(steps):
        raise UserError(f"{len(starts)} starts, {len(stops)} ends and {len(steps)} steps of {len(axes)} axes")
    return sliced(reading, node.input[0], axes, starts, stops, steps)


def sliced(
    reading: Reading, name: str, axes: list[int], starts: list[Any], stops: list[Any], steps: list[int]
) -> Value:
    """Cut a value along some axes, as ONNX does: negative bounds count from the end, and none is beyond it."""
    shape = reading.shape(name)
    pieces = {}  # of each axis: its first position, its step and its length
    for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
        if step == 0:
            raise UserError("a step of 0")
        first, last = (slice_bound(reading, position, shape[axis], step) for position in (start, stop))
        length = simplified((last - first + step - 1) // step if step > 0 else (first - last - step - 1) // -step)
        pieces[axis] = (first, step, _at_least_none(length))
    pieces = {axis: piece for axis, piece in pieces.items() if not _is_whole(piece, shape[axis])}
    cut = [pieces[axis][2] if axis in pieces else dim for axis, dim in enumerate(shape)]
    if any(is_zero(length) for _, _, length in pieces.values()):  # TVM's kernels are not made for no elements
        dtype = reading.dtype(name)
        return Indexed(cut, dtype, lambda *_: tvm.tirx.const(0, dtype))
    if found := reading.indexed(name):
        (x,) = found

        def at(*index: Any) -> Any:
            places = []
            for axis, i in enumerate(index):
                first, step, _ = pieces.get(axis, (0, 1, None))
                places.append(simplified(first + i * step))
            return x.at(*places)

        return Indexed(cut, x.dtype, at)
    tensor = reading.tensor(name)
    plain = [axis for axis, piece in pieces.items() if piece[1] == 1]
    if plain:
        begins = [pieces[axis][0] for axis in plain]
        ends = [simplified(pieces[axis][0] + pieces[axis][2]) for axis in plain]
        tensor = reading.emit(op.strided_slice(tensor, plain, begins, ends, assume_inbound=True))
    for axis, (first, step, length) in pieces.items():
        if step != 1:
            rows = _progression(first, step, length)
            tensor = reading.emit(op.take(tensor, reading.emit(computed(reading, rows)), axis=axis, mode="clip"))
    return tensor


def _at_least_none(length: Any) -> Any:
    """Give a length that is 0 where it would be negative: the end of a piece may lie before its start."""
    if is_number(length):
        return max(length, 0)
    analyzer = analyzer_of(length)
    if analyzer.can_prove(length >= 0):
        return length
    return 0 if analyzer.can_prove(length <= 0) else simplified(tvm.tirx.Max(length, tvm.tirx.const(0, "int64")))


def _progression(first: Any, step: int, length: Any) -> Indexed:
    return Indexed([length], "int64", lambda i: first + i * step)


def _is_whole(piece: tuple[Any, int, Any], size: Any) -> bool:
    first, step, length = piece
    return is_zero(first) and step == 1 and equal(length, size)


def slice_bound(reading: Reading, position: Any, size: Any, step: int = 1) -> Any:
    """Resolve a bound of a slice, counted from 0: a negative one counts from the end, and none is beyond it.

    An end before the first element is -1, if the step is negative.
    """
    lowest, highest = (0, size) if step > 0 else (-1, simplified(size - 1))
    if is_number(position) and is_number(size):
        position = position + size if position < 0 else position
        return min(max(position, lowest), highest)
    if is_number(position) and abs(position) >= BEYOND:
        return highest if position > 0 else lowest
    if not is_number(position):
        at_least_none, at_least_one = (analyzer_of(position, size, least=least) for least in (0, 1))
        if at_least_none.can_prove(position < 0):
            position = simplified(position + size)
        elif not at_least_none.can_prove(position >= 0) and not at_least_one.can_prove(position >= 0):
            negative = tvm.tirx.Select(position < 0, position + size, position)
            position = simplified(tvm.tirx.Max(negative, tvm.tirx.const(0, "int64")))
        reading.limit(position, size)  # the file asks for no more than there is
        return position
    if position < 0:
        return simplified(size - 1 if position == -1 else tvm.tirx.Max(size + position, expression(lowest, "int64")))
    if position <= 1 and step > 0:  # any length of at least 1 has a first and a last position
        return position
    if analyzer_of(size).can_prove(size >= position):
        return position
    return simplified(tvm.tirx.Min(expression(highest, "int64"), expression(position, "int64")))


def _split(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value | tuple[Value, ...]:
    shape, count = reading.shape(node.input[0]), len(node.output)
    axis = axis_in(attributes.get("axis", 0), len(shape))
    size = shape[axis]
    if given(node, 1):
        sizes = reading.integers(node.input[1])
    elif "split" in attributes:
        sizes = list(attributes["split"])
    else:
        count = attributes.get("num_outputs", count)
        part = simplified((size + count - 1) // count)
        sizes = [part] * (count - 1) + [simplified(size - part * (count - 1))]
    if len(sizes) != len(node.output):
        raise UserError(f"{len(sizes)} pieces for {len(node.output)} outputs")
    reading.same_size(simplified(sum(sizes)), size)
    return pieces_of(reading, node.input[0], axis, sizes)


def pieces_of(reading: Reading, name: str, axis: int, sizes: list[Any]) -> tuple[Value, ...]:
    """Cut a value in pieces of some sizes along an axis."""
    if len(sizes) == 1:
        return (reading.values[name],)
    ends = [simplified(end) for end in accumulate(sizes)]
    if reading.indexed(name) or not all(map(is_number, ends)) or any(map(is_zero, sizes)):
        starts = [0, *ends[:-1]]
        return tuple(
            sliced(reading, name, [axis], [first], [end], [1]) for first, end in zip(starts, ends, strict=True)
        )
    pieces = reading.emit(op.split(reading.tensor(name), [int(end) for end in ends[:-1]], axis))
    return tuple(relax.TupleGetItem(pieces, i) for i in range(len(sizes)))


def _gather(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    axis = axis_in(attributes.get("axis", 0), len(reading.shape(node.input[0])))
    if not (found := reading.indexed(*node.input)):
        return op.take(reading.tensor(node.input[0]), _from_the_front(reading, node, axis), axis=axis, mode="clip")
    x, rows = found
    behind = axis + len(rows.shape)

    def at(*index: Any) -> Any:
        row = rows.element(*index[axis:behind])
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
    _limit_rows(reading, rows, size)
    positions, _ = position_symbols(rows.shape)
    first = simplified(rows.element(*positions))
    if analyzer_of(first).can_prove(first >= 0):
        return reading.tensor(node.input[1])
    wrapped = Indexed(rows.shape, rows.dtype, lambda *index: _wrap(rows.element(*index), size))
    return reading.emit(computed(reading, wrapped))


def _limit_rows(reading: Reading, rows: Indexed, size: Any) -> None:
    """Note which sizes a Gather of counted rows allows: a position may not be behind the last one of a table."""
    if len(rows.shape) < 1 or not is_number(size):
        return
    positions, analyzer = position_symbols(rows.shape)
    first = analyzer.simplify(rows.element(*positions) - [0, *positions][-1])
    if not depends_on(first, positions):
        reading.limit(simplified(first + rows.shape[-1]), size)


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
    batch = attributes.get("batch_dims", 0)
    shape, places = reading.shape(node.input[0]), reading.shape(node.input[1])
    depth, count = places[-1], len(places) - 1
    depth = known(depth, "the length of a place")
    if not 1 <= depth <= len(shape) - batch or batch > count:
        raise UserError(f"places of {depth} numbers in {len(shape)} dimensions")
    for left, right in zip(shape[:batch], places[:batch], strict=True):
        reading.same_size(left, right)
    after = [*places[:-1], *shape[batch + depth :]]
    sizes = shape[batch : batch + depth]
    if found := reading.indexed(*node.input):
        x, rows = found

        def at(*index: Any) -> Any:
            row = [rows.element(*index[:count], position) for position in range(depth)]
            picked = [simplified(_wrap(each, size)) for each, size in zip(row, sizes, strict=True)]
            return x.at(*index[:batch], *picked, *index[count:])

        return Indexed(after, x.dtype, at)

    def pick(x: te.Tensor, rows: te.Tensor) -> te.Tensor:
        def at(*index: Any) -> tvm.ir.Expr:
            row = [_inside(rows(*index[:count], d), x.shape[batch + d]) for d in range(depth)]
            return x(*index[:batch], *row, *index[count:])

        return te.compute([*rows.shape[:-1], *x.shape[batch + depth :]], at, name="gather_nd")

    return reading.builder.call_te(pick, *map(reading.tensor, node.input), primfunc_name_hint="gather_nd")


def _inside(row: tvm.ir.Expr, size: Any) -> tvm.ir.Expr:
    """Count a row from the front, and keep it in the axis: a kernel reads no memory that is not the tensor's."""
    row = tvm.tirx.Cast("int64", _wrap(row, size))
    last = expression(size, "int64") - 1
    return tvm.tirx.Max(tvm.tirx.Min(row, last), tvm.tirx.const(0, "int64"))


def _gather_elements(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    shape, places = reading.shape(node.input[0]), reading.shape(node.input[1])
    if len(shape) != len(places):
        raise UserError(f"places of {len(places)} dimensions in {len(shape)}")
    axis = axis_in(attributes.get("axis", 0), len(shape))
    if found := reading.indexed(*node.input):
        x, rows = found

        def element(*index: Any) -> Any:
            row = simplified(_wrap(rows.element(*index), shape[axis]))
            return x.at(*index[:axis], row, *index[axis + 1 :])

        return Indexed(places, x.dtype, element)

    def pick(x: te.Tensor, rows: te.Tensor) -> te.Tensor:
        def at(*index: Any) -> tvm.ir.Expr:
            return x(*index[:axis], _inside(rows(*index), x.shape[axis]), *index[axis + 1 :])

        return te.compute(rows.shape, at, name="gather_elements")

    return reading.builder.call_te(pick, *map(reading.tensor, node.input), primfunc_name_hint="gather_elements")


def _scatter(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Convert ScatterElements and ScatterND: write updates into a copy of the data."""
    shape = reading.shape(node.input[0])
    reduction = {b"none": "update", b"add": "add", b"mul": "mul", b"max": "max", b"min": "min"}.get(
        attributes.get("reduction", b"none")
    )
    if reduction is None:
        raise UserError(f"reduction {attributes['reduction']} is not supported")
    data, rows, updates = map(reading.tensor, node.input)
    if node.op_type == "ScatterND":
        sizes = shape[: known(reading.shape(node.input[1])[-1], "the length of a place")]
        rows = reading.emit(_all_from_the_front(reading, rows, sizes))
        return op.scatter_nd(data, rows, updates, reduction=reduction)
    axis = axis_in(attributes.get("axis", 0), len(shape))
    rows = reading.emit(_wrapped(reading, rows, shape[axis]))
    return op.scatter_elements(data, rows, updates, axis=axis, reduction=reduction)


def _all_from_the_front(reading: Reading, rows: relax.Expr, sizes: list[Any]) -> relax.Expr:
    """Count the negative ones of places [.., len(sizes)] from the end of the axis of each."""
    dtype = str(rows.ty.dtype)
    ends = reading.emit(computed(reading, listed(sizes, dtype=dtype)))
    below = reading.emit(op.less(rows, relax.const(0, dtype)))
    return op.where(below, reading.emit(op.add(rows, ends)), rows)


def _one_hot(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    (depth,) = reading.integers(node.input[1])
    places = reading.shape(node.input[0])
    axis = axis_in(attributes.get("axis", -1), len(places) + 1)
    counted = reading.emit(_wrapped(reading, reading.tensor(node.input[0]), depth))
    counted = reading.emit(op.expand_dims(counted, [axis]))
    shape = [1] * axis + [depth] + [1] * (len(places) - axis)
    dtype = str(counted.ty.dtype)
    if not dtype.startswith("int"):
        raise UserError(f"places of {dtype} are not supported, only integers")
    line = Indexed(shape, dtype, lambda *index: index[axis])
    here = reading.emit(op.equal(counted, reading.emit(computed(reading, line))))
    values = reading.tensor(node.input[2])
    off, on = (
        reading.emit(op.strided_slice(values, [0], [first], [first + 1], assume_inbound=True)) for first in (0, 1)
    )
    return op.where(here, on, off)


def _top_k(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> tuple[Value, ...]:
    (k,) = reading.numbers(node.input[1])
    refuse_unless(attributes, sorted=1)
    axis = axis_in(attributes.get("axis", -1), len(reading.shape(node.input[0])))
    largest = bool(attributes.get("largest", 1))
    found = op.topk(reading.tensor(node.input[0]), k, axis, "both", largest=largest, dtype="int64")
    found = reading.emit(found)
    return relax.TupleGetItem(found, 0), relax.TupleGetItem(found, 1)


def _non_zero(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    found = reading.indexed(node.input[0])
    values = elements(found[0]) if found and all(map(is_number, found[0].shape)) else [None]
    values = [getattr(value, "value", value) for value in values]
    if found is None or any(value is None or isinstance(value, tvm.ir.Expr) for value in values):
        raise UserError("the shape of the result depends on numbers that are only known when it runs")
    array = np.array(values).reshape([int(dim) for dim in found[0].shape])
    return constant(np.array(np.nonzero(array), np.int64))


def _pad(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    shape, dtype = reading.shape(node.input[0]), reading.dtype(node.input[0])
    widths = reading.numbers(node.input[1])
    axes = reading.numbers(given(node, 3)) if given(node, 3) else list(range(len(shape)))
    axes = [axis_in(axis, len(shape)) for axis in axes]
    if len(widths) != 2 * len(axes):
        raise UserError(f"{len(widths)} widths for {len(axes)} axes")
    before = [0] * len(shape)
    more = [0] * len(shape)
    for axis, first, last in zip(axes, widths, widths[len(axes) :], strict=False):
        before[axis], more[axis] = first, first + last
    mode = attributes.get("mode", b"constant").decode()
    if mode not in ("constant", "edge", "reflect", "wrap"):
        raise UserError(f"mode {mode} is not supported, only constant, edge, reflect and wrap")

    def place(i: Any, first: int, size: Any) -> tvm.ir.Expr:
        """Give the position in the input, within its size, that is at a position of the output."""
        inner, size, none = expression(i - first, "int64"), expression(size, "int64"), tvm.tirx.const(0, "int64")
        if mode == "wrap":
            return tvm.tirx.floormod(inner, size)
        if mode == "reflect":
            inner = tvm.tirx.Select(inner < none, -inner, inner)
            inner = tvm.tirx.Select(inner < size, inner, size * 2 - 2 - inner)
        return tvm.tirx.Max(tvm.tirx.Min(inner, size - 1), none)

    def at(index: Any, size: Any, element: Any, fill: tvm.ir.Expr) -> tvm.ir.Expr:
        inside: tvm.ir.Expr = tvm.tirx.const(True, "bool")
        for i, first, added, dim in zip(index, before, more, size, strict=True):
            if mode == "constant" and (first or added):
                inner = expression(i - first, "int64")
                inside = tvm.tirx.And(inside, tvm.tirx.And(inner >= 0, inner < expression(dim, "int64")))
        picked = element(*(place(i, first, dim) for i, first, dim in zip(index, before, size, strict=True)))
        return tvm.tirx.Select(inside, picked, fill)

    def widened(size: Any) -> list[Any]:
        return [simplified(dim + added) for dim, added in zip(size, more, strict=True)]

    fill = reading.values[given(node, 2)] if given(node, 2) else constant(np.array(0, dtype))
    if (found := reading.indexed(node.input[0])) and isinstance(fill, Indexed):
        (x,), none = found, fill.element(*(0 for _ in fill.shape))
        return Indexed(widened(shape), dtype, lambda *index: at(index, shape, x.element, none))
    filled = reading.tensor(node.input[2]) if given(node, 2) else relax.const(0, dtype)

    def pad(x: te.Tensor, fill: te.Tensor) -> te.Tensor:
        none = (0,) * len(fill.shape)
        return te.compute(widened(x.shape), lambda *index: at(index, x.shape, x, fill(*none)), name="pad")

    return reading.builder.call_te(pad, reading.tensor(node.input[0]), filled, primfunc_name_hint="pad")


def _reshape(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    before = reading.shape(node.input[0])
    wanted = reading.integers(given(node, 1)) if given(node, 1) else list(attributes.get("shape", []))
    return reshaped(reading, node.input[0], resolved(reading, before, wanted, bool(attributes.get("allowzero"))))


def _flatten(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    shape = reading.shape(node.input[0])
    axis = attributes.get("axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    if not 0 <= axis <= len(shape):
        raise UserError(f"axis {axis} of {len(shape)} dimensions")
    return reshaped(reading, node.input[0], [simplified(prod(shape[:axis])), simplified(prod(shape[axis:]))])


def reshaped(reading: Reading, name: str, after: list[Any]) -> Value:
    """Give a value in another shape of as many elements."""
    if not (found := reading.indexed(name)):
        x = before_reshape(reading, reading.tensor(name))
        return x if _same(after, x.ty.shape.values) else op.reshape(x, after)
    (x,) = found
    if _same(x.shape, after):
        return x
    kept = [dim for dim in x.shape if not is_one(dim)]
    if _same(kept, [dim for dim in after if not is_one(dim)]):  # only dimensions of 1 come or go

        def picked(*index: Any) -> Any:
            places = iter(i for i, dim in zip(index, after, strict=True) if not is_one(dim))
            return x.at(*(0 if is_one(dim) else next(places) for dim in x.shape))

        return Indexed(after, x.dtype, picked)
    return Indexed(after, x.dtype, lambda *index: x.at(*unflat(flat(index, after), x.shape)))


def resolved(reading: Reading, before: list[Any], wanted: list[Any], allow_zero: bool) -> list[Any]:
    """Resolve the shape that a Reshape asks for: 0 keeps a dimension, -1 takes the rest.

    Raises Learnt where a size of an input follows from it, and UserError where the elements are not as many as before.
    """
    shape = []
    for axis, dim in enumerate(wanted):
        if is_zero(dim) and not allow_zero:
            if axis >= len(before):
                raise UserError(f"dimension {axis}, which is to be kept, of {len(before)}")
            dim = before[axis]
        shape.append(dim)
    rest = [axis for axis, dim in enumerate(shape) if is_number(dim) and int(dim) == -1]
    if len(rest) > 1:
        raise UserError(f"shape {wanted} has more than one dimension that takes the rest")
    old, new = _without_common(before, [dim for axis, dim in enumerate(shape) if axis not in rest])
    if rest:
        many, few = simplified(prod(old)), simplified(prod(new))
        if is_zero(few) or (is_number(many) and is_number(few) and many % few):
            raise Unequal(f"{many} elements in rows of {few}")
        size = simplified(many // few)
        if not equal(size * few, many):
            for left, right in zip(*_beside(before, shape, rest[0]), strict=False):
                if not (is_number(left) or is_number(right)):
                    reading.same_size(left, right)
            raise UserError(
                f"{said(many)} elements in rows of {said(few)}: whether they are whole is only known when it runs"
            )
        shape[rest[0]] = size
    elif not (is_zero(simplified(prod(before))) and is_zero(simplified(prod(shape)))):
        reading.same_size(simplified(prod(old)), simplified(prod(new)))
    return shape


def _beside(before: list[Any], after: list[Any], rest: int) -> tuple[list[Any], list[Any]]:
    """Give the dimensions that a Reshape most likely keeps, where a file does not say: those before or behind -1."""
    if len(before) == len(after):
        return before[:rest] + before[rest + 1 :], after[:rest] + after[rest + 1 :]
    return (before[:rest], after[:rest]) if rest else (before[:0:-1], after[:0:-1])


def _without_common(left: list[Any], right: list[Any]) -> tuple[list[Any], list[Any]]:
    """Drop the symbolic factors that are in both lists."""
    kept, right = [], list(right)
    for factor in left:
        places = [place for place, other in enumerate(right) if not is_number(other) and equal(factor, other)]
        if places:
            del right[places[0]]
        else:
            kept.append(factor)
    return kept, right


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
    rank = len(reading.shape(node.input[0]))
    axes = [axis_in(axis, rank) for axis in attributes.get("perm", range(rank)[::-1])]
    if sorted(axes) != list(range(rank)):
        raise UserError(f"perm {axes} of {rank} dimensions")
    if not (found := reading.indexed(node.input[0])):
        return op.permute_dims(reading.tensor(node.input[0]), axes)
    (x,) = found

    def at(*index: Any) -> Any:
        places: list[Any] = [None] * rank
        for axis, i in zip(axes, index, strict=True):
            places[axis] = i
        return x.at(*places)

    return Indexed([x.shape[axis] for axis in axes], x.dtype, at)


CONVERTERS: dict[str, Converter] = {
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cumulative_sum,
    "Expand": _expand,
    "EyeLike": _eye_like,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "NonZero": _non_zero,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "ScatterElements": _scatter,
    "ScatterND": _scatter,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "TopK": _top_k,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
