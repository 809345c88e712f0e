"""A checkpoint to an ONNX graph by either of torch's exporters, asserted to be what was asked for."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from export.forms import Described, Form, entry_point_of
from export.graph import opsets_of
from export.weights import model_of
from gpt.checkpoint import Checkpoint

WEIGHTS = "weights"  # the file beside the graph that holds them until both are settled
APART_BYTES = 1024  # smaller tensors, constants of shapes among them, stay in the graph
EntryPoint = dict[str, Described]


def trace(
    checkpoint: Checkpoint, form: Form, opset: int, exporter: str, dtype: str, last: bool, folder: Path
) -> onnx.ModelProto:
    """Trace one form to a graph, its weights in a file `WEIGHTS` in `folder`, which is for such files only.

    Raises RuntimeError if the exporter wrote another opset, other inputs or other outputs than were asked for.
    """
    # dynamo keeps sdpa as one Attention node from opset 23 on; torchscript spells it out, ill-typed below float32
    attention = "sdpa" if exporter == "dynamo" else "explicit"
    model = form.module(model_of(checkpoint, attention, getattr(torch, dtype)), last).eval()
    wanted = entry_point_of(form, checkpoint.config, dtype, last)
    with _quiet_exporter():
        if exporter == "dynamo":
            graph = _by_dynamo(model, wanted, opset, checkpoint.config.block_size)
        else:
            graph = _by_torchscript(model, wanted, opset, checkpoint.config.block_size, folder)
    # as torch.onnx's own `optimize=True`, but a tied head is not folded into a transposed copy of the embedding
    onnxscript.optimizer.optimize_ir(graph, should_fold=lambda node: False if node.op_type == "Transpose" else None)
    onnx_ir.external_data.unload_from_model(graph, folder, WEIGHTS, size_threshold_bytes=APART_BYTES)
    proto = onnx_ir.to_proto(graph)
    _name_weights(proto)
    _name_dimensions(proto, wanted)
    _forget_origins(proto)
    _check_written(proto, wanted, opset)
    return proto


def _by_dynamo(model: nn.Module, wanted: EntryPoint, opset: int, block_size: int) -> onnx_ir.Model:
    program = torch.onnx.export(
        model,
        _arguments(_examples(wanted, block_size)),
        input_names=list(wanted["inputs"]),
        output_names=list(wanted["outputs"]),
        opset_version=opset,
        dynamo=True,
        dynamic_shapes=_arguments(_dynamic_shapes(wanted, block_size)),
        optimize=False,
        verbose=False,
    )
    assert program is not None  # None is of the other exporter
    return program.model


def _by_torchscript(model: nn.Module, wanted: EntryPoint, opset: int, block_size: int, folder: Path) -> onnx_ir.Model:
    """Export by torch's former exporter, which writes files only: weights of over 2 GB go into one file each."""
    torch.onnx.export(
        model,
        _arguments(_examples(wanted, block_size)),
        folder / "traced.onnx",
        input_names=list(wanted["inputs"]),
        output_names=list(wanted["outputs"]),
        opset_version=opset,
        dynamo=False,
        do_constant_folding=False,  # it would store a tied head twice
        dynamic_axes={
            name: {axis: dim for axis, dim in enumerate(dims) if isinstance(dim, str)}
            for name, (_, dims) in (wanted["inputs"] | wanted["outputs"]).items()
        },
    )
    return onnx_ir.load(folder / "traced.onnx")


def _examples(wanted: EntryPoint, block_size: int) -> list[Tensor]:
    sizes = {"B": 2, "T": min(block_size, 8), "P": 5}  # any but 0 and 1, which torch takes for constants
    return [
        torch.zeros([dim if isinstance(dim, int) else sizes[dim] for dim in dims], dtype=getattr(torch, dtype))
        for dtype, dims in wanted["inputs"].values()
    ]


