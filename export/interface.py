"""Find out how the model in an ONNX file is called, whoever wrote it, and write it down as it is mostly called.

The names are those of transformers and Optimum, and of ONNX Runtime's own converters; where names say nothing, the
shapes do.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from export.graph import MASK, POSITIONS, GraphReader, dims_of
from export.signature import COUNTED, PAST, SEEN, ZEROS, Port, Signature, dtype_named
from gpt.cli import UserError

TYPES = "token_type_ids"  # which sentence a token is of, in a pair of them; 0 for one alone
ROLES = {MASK: SEEN, POSITIONS: COUNTED, TYPES: ZEROS}


def signature_of(proto: onnx.ModelProto) -> Signature:
    """Find out how a parsed file is called; its external data need not be loaded."""
    reader = GraphReader(proto)
    inputs = tuple(map(_port, reader.inputs))
    outputs = tuple(map(_port, reader.graph.output))
    ids, logits = reader.ids, reader.logits
    presents = _presents(inputs, outputs, ids.name if ids is not None else None)
    roles = dict.fromkeys(presents, PAST)
    for port in inputs:
        name = _plain_name(port.name)
        if port.name not in presents and (ids is None or port.name != ids.name) and name in ROLES:
            roles[port.name] = ROLES[name]
    return Signature(
        inputs=inputs,
        outputs=outputs,
        ids=ids.name if ids is not None else None,
        logits=logits.name if logits is not None else None,
        roles=roles,
        presents=presents,
        vocab_size=reader.vocab_size,
        longest=reader.longest,
    )


def plain_form(proto: onnx.ModelProto, signature: Signature) -> onnx.ModelProto | None:
    """Return the file with masks of ones and positions that count on from the past in the place of such inputs.

    So what they imply, as that a mask is the causal one, can be known while compiling. None if it has no such input.
    """
    names = [port.name for port in signature.inputs if port.name in signature.plain]
    if not names or signature.ids is None:
        return None
    made: list[NodeProto] = []
    constants: list[TensorProto] = []

    def number(value: int | list[int], dtype: str = "int64") -> str:
        name = f"plain.number.{len(constants)}"
        constants.append(onnx.numpy_helper.from_array(np.array(value, dtype_named(dtype)), name))
        return name

    def node(operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = f"plain.{operator}.{len(made)}"
        made.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def size(value: str, axis: int) -> str:
        """Return the name of a list with one size of a value."""
        return node("Gather", [node("Shape", [value]), number([axis])])

    B, T = size(signature.ids, 0), size(signature.ids, 1)
    first = signature.past[0] if signature.past else None
    P = size(first, signature.length_axis(first)) if first else number([0])
    end = node("Add", [P, T])
    values = {}
    for name in names:
        port = signature.input(name)
        elem = helper.np_dtype_to_tensor_dtype(np.dtype(dtype_named(port.dtype)))
        role = signature.roles[name]
        if role == COUNTED:
            counted = node("Range", [_scalar(node, P), _scalar(node, end), number(1)])  # [T]
            if len(port.dims) == 2:
                counted = node("Expand", [counted, node("Concat", [B, T], axis=0)])
            values[name] = node("Cast", [counted], to=elem)
        else:
            fixed = len(port.dims) == 2 and isinstance(port.dims[1], int)
            width = number([int(port.dims[1])]) if fixed else end if role == SEEN else T
            value = onnx.numpy_helper.from_array(np.array([1 if role == SEEN else 0], np.int64))
            ones = node("ConstantOfShape", [node("Concat", [B, width], axis=0)], value=value)
            values[name] = node("Cast", [ones], to=elem)
    plain = onnx.ModelProto()
    for field in ("ir_version", "opset_import", "functions", "producer_name", "producer_version"):
        value = getattr(proto, field)
        getattr(plain, field).extend(value) if not isinstance(value, int | str) else setattr(plain, field, value)
    graph = plain.graph
    graph.name = proto.graph.name
    graph.input.extend(value for value in proto.graph.input if value.name not in names)
    graph.output.extend(proto.graph.output)
    graph.initializer.extend([*proto.graph.initializer, *constants])
    graph.sparse_initializer.extend(proto.graph.sparse_initializer)
    graph.node.extend([*made, *proto.graph.node])
    for each in graph.node:
        for index, given in enumerate(each.input):
            if given in values:
                each.input[index] = values[given]
    return plain


def _scalar(node: Any, name: str) -> str:
    return node("Squeeze", [name])


def with_shapes(proto: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> None:
    """Fix the shapes of some inputs. Raises UserError for a name that is no input, and a shape that it cannot have.

    A size that has a name gets its number wherever that name stands.
    """
    reader = GraphReader(proto)
    ports = {port.name: port for port in map(_port, reader.inputs)}
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in ports:
            raise UserError(f"--shapes {name}: no input of the file, which has {', '.join(ports)}")
        dims = ports[name].dims
        if len(shape) != len(dims):
            raise UserError(f"--shapes {name}={_by_x(shape)}: must have {len(dims)} numbers, for {_by_x(dims)}")
        for dim, number in zip(dims, shape, strict=True):
            known = sizes.setdefault(dim, number) if isinstance(dim, str) else dim
            if known != number or number < 0:
                raise UserError(f"--shapes {name}={_by_x(shape)}: {dim} is {known} and not {number}")
    for value in (*proto.graph.input, *proto.graph.output):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            name = dim.dim_param or f"{value.name}.{axis}"
            if not dim.HasField("dim_value") and name in sizes:
                dim.dim_value = sizes[name]
    del proto.graph.value_info[:]


def _by_x(dims: Sequence[int | str]) -> str:
    return "x".join(map(str, dims))


def _port(value: ValueInfoProto) -> Port:
    dims = tuple(
        f"{value.name}.{axis}" if dim == "?" or (isinstance(dim, int) and dim < 0) else dim
        for axis, dim in enumerate(dims_of(value))
    )
    return Port(value.name, str(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)), dims)


def _plain_name(name: str) -> str:
    """Return a name without what tools put around it: `onnx::attention_mask.1`, `attention_mask_1`."""
    return re.sub(r"[._:]+\d+$", "", name.rpartition("::")[2])


def _presents(inputs: Sequence[Port], outputs: Sequence[Port], ids: str | None) -> dict[str, str]:
    """Pair the inputs of past keys and values with the outputs that hold them longer, by name or else by order."""
    pasts = [port.name for port in inputs if port.name.startswith("past") and len(port.dims) >= 3]
    names = [port.name for port in outputs if port.name.startswith("present") and len(port.dims) >= 3]

    def parts(name: str) -> tuple[str, ...]:
        return tuple(re.findall(r"\d+|key|value", re.sub("^(past_key_values|past|present)", "", name)))

    by_parts = {parts(name): name for name in names}
    if pasts and len(by_parts) == len(names) and all(parts(name) in by_parts for name in pasts):
        return {name: by_parts[parts(name)] for name in pasts}
    return dict(zip(pasts, names, strict=True)) if len(pasts) == len(names) else {}
