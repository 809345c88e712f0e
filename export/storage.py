"""A graph and its weights as one file, or as two that get their names together where one would be too large.

A protobuf message ends at 2 GiB, so larger models keep their weights in a second file. That one is named after its own
content: whatever moment a crash chooses, the graph under the final name, the earlier or the new, finds its own weights.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePath
from typing import BinaryIO

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from gpt.cli import UserError
from gpt.files import flush, sha256_file

FOUR_BITS = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1)
INLINE_BYTES = 2**31 - 2**26  # the most that goes into the graph's own file, which has some room to spare


def external_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a model, in subgraphs and functions too, whose numbers are in another file."""
    yield from filter(uses_external_data, _tensors_of(proto.graph))
    for function in proto.functions:
        yield from filter(uses_external_data, _tensors_in(function.node))


def read_weights(proto: onnx.ModelProto, path: Path) -> None:
    """Put the numbers that a parsed model has in other files into it; path: of the model.

    A file that is a link is read, as hubs' caches are made of links; a name that leads out of the model's folder is
    refused. Raises UserError for that, and for files that are missing or too short.
    """
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for tensor in external_tensors(proto):
            location, offset, length = place_of(tensor, path)
            try:
                if location not in files:
                    files[location] = stack.enter_context(open(path.parent / location, "rb"))
                files[location].seek(offset)
                content = files[location].read(length)
            except OSError as error:
                raise UserError(_unreadable(path, f"{location}: {error.strerror}")) from error
            if len(content) != length:
                raise UserError(
                    _unreadable(path, f"{location}: ends before the {length:,} bytes of {tensor.name!r} at {offset:,}")
                )
            tensor.ClearField("external_data")
            tensor.data_location = onnx.TensorProto.DEFAULT
            tensor.raw_data = content


def place_of(tensor: onnx.TensorProto, path: Path) -> tuple[str, int, int]:
    """Return the file, offset and length of a tensor's numbers; path: of its model.

    Raises UserError for a place that is no file beside the model or is of another length than the tensor.
    """
    try:
        info = ExternalDataInfo(tensor)
        location, offset, length = info.location, info.offset or 0, info.length
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(_unreadable(path, f"where {tensor.name!r} lies is not said")) from error
    parts = PurePath(location)
    if not location or "\0" in location or parts.is_absolute() or ".." in parts.parts:
        raise UserError(
            f"{path}: the weights of {tensor.name!r} are said to lie at {location!r}, which is not beside it: refused; "
            "export it again"
        )
    needed = math.prod(tensor.dims) * itemsize
    if tensor.data_type in FOUR_BITS:
        needed = (math.prod(tensor.dims) + 1) // 2
    if offset < 0 or min(tensor.dims, default=1) < 0 or needed != (needed if length is None else length):
        raise UserError(
            _unreadable(path, f"{tensor.name!r} has {needed:,} bytes, not the {length} at {offset} that are said")
        )
    return location, offset, needed


def _unreadable(path: Path, why: str) -> str:
    return f"{path}: its external data cannot be read ({why}); copy them beside it again"


def _tensors_of(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _tensors_in(graph.node)


def _tensors_in(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for graph in (attribute.g, *attribute.graphs):
                yield from _tensors_of(graph)


def settle_weights(proto: onnx.ModelProto, weights: Path, output: Path) -> Path | None:
    """Move weights into the graph, or name their file as it will be named beside `output`, and return that file.

    weights: the file that the graph's large tensors refer to.
    """
    if not weights.exists():  # a model so small that all is in the graph
        return None
    if weights.stat().st_size <= INLINE_BYTES:
        onnx.load_external_data_for_model(proto, str(weights.parent))
        weights.unlink()
        return None
    named = weights.with_name(f"{output.name}.{sha256_file(weights)[:16]}.data")
    weights.rename(named)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = named.name
    return named


def place_weights(data: Path | None, output: Path) -> None:
    """Give the second file its final place, before the graph gets its own."""
    if data is not None:
        flush(data)
        os.replace(data, output.with_name(data.name))


@contextmanager
def removed_if_failed(output: Path) -> Iterator[None]:
    """Remove after a failure in the block the second files that the graph there, the old or the new, does not name.

    Of a file there that is no graph nobody knows which it needs.
    """
    from google.protobuf.message import DecodeError

    try:
        yield
    except BaseException:
        with suppress(DecodeError):
            named = _named_in(output)
            for file in _second_files(output):
                if file.name not in named:
                    file.unlink()
        raise


def remove_other_weights(data: Path | None, output: Path) -> None:
    """Remove the second files of the exports that were at `output` before, or that a killed export left."""
    for file in _second_files(output):
        if data is None or file.name != data.name:
            file.unlink()


def _second_files(output: Path) -> list[Path]:
    ours = re.compile(re.escape(output.name) + r"\.[0-9a-f]{16}\.data")
    return [file for file in output.parent.glob("*.data") if ours.fullmatch(file.name)]


def _named_in(output: Path) -> set[str]:
    """Return the names of the second files that a graph refers to, none where there is no graph."""
    if not output.exists():
        return set()
    graph = onnx.load(output, load_external_data=False).graph
    return {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}
