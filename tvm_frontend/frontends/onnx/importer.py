"""Imports ONNX to Relax, with B and T symbolic and the weights as parameters.

TVM's own importer needs static shapes for these graphs: it turns Shape, Range and Concat into tensors. Here a
value that follows from shapes alone stays a formula while the graph is read (see `operators.symbolic`), so index
arithmetic never reaches the compiled program, and a mask can be proven to be the causal one.

Floats of 16 bits are held in float32, weights exactly and what is computed without the rounding in between: a file of
bf16 or fp16 gives the numbers of its weights, closer to them than its own arithmetic. Kernels that compute in bf16 are
chosen when compiling.
"""

import re
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import onnx
import onnx.inliner
import tvm
from onnx import numpy_helper
from tvm import relax

from gpt.cli import UserError
from tvm_frontend.frontends.onnx.operators import CONVERTERS, converter_key
from tvm_frontend.frontends.onnx.operators.context import Learnt, Reading, Unequal, held_as
from tvm_frontend.frontends.onnx.operators.symbolic import MOST, simplified
from tvm_frontend.graph import ENTRY, Graph
from tvm_frontend.passes.rewrite import Rewriting

OLDEST_OPSET, NEWEST_OPSET = 11, 25


class Attributes(dict[str, Any]):
    """Holds the attributes of a node; one that must be there and is not raises UserError."""

    def __missing__(self, name: str) -> Any:
        raise UserError(f"attribute {name} is missing")


def import_onnx(proto: onnx.ModelProto, *, keep_types: bool = False) -> Graph:
    """Read a decoder of ONNX into a Relax function `forward(*inputs, *weights)`.

    Its result is the file's one output, or a tuple of all; inputs and outputs are in the file's order. Dimensions that
    the file names (B, T) become symbolic integers, one for each name, and each without a name one of its own; where
    the graph needs two of them to be equal, or one to be the sum of others, it becomes that. The function's attribute
    `limits`, if it is there, says how large sizes may be, as {"T": 64}: beyond that, the file reads behind the end of a
    table, and has no result. keep_types: inputs and outputs have the file's own types, those of 16 bits too, and are
    cast on the way in and out; else floats of 16 bits are float32 there as well. Raises UserError for a file that
    cannot be read, naming the node with its operator, domain and opset.
    """
    opset = check_operators(proto)
    nodes = _in_order(proto.graph, list(_inlined(proto)))
    try:
        return _read(proto, nodes, opset, keep_types, shared=True)
    except Unequal as error:
        try:  # names of dimensions are no promise: a file may give two that differ the same one
            return _read(proto, nodes, opset, keep_types, shared=False)
        except UserError:
            raise error from None


def _read(proto: onnx.ModelProto, nodes: list[onnx.NodeProto], opset: int, keep_types: bool, *, shared: bool) -> Graph:
    """Read a file, again for each size of an input that turns out to follow from others or to have a limit."""
    symbols: dict[str, tvm.tirx.Var] = {}
    known: list[tuple[tvm.tirx.Var, Any]] = []
    before = MOST.set(())
    try:
        while True:
            try:
                return _read_with(proto, nodes, opset, keep_types, Sizes(symbols, known, shared))
            except Learnt as learnt:
                if learnt.most:
                    MOST.set((*MOST.get(), (learnt.symbol, learnt.most)))
                else:
                    known.append((learnt.symbol, learnt.value))
    finally:
        MOST.reset(before)


class Sizes:
    """Gives the size of each dimension of an input: a number, a symbol, or what a symbol is known to be."""

    def __init__(self, symbols: dict[str, tvm.tirx.Var], known: list[tuple[tvm.tirx.Var, Any]], shared: bool) -> None:
        self.symbols, self.known, self.shared = symbols, known, shared

    def size(self, value: onnx.ValueInfoProto, axis: int) -> Any:
        dim = value.type.tensor_type.shape.dim[axis]
        if dim.WhichOneof("value") == "dim_value":
            return dim.dim_value
        name = dim.dim_param if dim.dim_param and self.shared else f"{value.name}_{axis}"
        if name not in self.symbols:
            used = {symbol.name for symbol in self.symbols.values()}
            plain = re.sub(r"\W+", "_", name)
            while plain in used:
                plain += "_"
            self.symbols[name] = tvm.tirx.Var(plain, "int64")
        size: Any = self.symbols[name]
        for symbol, of_others in self.known:
            factor, rest = _linear(size, symbol)
            size = simplified(factor * of_others + rest)
        return size


def _linear(size: Any, symbol: tvm.tirx.Var) -> tuple[Any, Any]:
    """Take a size apart: factor · symbol + rest."""
    if not isinstance(size, tvm.ir.Expr):
        return 0, size
    factor, rest = tvm.sym.detect_linear_equation(size, [symbol])
    return factor, rest


