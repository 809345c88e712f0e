"""Imports ONNX to Relax, with B and T symbolic and the weights as parameters.

TVM's own importer needs static shapes for these graphs: it turns Shape, Range and Concat into tensors. Here a
value that follows from shapes alone stays a formula while the graph is read (see `operators.symbolic`), so index
arithmetic never reaches the compiled program, and a mask can be proven to be the causal one.

Floats of 16 bits are held in float32, weights exactly and what is computed without the rounding in between: a file of
bf16 or fp16 gives the numbers of its weights, closer to them than its own arithmetic. Kernels that compute in bf16 are
chosen when compiling.
"""

import numpy as np
import onnx
import tvm
from onnx import numpy_helper
from tvm import relax

from gpt.cli import UserError
from tvm_frontend.frontends.onnx.operators import CONVERTERS, converter_key
from tvm_frontend.frontends.onnx.operators.context import Reading
from tvm_frontend.frontends.onnx.operators.elementwise import held_as
from tvm_frontend.frontends.onnx.operators.masks import band
from tvm_frontend.frontends.onnx.operators.symbolic import Indexed, constant
from tvm_frontend.graph import ENTRY, Graph
from tvm_frontend.passes.rewrite import Rewriting

OLDEST_OPSET, NEWEST_OPSET = 18, 25


def import_onnx(proto: onnx.ModelProto, *, keep_types: bool = False) -> Graph:
    """Read a GPT of ONNX into a Relax function `forward(*inputs, *weights)`.

    Its result is the file's one output, or a tuple of all. Dimensions named in the file (B, T) become symbolic
    integers. keep_types: inputs and outputs have the file's own types, those of 16 bits too, and are cast on the way in
    and out; else floats of 16 bits are float32 there as well. Raises UserError naming the first node that is not
    supported, with its operator, domain and opset.
    """
    opset = check_operators(proto)
    reading = Reading()
    symbols: dict[str, tvm.tirx.Var] = {}
    inputs = [_input(value, symbols, keep_types) for value in proto.graph.input]
    _declare_initializers(reading, proto.graph)
    with reading.builder.function(ENTRY, attrs={"num_input": len(inputs)}):
        with reading.builder.dataflow():
            for value, var in zip(proto.graph.input, inputs, strict=True):
                reading.values[value.name] = reading.emit(_cast(var, held_as(var.ty.dtype)))
            for node in proto.graph.node:
                _convert(reading, node, opset)
            outputs = [reading.builder.emit_output(_output(reading, value, keep_types)) for value in proto.graph.output]
        reading.builder.emit_func_output(
            outputs[0] if len(outputs) == 1 else relax.Tuple(outputs),
            [*inputs, *(reading.values[name] for name in reading.weights)],
        )
    graph = Graph(reading.builder.finalize(), reading.weights)
    return Rewriting(graph).finish()  # without weights that only stood for others, as integers do for floats


def check_operators(proto: onnx.ModelProto) -> int:
    """Check the opset and every node, and give the opset; raises UserError naming the first that is not supported."""
    opsets = {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import}
    opset = opsets.get("ai.onnx", 0)
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise UserError(f"opset {opset}: supported are {OLDEST_OPSET} to {NEWEST_OPSET}; export with one of them")
    for node in proto.graph.node:
        domain = node.domain or "ai.onnx"
        if converter_key(node) not in CONVERTERS:
            raise UserError(
                f"node {node.name!r}: operator {node.op_type} of domain {domain} (opset {opsets.get(domain, '?')}) is "
                f"not supported, only {', '.join(CONVERTERS)} are; python -m export.onnx writes no others"
            )
    return opset


def _input(value: onnx.ValueInfoProto, symbols: dict[str, tvm.tirx.Var], keep_type: bool) -> relax.Var:
    shape = []
    for dim in value.type.tensor_type.shape.dim:
        if dim.dim_param:
            shape.append(symbols.setdefault(dim.dim_param, tvm.tirx.Var(dim.dim_param, "int64")))
        else:
            shape.append(dim.dim_value)
    dtype = _dtype(value)
    return relax.Var(value.name, relax.TensorType(shape, dtype if keep_type else held_as(dtype)))


def _output(reading: Reading, value: onnx.ValueInfoProto, keep_type: bool) -> relax.Expr:
    tensor = reading.tensor(value.name)
    return _cast(tensor, _dtype(value)) if keep_type else tensor


def _dtype(value: onnx.ValueInfoProto) -> str:
    return str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))


def _cast(tensor: relax.Expr, dtype: str) -> relax.Expr:
    return tensor if tensor.ty.dtype == dtype else relax.op.astype(tensor, dtype)


def _declare_initializers(reading: Reading, graph: onnx.GraphProto) -> None:
    """Make weights parameters; lists of integers (shapes, axes), single numbers and masks become formulas."""
    for initializer in graph.initializer:
        array = numpy_helper.to_array(initializer)
        array = array.astype(held_as(str(array.dtype)), copy=False)
        if array.ndim <= 1 and (array.size == 1 or np.issubdtype(array.dtype, np.integer)):
            reading.values[initializer.name] = constant(array)
        elif (formula := band(array)) is not None:
            reading.values[initializer.name] = formula
        else:
            reading.add_weight(initializer.name, array)


def _convert(reading: Reading, node: onnx.NodeProto, opset: int) -> None:
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    try:
        results = CONVERTERS[converter_key(node)](reading, node, attributes)
    except UserError as error:
        raise UserError(f"node {node.name!r} ({node.op_type}, ai.onnx opset {opset}): {error}") from error
    results = results if isinstance(results, tuple) else (results,)
    if len(node.output) != len(results):
        raise UserError(
            f"node {node.name!r} ({node.op_type}, ai.onnx opset {opset}): outputs {', '.join(node.output)} are not "
            f"supported, only the first {len(results)}"
        )
    for name, result in zip(node.output, results, strict=True):
        known = isinstance(result, Indexed | relax.Var | tvm.ir.GenericConst)
        reading.values[name] = result if known else reading.builder.emit(result, name_hint=name)