def _dynamic_shapes(wanted: EntryPoint, block_size: int) -> list[dict[int, Any]]:
    limits = {"B": {"min": 1}, "T": {"min": 1, "max": max(2, block_size)}, "P": {"min": 0}}
    dims = {name: torch.export.Dim(name, **limit) for name, limit in limits.items()}
    return [
        {axis: dims[dim] for axis, dim in enumerate(described) if dim in dims}
        for _, described in wanted["inputs"].values()
    ]


def _arguments(inputs: list[Any]) -> tuple[Any, ...]:
    """Group what stands for the inputs as the module's arguments are: the tensors of a cache are one list."""
    plain = 2 if len(inputs) % 2 == 0 else 1  # ids alone, or ids and pos, before the pairs of keys and values
    return (*inputs[:plain], inputs[plain:]) if len(inputs) > plain else tuple(inputs)


def _name_weights(proto: onnx.ModelProto) -> None:
    """Call the weights what the checkpoint calls them: the traced module has the model in its attribute `model`."""
    for tensor in proto.graph.initializer:
        tensor.name = tensor.name.removeprefix("model.")
    for node in proto.graph.node:
        node.input[:] = [name.removeprefix("model.") for name in node.input]


def _name_dimensions(proto: onnx.ModelProto, wanted: EntryPoint) -> None:
    """Call the dynamic dimensions B, T and P, whatever names the exporter made up."""
    names = {}
    for value in proto.graph.input:
        for dim, name in zip(value.type.tensor_type.shape.dim, wanted["inputs"][value.name][1], strict=True):
            if dim.dim_param:
                names[dim.dim_param] = str(name)
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            dim_param = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), dim.dim_param)
            if dim_param:
                dim.dim_param = dim_param.replace(" ", "")
    for value in proto.graph.output:
        for dim, name in zip(value.type.tensor_type.shape.dim, wanted["outputs"][value.name][1], strict=True):
            if sorted(dim.dim_param.split("+")) == sorted(str(name).split("+")):
                dim.dim_param = str(name)  # T+P is P+T
            elif dim.dim_param and isinstance(name, int):
                dim.dim_value = name  # where torchscript inferred none: the checker infers it again, and runs show it


def _forget_origins(proto: onnx.ModelProto) -> None:
    """Drop the exporter's notes on where each node came from: stack traces with the paths of this machine."""
    for item in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    proto.graph.ClearField("metadata_props")
    proto.ClearField("metadata_props")


def _check_written(proto: onnx.ModelProto, wanted: EntryPoint, opset: int) -> None:
    if (written := opsets_of(proto)["ai.onnx"]) != opset:
        raise RuntimeError(f"torch.onnx wrote opset {written} where {opset} was asked for")
    if domains := {node.domain for node in proto.graph.node} - {"", "ai.onnx"} or {f.name for f in proto.functions}:
        raise RuntimeError(f"torch.onnx wrote more than ONNX's own operators: {', '.join(sorted(domains))}")
    for part, values in (("inputs", proto.graph.input), ("outputs", proto.graph.output)):
        found = {value.name: _described(value) for value in values}
        if list(found.items()) != list(wanted[part].items()):
            raise RuntimeError(f"torch.onnx wrote the {part} {found} where {wanted[part]} were asked for")


def _described(value: onnx.ValueInfoProto) -> tuple[str, list[str | int]]:
    tensor = value.type.tensor_type
    dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    dims = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return {"float": "float32"}.get(dtype, dtype), dims


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what torch.onnx says of packages that we do not use and of its own deprecations."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)  # of the torchscript exporter, asked for by name
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # the proof runs other lengths than the trace
            warnings.filterwarnings("ignore", "ONNX export mode is set", UserWarning)  # by a dropout of probability 0
            warnings.filterwarnings("ignore", "# The axis name", UserWarning)  # one B for all inputs is what is meant
            yield
    finally:
        logger.setLevel(level)
