"""Reads ONNX files by TVM's own importer, to compare this project's with, and for other graphs."""

import contextlib
import io
import re
from pathlib import Path

import onnx
import onnx_ir
import onnxscript.optimizer
from tvm.relax.frontend.onnx import from_onnx

from export.artifact import ExportedModel, exported_from, read_onnx
from gpt.cli import UserError
from tvm_frontend.frontends import Source
from tvm_frontend.frontends.upstream import graph_of, node_at, reason_of, unknown_shape
from tvm_frontend.graph import Graph

FIX = "; with --batch and --tokens it has fewer shapes to work out"


def read(model: Path, fixed_shape: tuple[int, int] | None) -> Source:
    """Read an ONNX file of ours, for one [B, T] if given. Raises UserError for another file."""
    exported, proto = read_plain(model, "relax-onnx")
    return Source.of(exported, lambda: import_by_tvm(proto, fixed_shape), fixed_shape=fixed_shape)


def read_plain(model: Path, frontend: str) -> tuple[ExportedModel, onnx.ModelProto]:
    """Read an ONNX file of ours with its weights. Raises UserError for one that neither importer of TVM's takes."""
    file = read_onnx(model)
    exported, proto = exported_from(file), file.proto
    if exported.form != "forward":
        raise UserError(f"{model}: its form is {exported.form}, and --frontend {frontend} takes the plain forward pass")
    if exported.dtype != "float32":
        raise UserError(f"{model}: of {exported.precision}, and --frontend {frontend} takes fp32")
    if exported.weights is not None:
        onnx.load_external_data_for_model(proto, str(exported.weights.parent))
    return exported, proto


def import_by_tvm(proto: onnx.ModelProto, fixed_shape: tuple[int, int] | None) -> Graph:
    """Import the graph by TVM, its shapes folded first if they are fixed.

    Raises UserError naming the first node that TVM cannot read, and where it needs B and T fixed.
    """
    if fixed_shape is not None:
        proto = fold_shapes(proto, fixed_shape)
    advice = "" if fixed_shape is not None else FIX
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the errors that it raises
            module = from_onnx(proto)
    except Exception as error:  # of any type, KeyError and TVM's own among them
        said = f"TVM's importer cannot read {_node_of(error, proto)}: {reason_of(error)}{advice}"
        raise UserError(said) from error
    graph = graph_of(module)
    if operator := unknown_shape(graph):
        raise UserError(f"TVM's importer does not know the shape of what {operator} gives{advice}")
    return graph


def fold_shapes(proto: onnx.ModelProto, fixed_shape: tuple[int, int]) -> onnx.ModelProto:
    """Fix the graph to one [B, T], and compute all that follows from shapes."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    for dim, size in zip(fixed.graph.input[0].type.tensor_type.shape.dim, fixed_shape, strict=True):
        dim.dim_value = size
    del fixed.graph.value_info[:]  # they hold other shapes
    graph = onnx_ir.from_proto(fixed)
    onnxscript.optimizer.optimize_ir(graph)
    return onnx_ir.to_proto(graph)


def _node_of(error: Exception, proto: onnx.ModelProto) -> str:
    """Name the node at which TVM stopped: the one being converted, or the first of an operator that the error names."""
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    named = set(re.findall(r"\w+", str(error)))
    node = node_at(error, onnx.NodeProto) or next((node for node in proto.graph.node if node.op_type in named), None)
    if node is None:
        return "the file"
    return f"node {node.name!r} ({node.op_type}, {node.domain or 'ai.onnx'} opset {opset})"
