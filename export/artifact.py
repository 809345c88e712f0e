"""Describe an export to all that read it. No torch; onnx is imported only while a file is being loaded."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.cli import UserError
from gpt.config import GPTConfig, config_from_json
from gpt.files import ARTIFACTS, other_kind, sha256_file
from gpt.version import project_version

if TYPE_CHECKING:
    import onnx

PREFIX = "gpt_frontend."  # begins our keys in the file's metadata_props
FORMAT = 2
HASH = "content_sha256"
UNSEALED = "0" * 64  # stands in the place of the hash while it is computed
FLAGS = {"-cache": " --with-cache", "-past": " --cache past"}  # make a file whose default name has this in it
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # give the dtype of weights and caches


@dataclass(frozen=True)
class ExportedModel:
    """An ONNX file of ours and what the next room needs to know of it.

    path: the .onnx file. config, tokenizer: of the checkpoint (the tokenizer as `gpt.tokenizer` spells it in JSON).
    entry_points: {form: {"inputs": {name: [dtype, dims]}, "outputs": …}} in order, dims being B, T, P, P+T or numbers.
    opset: of the default ONNX domain. dtype: of weights and caches. fp32_islands: the operators that compute in float32
    all the same. exporter: what wrote it, with versions. checkpoint_sha256: of the checkpoint file that it came from.
    weights: the second file, if a model too large for one has it. sha256: of the ONNX file, which holds the second's.
    version: of this project when it wrote the file, with its commit; None in files from before it was recorded.
    """

    path: Path
    config: GPTConfig
    tokenizer: dict[str, Any]
    entry_points: dict[str, Any]
    opset: int
    dtype: str
    fp32_islands: tuple[str, ...]
    exporter: str
    checkpoint_sha256: str
    weights: Path | None
    sha256: str
    version: str | None = None

    @property
    def form(self) -> str:
        """The one entry point: `forward`, `cached` or `past`."""
        return next(iter(self.entry_points))

    @property
    def precision(self) -> str:
        """`fp32`, `fp16` or `bf16`; of a quantised export `int8`."""
        return next((name for name, dtype in PRECISIONS.items() if dtype == self.dtype), self.dtype)

    @property
    def last(self) -> bool:
        """True if the logits are of the last position only."""
        return self.entry_points[self.form]["outputs"]["logits"][1][1] == 1 != self.config.block_size

    @property
    def size_bytes(self) -> int:
        """Bytes of the file, or of both files."""
        return sum(file.stat().st_size for file in (self.path, self.weights) if file)


def metadata_of(
    *,
    config: GPTConfig,
    tokenizer: dict[str, Any],
    entry_points: dict[str, Any],
    dtype: str,
    exporter: str,
    checkpoint_sha256: str,
    fp32_islands: Sequence[str] = (),
    weights: Path | None = None,
) -> dict[str, str]:
    """Return the metadata_props for `load_exported`, with a place for the hash that `write_exported` fills in.

    weights: the second file, under its last name, if there is one.
    """
    metadata = {
        PREFIX + "format": str(FORMAT),
        PREFIX + "config": json.dumps(asdict(config)),
        PREFIX + "tokenizer": json.dumps(tokenizer),
        PREFIX + "entry_points": json.dumps(entry_points),
        PREFIX + "dtype": dtype,
        PREFIX + "fp32_islands": json.dumps(sorted(fp32_islands)),
        PREFIX + "exporter": exporter,
        PREFIX + "version": project_version(),
        PREFIX + "checkpoint_sha256": checkpoint_sha256,
    }
    if weights is not None:
        about = {"file": weights.name, "bytes": weights.stat().st_size, "sha256": sha256_file(weights)}
        metadata[PREFIX + "weights"] = json.dumps(about)
    return metadata | {PREFIX + HASH: UNSEALED}


def write_exported(proto: "onnx.ModelProto", path: Path) -> None:
    """Write a model with the metadata of `metadata_of` as a file that holds the hash of all its other bytes."""
    content = bytearray(proto.SerializeToString())
    place = content.rindex(UNSEALED.encode())
    content[place : place + len(UNSEALED)] = hashlib.sha256(content).hexdigest().encode()
    path.write_bytes(content)


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file that was read once: what is checked, parsed and run are the same bytes."""

    path: Path
    content: bytes
    proto: "onnx.ModelProto"


def load_exported(path: Path | str) -> ExportedModel:
    """Read the description of an ONNX file written by `python -m export.onnx`, after checking that it is whole.

    The hash covers every byte of the file, and of the second file with its weights if there is one. It finds damage and
    a file that was mixed up with another; it is no signature. Raises UserError if the file is missing, not ONNX, not
    one of ours, or does not match its own hash.
    """
    return exported_from(read_onnx(path))


def read_proto(path: Path | str) -> "onnx.ModelProto":
    """Parse any ONNX file. Raises UserError if it is missing or not ONNX."""
    return read_onnx(path).proto


