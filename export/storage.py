"""A graph and its weights as one file, or as two that get their names together where one would be too large.

A protobuf message ends at 2 GiB, so larger models keep their weights in a second file. That one is named after its own
content: whatever moment a crash chooses, the graph under the final name, the earlier or the new, finds its own weights.
"""

import os
import re
from pathlib import Path

import onnx

from gpt.files import sha256_file

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
        os.replace(data, output.with_name(data.name))


def remove_other_weights(data: Path | None, output: Path) -> None:
    """Remove the second files of the exports that were at `output` before."""
    ours = re.compile(re.escape(output.name) + r"\.[0-9a-f]{16}\.data")
    for file in output.parent.iterdir():
        if ours.fullmatch(file.name) and (data is None or file.name != data.name):
            file.unlink()
