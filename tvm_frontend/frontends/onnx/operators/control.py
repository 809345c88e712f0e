"""Converts constants, branches that are decided while compiling, and sequences of tensors."""

from typing import Any

import numpy as np
import onnx

from gpt.cli import UserError
from tvm_frontend.frontends.onnx.operators.context import Converter, Reading, Value, axis_in, given, held_as
from tvm_frontend.frontends.onnx.operators.shapes import CONVERTERS as OF_SHAPES
from tvm_frontend.frontends.onnx.operators.shapes import pieces_of
from tvm_frontend.frontends.onnx.operators.symbolic import is_number, listed, simplified


def _constant(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    name = node.output[0]
    given_as = [key for key in attributes if key.startswith(("value", "sparse"))]
    if given_as == ["value"]:
        array = onnx.numpy_helper.to_array(attributes["value"])
    elif given_as in (["value_float"], ["value_floats"]):
        array = np.array(attributes[given_as[0]], np.float32)
    elif given_as in (["value_int"], ["value_ints"]):
        array = np.array(attributes[given_as[0]], np.int64)
    else:
        raise UserError(f"a constant by {', '.join(given_as) or 'nothing'} is not supported, only by numbers")
    reading.add_constant(name, array.astype(held_as(str(array.dtype)), copy=False))
    return reading.values[name]


def _if(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> tuple[Value, ...]:
    found = reading.indexed(node.input[0])
    condition = simplified(found[0].element(*(0 for _ in found[0].shape))) if found else None
    if not is_number(condition):
        raise UserError("which branch is taken is only known when it runs")
    branch = attributes["then_branch" if condition else "else_branch"]
    for initializer in branch.initializer:
        array = onnx.numpy_helper.to_array(initializer)
        reading.add_constant(initializer.name, array.astype(held_as(str(array.dtype)), copy=False))
    for each in branch.node:
        reading.convert(each)
    return tuple(reading.values[value.name] for value in branch.output)


def _sequence(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> tuple[Value, ...]:
    if node.op_type == "SequenceConstruct":
        reading.sequences[node.output[0]] = [reading.values[name] for name in node.input]
    elif node.op_type == "SequenceEmpty":
        reading.sequences[node.output[0]] = []
    else:
        values = list(_tensors(reading, node))
        place = reading.numbers(node.input[2])[0] if given(node, 2) else len(values)
        values.insert(place, reading.values[node.input[1]])
        reading.sequences[node.output[0]] = values
    return ()


def _tensors(reading: Reading, node: onnx.NodeProto) -> list[Value]:
    if node.input[0] not in reading.sequences:
        raise UserError(f"{node.input[0]!r} is no sequence of tensors")
    return reading.sequences[node.input[0]]


def _split_to_sequence(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> tuple[Value, ...]:
    shape = reading.shape(node.input[0])
    axis = axis_in(attributes.get("axis", 0), len(shape))
    size = shape[axis]
    if not is_number(size):
        raise UserError(f"pieces of {size}, whose number is only known when it runs")
    size = int(size)
    sizes = reading.numbers(node.input[1]) if given(node, 1) else [1]
    if len(sizes) == 1 and not (given(node, 1) and reading.shape(node.input[1])):
        part = sizes[0]
        sizes = [min(part, size - first) for first in range(0, size, part)]
    if sum(sizes) != size:
        raise UserError(f"pieces of {sizes} of {size}")
    pieces = [reading.bound(piece) for piece in pieces_of(reading, node.input[0], axis, sizes)]
    if not given(node, 1) and not attributes.get("keepdims", 1):
        raise UserError("keepdims=0 is not supported, only 1")
    reading.sequences[node.output[0]] = pieces
    return ()


def _sequence_at(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    values, (place,) = _tensors(reading, node), reading.numbers(node.input[1])
    return values[axis_in(place, len(values))]


def _sequence_length(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    return listed([len(_tensors(reading, node))], scalar=True)


def _concat_from_sequence(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    names = []
    for place, value in enumerate(_tensors(reading, node)):
        names.append(f"{node.output[0]}.{place}")
        reading.values[names[-1]] = value
        if attributes.get("new_axis", 0):
            single = onnx.helper.make_node("Unsqueeze", names[-1:], names[-1:])
            reading.values[names[-1]] = reading.bound(
                OF_SHAPES["Unsqueeze"](reading, single, {"axes": [attributes["axis"]]})
            )
    return OF_SHAPES["Concat"](reading, onnx.helper.make_node("Concat", names, node.output), attributes)


CONVERTERS: dict[str, Converter] = {
    "ConcatFromSequence": _concat_from_sequence,
    "Constant": _constant,
    "If": _if,
    "SequenceAt": _sequence_at,
    "SequenceConstruct": _sequence,
    "SequenceEmpty": _sequence,
    "SequenceInsert": _sequence,
    "SequenceLength": _sequence_length,
    "SplitToSequence": _split_to_sequence,
}