def _read_with(
    proto: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    opset: int,
    keep_types: bool,
    sizes: Sizes,
) -> Graph:
    reading = Reading(opset)
    for symbol, most in MOST.get():
        reading.limit(symbol, most)
    declared = graph_inputs(proto)
    inputs = [_input(value, sizes, keep_types) for value in declared]
    reading.sizes = list(sizes.symbols.values())
    reading.convert = lambda node: _convert(reading, node)
    _declare_initializers(reading, proto.graph)
    with reading.function(len(inputs)):
        with reading.builder.dataflow():
            for value, var in zip(declared, inputs, strict=True):
                reading.values[value.name] = reading.emit(_cast(var, held_as(var.ty.dtype)))
            for node in nodes:
                _convert(reading, node)
            outputs = [reading.builder.emit_output(_output(reading, value, keep_types)) for value in proto.graph.output]
        reading.builder.emit_func_output(
            outputs[0] if len(outputs) == 1 else relax.Tuple(outputs),
            [*inputs, *(reading.values[name] for name in reading.weights)],
        )
    module = reading.builder.finalize()
    if reading.limits:
        module.update_func(module.get_global_var(ENTRY), module[ENTRY].with_attr("limits", reading.limits))
    graph = Graph(module, reading.weights)
    return Rewriting(graph).finish()  # without weights that only stood for others, as integers do for floats


