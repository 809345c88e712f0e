"""What every consumer of an export reads. No torch; onnx only while a file is being loaded."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.cli import UserError
from gpt.config import GPTConfig, config_from_json
from gpt.files import sha256_file

if TYPE_CHECKING:
    import onnx

PREFIX = "gpt_frontend."  # of our keys in the file's metadata_props
FORMAT = 1


@dataclass(frozen=True)
class ExportedModel:
    """An ONNX file of ours and what the next room needs to know of it.

    path: the .onnx file. config, tokenizer: of the checkpoint (the tokenizer as `gpt.tokenizer` spells it in JSON).
    entry_points: {"forward": {"inputs": {name: [dtype, dims]}, "outputs": …}}, dims being B, T or numbers.
    opset: of the default ONNX domain. dtype: of the weights. exporter: what wrote it, with versions.
    checkpoint_sha256: of the checkpoint file that it came from. sha256: of the ONNX file itself.
    """

    path: Path
    config: GPTConfig
    tokenizer: dict[str, Any]
    entry_points: dict[str, Any]
    opset: int
    dtype: str
    exporter: str
    checkpoint_sha256: str
    sha256: str


def metadata_of(
    *,
    config: GPTConfig,
    tokenizer: dict[str, Any],
    entry_points: dict[str, Any],
    dtype: str,
    exporter: str,
    checkpoint_sha256: str,
    graph: "onnx.GraphProto",
) -> dict[str, str]:
    """The metadata_props that `load_exported` reads back; `graph_sha256` covers the graph with its weights."""
    return {
        PREFIX + "format": str(FORMAT),
        PREFIX + "config": json.dumps(asdict(config)),
        PREFIX + "tokenizer": json.dumps(tokenizer),
        PREFIX + "entry_points": json.dumps(entry_points),
        PREFIX + "dtype": dtype,
        PREFIX + "exporter": exporter,
        PREFIX + "checkpoint_sha256": checkpoint_sha256,
        PREFIX + "graph_sha256": _graph_sha256(graph),
    }


def load_exported(path: Path | str) -> "ExportedModel":
    """Read the description of an ONNX file written by `python -m export.onnx`, after checking that it is whole.

    Raises UserError if the file is missing, not ONNX, not one of ours, or its graph does not match its own hash.
    """
    return load_exported_proto(path)[0]


def load_exported_proto(path: Path | str) -> "tuple[ExportedModel, onnx.ModelProto]":
    """As `load_exported`, with the parsed file beside it."""
    import onnx
    from google.protobuf.message import DecodeError

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; make one with: python -m export.onnx CHECKPOINT -o {path}")
    try:
        proto = onnx.load(path)
    except (DecodeError, OSError) as error:
        raise UserError(
            f"{path}: not a readable ONNX file ({error}); export it again with python -m export.onnx"
        ) from error
    found = {prop.key.removeprefix(PREFIX): prop.value for prop in proto.metadata_props if prop.key.startswith(PREFIX)}
    if found.get("format") != str(FORMAT):
        raise UserError(
            f"{path}: not an export of this project (no {PREFIX}format={FORMAT} in its metadata); "
            "make one with python -m export.onnx"
        )
    if _graph_sha256(proto.graph) != found["graph_sha256"]:
        raise UserError(
            f"{path}: its graph does not match its own hash, so it was damaged or edited; "
            "export it again with python -m export.onnx"
        )
    model = ExportedModel(
        path=path,
        config=config_from_json(json.loads(found["config"])),
        tokenizer=json.loads(found["tokenizer"]),
        entry_points=json.loads(found["entry_points"]),
        opset=next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")),
        dtype=found["dtype"],
        exporter=found["exporter"],
        checkpoint_sha256=found["checkpoint_sha256"],
        sha256=sha256_file(path),
    )
    return model, proto


def _graph_sha256(graph: "onnx.GraphProto") -> str:
    return hashlib.sha256(graph.SerializeToString(deterministic=True)).hexdigest()