def read_onnx(path: Path | str) -> OnnxFile:
    """Read and parse any ONNX file. Raises UserError if it is missing or not ONNX."""
    import onnx
    from google.protobuf.message import DecodeError

    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file; make one with: {_how_to_make(path)}")
    if kind := other_kind(path, "ONNX file"):
        raise UserError(f"{path}: not an ONNX file but {kind}")
    if path.is_dir():
        raise UserError(f"{path}: a folder; name the ONNX file in it, or make one with python -m export.onnx")
    try:
        content = path.read_bytes()
        proto = onnx.load_model_from_string(content, format="protobuf")  # whatever the file is called
    except (DecodeError, OSError) as error:
        raise UserError(
            f"{path}: not a readable ONNX file ({error}); export it again with python -m export.onnx"
        ) from error
    if not all(isinstance(text, str) for text in _texts(proto)):  # protobuf gives bytes that are no UTF-8 as they are
        raise UserError(
            f"{path}: not a readable ONNX file (a name in it is no UTF-8 text); export it again with "
            "python -m export.onnx"
        )
    if not proto.graph.node:  # protobuf takes an empty file for an empty message
        raise UserError(f"{path}: holds no graph; export it again with python -m export.onnx")
    return OnnxFile(path, content, proto)


def _texts(proto: "onnx.ModelProto") -> Iterator[str | bytes]:
    """Yield the texts of a model by which its parts are found and told apart."""
    yield from (text for prop in proto.metadata_props for text in (prop.key, prop.value))
    yield from (entry.domain for entry in proto.opset_import)
    yield from (proto.producer_name, proto.producer_version)
    graph = proto.graph
    for values in (graph.input, graph.output, graph.value_info, graph.initializer):
        yield from (value.name for value in values)
    for tensor in graph.initializer:
        yield from (text for entry in tensor.external_data for text in (entry.key, entry.value))
    for node in (*graph.node, *(node for function in proto.functions for node in function.node)):
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


def _how_to_make(path: Path) -> str:
    """Return the commands that make an ONNX file of this name: from a checkpoint on, if there is none."""
    flag = next((flag for name, flag in FLAGS.items() if name in path.name), "")
    output = "" if path in (ARTIFACTS / f"model{name}.onnx" for name in ("", *FLAGS)) else f" -o {path}"
    export = f"python -m export.onnx{flag}{output}"
    return export if (ARTIFACTS / "ckpt.pt").exists() else f"python -m gpt.train, then {export}"


def exported_from(file: OnnxFile) -> ExportedModel:
    """Read the description in a file. Raises UserError if it is not one of ours or does not match its hash."""
    path, proto = file.path, file.proto
    metadata = {prop.key: prop.value for prop in proto.metadata_props if prop.key.startswith(PREFIX)}
    found = {key.removeprefix(PREFIX): value for key, value in metadata.items()}
    if found.get("format") != str(FORMAT):
        raise UserError(
            f"{path}: not an export of this project (no {PREFIX}format={FORMAT} in its metadata); "
            "make one with python -m export.onnx"
            if "format" not in found
            else f"{path}: has format {found['format'][:20]!r} and this code reads {FORMAT}; "
            "export it again with python -m export.onnx"
        )
    if not _is_sealed(file.content, found.get(HASH, "")):
        raise UserError(
            f"{path}: does not match its own hash, so it was damaged or edited; "
            "export it again with python -m export.onnx"
        )
    opset = _opset(proto)
    if opset is None:
        raise UserError(f"{path}: names no opset of ONNX itself; export it again with python -m export.onnx")
    try:
        return _described(path, opset, file.content, found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError) and str(error).startswith(str(path)):
            raise
        raise UserError(
            f"{path}: its metadata make no sense ({error}); export it again with python -m export.onnx"
        ) from error


def _described(path: Path, opset: int, content: bytes, found: dict[str, str]) -> ExportedModel:
    return ExportedModel(
        path=path,
        config=config_from_json(json.loads(found["config"])),
        tokenizer=json.loads(found["tokenizer"]),
        entry_points=json.loads(found["entry_points"]),
        opset=opset,
        dtype=found["dtype"],
        fp32_islands=tuple(json.loads(found.get("fp32_islands", "[]"))),
        exporter=found["exporter"],
        checkpoint_sha256=found["checkpoint_sha256"],
        weights=_check_weights(path, json.loads(found["weights"])) if "weights" in found else None,
        sha256=hashlib.sha256(content).hexdigest(),
        version=found.get("version"),
    )


def _check_weights(path: Path, about: dict[str, Any]) -> Path:
    """Return the second file of an export if it is whole. Raises UserError."""
    file = path.with_name(about["file"])
    again = "copy it there again, or export again with python -m export.onnx"
    if not file.is_file():
        raise UserError(f"{path}: the file of its weights is missing, {file}; {again}")
    if (size := file.stat().st_size) != about["bytes"]:
        raise UserError(f"{path}: its weights in {file} are truncated: {size} of {about['bytes']} bytes; {again}")
    if sha256_file(file) != about["sha256"]:
        raise UserError(f"{path}: its weights in {file} do not match their hash, so they were damaged; {again}")
    return file


def _is_sealed(content: bytes, sha256: str) -> bool:
    """Return whether a file's bytes have a hash, which stands in them where it was not yet when it was computed."""
    place = content.rfind(sha256.encode())
    if len(sha256) != len(UNSEALED) or place < 0:
        return False
    found = hashlib.sha256(memoryview(content)[:place])
    found.update(UNSEALED.encode())
    found.update(memoryview(content)[place + len(UNSEALED) :])
    return found.hexdigest() == sha256


def _opset(proto: "onnx.ModelProto") -> int | None:
    """Return the version of the default ONNX domain."""
    return next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), None)