def graph_inputs(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """List what the file takes: its inputs, but those that it has a value for, which old files list too."""
    held = {initializer.name for initializer in proto.graph.initializer}
    return [value for value in proto.graph.input if value.name not in held]


def check_operators(proto: onnx.ModelProto) -> int:
    """Check the opset and every node, and give the opset; raises UserError naming all that are not supported."""
    opsets = {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import}
    opset = opsets.get("ai.onnx", 0)
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise UserError(f"opset {opset}: supported are {OLDEST_OPSET} to {NEWEST_OPSET}; export with one of them")
    if proto.graph.sparse_initializer:
        raise UserError("sparse weights are not supported; write them as dense ones")
    unknown: dict[str, tuple[onnx.NodeProto, int]] = {}
    for node in _inlined(proto):
        if (key := converter_key(node)) not in CONVERTERS:
            unknown[key] = (unknown[key][0] if key in unknown else node, unknown.get(key, (node, 0))[1] + 1)
    if unknown:
        named = (
            f"node {node.name or node.output[0]!r}: operator {node.op_type} of domain {node.domain or 'ai.onnx'} "
            f"(opset {opsets.get(node.domain or 'ai.onnx', '?')}) is not supported"
            + (f", nor are {count - 1} more such nodes" if count > 1 else "")
            for node, count in unknown.values()
        )
        raise UserError("; ".join(named))
    return opset


def _inlined(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """List the nodes of a file, those of its own functions in the place of their calls."""
    if not proto.functions:
        yield from proto.graph.node
        return
    bare = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import, functions=proto.functions)
    bare.graph.node.extend(proto.graph.node)  # without the weights, which would be copied
    bare.graph.output.extend(proto.graph.output)
    bare.graph.input.extend(graph_inputs(proto))
    bare.graph.input.extend(
        onnx.helper.make_tensor_value_info(each.name, each.data_type, each.dims) for each in proto.graph.initializer
    )
    try:
        yield from onnx.inliner.inline_local_functions(bare).graph.node
    except (RuntimeError, onnx.checker.ValidationError) as error:
        raise UserError(f"the functions in the file cannot be read: {' '.join(str(error).split())}") from error


def _in_order(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Sort nodes so that each comes after those whose results it reads. Raises UserError if that is impossible."""
    there = {each.name for each in (*graph.input, *graph.initializer)} | {""}
    ordered: list[onnx.NodeProto] = []
    while nodes:
        later = []
        for node in nodes:
            if there.issuperset(_reads(node)):
                ordered.append(node)
                there.update(node.output)
            else:
                later.append(node)
        if len(later) == len(nodes):
            missing = next(name for name in _reads(later[0]) if name not in there)
            raise UserError(
                f"node {later[0].name or later[0].output[0]!r} ({later[0].op_type}) reads {missing!r}, which is no "
                "input, no weight and no result of a node before it"
            )
        nodes = later
    for value in graph.output:
        if value.name not in there:
            raise UserError(f"output {value.name!r} is no input, no weight and no result of a node")
    return ordered


def _reads(node: onnx.NodeProto) -> set[str]:
    """Name what a node reads, also in its branches."""
    names = set(node.input)
    for attribute in node.attribute:
        if attribute.HasField("g"):
            inner = {name for each in attribute.g.node for name in _reads(each)}
            inner |= {value.name for value in attribute.g.output}
            own = {each.name for each in (*attribute.g.initializer, *attribute.g.input)}
            names |= inner - own - {name for each in attribute.g.node for name in each.output}
    return names


def _input(value: onnx.ValueInfoProto, sizes: Sizes, keep_type: bool) -> relax.Var:
    tensor = value.type.tensor_type
    if value.type.WhichOneof("value") != "tensor_type" or not tensor.HasField("shape"):
        raise UserError(f"input {value.name!r} is no tensor of a known number of dimensions")
    shape = [sizes.size(value, axis) for axis in range(len(tensor.shape.dim))]
    dtype = _dtype(value)
    return relax.Var(value.name, relax.TensorType(shape, dtype if keep_type else held_as(dtype)))


def _output(reading: Reading, value: onnx.ValueInfoProto, keep_type: bool) -> relax.Expr:
    if value.name not in reading.values:
        raise UserError(f"output {value.name!r} is no tensor")
    tensor = reading.tensor(value.name)
    return _cast(tensor, _dtype(value)) if keep_type and value.type.tensor_type.elem_type else tensor


def _dtype(value: onnx.ValueInfoProto) -> str:
    kind = value.type.tensor_type.elem_type
    dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind)) if kind else "nothing"
    if dtype not in DTYPES:
        raise UserError(f"{value.name!r} is of {dtype}, which is not supported")
    return dtype


def _cast(tensor: relax.Expr, dtype: str) -> relax.Expr:
    return tensor if tensor.ty.dtype == dtype else relax.op.astype(tensor, dtype)


def _declare_initializers(reading: Reading, graph: onnx.GraphProto) -> None:
    """Make weights parameters; lists of integers (shapes, axes) and single numbers become parts of formulas."""
    for initializer in graph.initializer:
        array = numpy_helper.to_array(initializer)
        reading.add_constant(initializer.name, array.astype(held_as(str(array.dtype)), copy=False))


def _convert(reading: Reading, node: onnx.NodeProto) -> None:
    """Convert a node, and give its results their names."""
    attributes = Attributes({each.name: onnx.helper.get_attribute_value(each) for each in node.attribute})
    try:
        if (converter := CONVERTERS.get(converter_key(node))) is None:
            raise UserError("the operator is not supported")
        node = _without_absent(node)
        _check_schema(node, attributes, reading.opset)
        results = converter(reading, node, attributes)
        results = results if isinstance(results, tuple) else (results,)
        if node.output[0] in reading.sequences:
            return
        if len(node.output) > len(results):
            raise UserError(f"outputs {', '.join(node.output)} are not supported, only the first {len(results)}")
        for name, result in zip(node.output, results, strict=False):
            if name:
                reading.values[name] = reading.bound(result, name)
    except UserError as error:
        kind = Unequal if isinstance(error, Unequal) else UserError
        raise kind(f"{_described(reading, node)}: {error}") from error
    except Learnt:
        raise
    except Exception as error:
        if not _is_of_tvm(error.__traceback__):
            raise
        said = " ".join(str(error).split())
        raise UserError(f"{_described(reading, node)}: TVM cannot make it: {said}") from error


def _described(reading: Reading, node: onnx.NodeProto) -> str:
    name = node.name or next(filter(None, node.output), "")
    own = node.domain in ("", "ai.onnx")
    return f"node {name!r} ({node.op_type}, " + (f"ai.onnx opset {reading.opset})" if own else f"{node.domain})")


def _without_absent(node: onnx.NodeProto) -> onnx.NodeProto:
    """Drop inputs and outputs at the end that are left out."""
    if (node.input and not node.input[-1]) or (node.output and not node.output[-1]):
        trimmed = onnx.NodeProto()
        trimmed.CopyFrom(node)
        for names in (trimmed.input, trimmed.output):
            while names and not names[-1]:
                names.pop()
        return trimmed
    return node


def _check_schema(node: onnx.NodeProto, attributes: Attributes, opset: int) -> None:
    """Check the number of a node's inputs and the types of its attributes. Raises UserError for what is not legal."""
    if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type, opset, ""):
        return
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    if not schema.min_input <= len(node.input) <= schema.max_input:
        raise UserError(f"{len(node.input)} inputs, where {schema.min_input} to {schema.max_input} are legal")
    if not node.output or len(node.output) > schema.max_output:
        raise UserError(f"{len(node.output)} outputs, where 1 to {schema.max_output} are legal")
    for position, name in enumerate(node.input):
        required = position < schema.min_input
        if required and not name:
            raise UserError(f"input {position} is left out")
    for attribute in node.attribute:
        wanted = schema.attributes.get(attribute.name)
        if wanted is not None and int(wanted.type.value) != attribute.type:  # type: ignore[attr-defined]
            raise UserError(f"attribute {attribute.name} is of another type than {wanted.type.name}")  # type: ignore[attr-defined]
    for name, wanted in schema.attributes.items():
        if wanted.required and name not in attributes:
            raise UserError(f"attribute {name} is missing")


def _is_of_tvm(trace: TracebackType | None) -> bool:
    """Tell if an error comes out of TVM, and not of this project's own code."""
    file = ""
    while trace is not None:
        file, trace = trace.tb_frame.f_code.co_filename, trace.tb_next
    return file.endswith((".cc", ".h", ".pxi")) or "/tvm/" in file or "/tvm_ffi/" in file


DTYPES = (
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *("bool", "float16", "bfloat16", "float32", "float64"),
)
