"""A graph and its weights as one file, or as two that get their names together where one would be too large.

A protobuf message ends at 2 GiB, so larger models keep their weights in a second file. That one is named after its own
content: whatever moment a crash chooses, the graph under the final name, the earlier or the new, finds its own weights.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import onnx

from gpt.files import flush, sha256_file

INLINE_BYTES = 2**31 - 2**26  # the most that goes into the graph's own file, which has some room to spare


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
