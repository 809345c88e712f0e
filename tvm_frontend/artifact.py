"""The compiled model on disk, a folder with libraries, weights and a description: saves, loads and checks it.

This is data only. `tvm_frontend.runtime.open_session` runs it, without ONNX and without torch.
"""

import hashlib
import json
import re
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from export.signature import Signature, dtype_named
from gpt.cli import UserError
from gpt.config import GPTConfig, config_from_json
from gpt.files import other_kind
from gpt.tokenizer import check_ids

FORMAT = 9
WEIGHTS, DESCRIPTION = "weights.bin", "model.json"
GRAPH = "graph.json"  # read by Relay's graph executor; other models have their order of calls in the library
PLAIN, CACHED = "plain", "cached"  # further libraries of a file that was compiled as it is
LIBRARY = re.compile(rf"library(-{PLAIN}|-{CACHED})?(-sm_\d+)?\.so")  # as `library_name` names them
SEAL = b"gpt-frontend"  # ends each library, behind 64 hexadecimal digits
ALIGNMENT = 64  # bytes, which TVM's kernels and DLPack ask for
RELAY = "relay"  # the frontend whose models run in an environment of their own
REMAKE = "make it again with: python -m tvm_frontend.compile"


@dataclass(frozen=True)
class CompiledModel:
    """Describes a compiled model on disk; `load_compiled` reads it.

    path: the folder. config, tokenizer, dtype, form: as in the export, form being `forward` or `cached`; a file
    that was compiled as it is, with its own inputs and outputs, is of the form `graph`, and its config is None
    unless it is a GPT-2. frontend: the importer that read the file. fixed_shape: the one [B, T] that it takes, None
    for all. precision: the precision of the products. target: `CompileTarget` as JSON. opt_level: 0 or 3, with
    Relay 0 to 3. pipeline: the phases that made it, in order. phases_s: the seconds each phase took, for all archs
    together. kernels: the number of calls of each kernel in a forward pass. launches: for each kernel on a GPU the
    `function` that it calls, None if TVM wrote it, and the `threads` and `shared_bytes` of a block.
    exported_sha256, checkpoint_sha256: the hashes of the file that was compiled and of the checkpoint that it came
    from. entry_points: the functions of a library. caches: the dtype and the shape after B of each KV cache.
    weights: the name, dtype, shape and byte offset in the file of each weight. files_crc32: the checksums of the
    other files. versions: this project's, with its commit, and the compiler's. search: the trials, seconds and
    folder of the search that found its schedules, None if there was none. signature: how a model of the form
    `graph` is called. parts: its libraries, by the word in their names, each with the names of its `weights` in
    order, its `entry_points` and its `caches`: `` for the file as it is, `plain` for masks of ones and positions
    that count on, `cached` for a cache that is preallocated where the file has one that grows; other models have
    one library and no parts. coverage: `Coverage` as JSON, how much of the work is in this project's kernels; None
    where there are none.
    """

    path: Path
    config: GPTConfig | None
    tokenizer: dict[str, Any]
    dtype: str
    form: str
    frontend: str
    fixed_shape: list[int] | None
    precision: str
    target: dict[str, Any]
    opt_level: int
    pipeline: list[str]
    phases_s: dict[str, float]
    kernels: dict[str, int]
    launches: dict[str, dict[str, Any]]
    exported_sha256: str
    checkpoint_sha256: str
    entry_points: list[str]
    caches: list[dict[str, Any]]
    weights: list[dict[str, Any]]
    files_crc32: dict[str, int]
    versions: dict[str, str]
    search: dict[str, Any] | None = None
    signature: Signature | None = None
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    coverage: dict[str, Any] | None = None

    @property
    def libraries(self) -> list[Path]:
        """List the library for each arch of the target, in its order."""
        return [self.library(arch) for arch in self.target["archs"] or [None]]

    @property
    def gpt(self) -> GPTConfig:
        """The config of a model that is a GPT-2. Raises UserError for another."""
        if self.config is None:
            raise UserError(f"{self.path}: not a GPT-2 that could be recognised in the file that it was compiled from")
        return self.config

    @property
    def longest(self) -> int | None:
        """The most tokens of a sequence; None if nothing says."""
        if self.config is not None:
            return self.config.block_size
        return self.signature.longest if self.signature is not None else None

    @property
    def vocab_size(self) -> int | None:
        """The number of token ids; None if nothing says."""
        if self.config is not None:
            return self.config.vocab_size
        return self.signature.vocab_size if self.signature is not None else None

    def library(self, arch: str | None, part: str = "") -> Path:
        """Name a part's library for a GPU's arch, or for the CPU with None."""
        return self.path / library_name(arch, part)

    def with_cache(self) -> "CompiledModel | None":
        """Return the part of a file with a growing cache that was compiled for a preallocated one, None without it."""
        if CACHED not in self.parts:
            return None
        about = self.parts[CACHED]
        return replace(self, form="cached", caches=about["caches"], entry_points=about["entry_points"])

    def map_weights(self, part: str = "") -> list[np.ndarray]:
        """Map a library's weights, in the order of the arguments, as views: only what is read takes memory."""
        file = np.memmap(self.path / WEIGHTS, np.uint8, "c")  # copy-on-write, as DLPack takes writable memory only
        views = {
            each["name"]: np.ndarray(each["shape"], dtype_named(each["dtype"]), file, each["offset"])
            for each in self.weights
        }
        return [views[name] for name in (self.parts[part]["weights"] if self.parts else views)]

    def check_ids(self, ids: Any, filled: int = 0) -> np.ndarray:
        """Convert token ids to an array and check them.

        Raises UserError unless they are [B, T], in the vocabulary, fit after `filled` tokens in a cache, and have the
        fixed shape, if the model has one.
        """
        ids = as_array("ids", ids)
        longest = self.longest
        if ids.ndim != 2 or ids.shape[1] < 1 or (longest is not None and ids.shape[1] > longest - filled):
            after = f" after {filled} in the cache" if filled else ""
            to = "on" if longest is None else f"to {longest - filled}"
            raise UserError(f"ids of shape {list(ids.shape)}{after}: must be [B, T] with T from 1 {to}")
        if self.fixed_shape and list(ids.shape) != self.fixed_shape:
            raise UserError(f"ids of shape {list(ids.shape)}: this model was compiled for {self.fixed_shape} alone")
        check_ids(ids, self.vocab_size)
        return ids


def as_array(name: str, value: Any) -> np.ndarray:
    """Convert an argument of that name to an array. Raises UserError for lists that are none."""
    try:
        return np.asarray(value)
    except ValueError:
        raise UserError(f"{name}: lists of different lengths are no array; pad the shorter ones") from None


def library_name(arch: str | None, part: str = "") -> str:
    """Name the file of a part's library for a GPU's arch, or for the CPU with None."""
    return "-".join(filter(None, ["library", part, arch])) + ".so"


def save_compiled(folder: Path, weights: dict[str, np.ndarray], description: dict[str, Any]) -> None:
    """Write weights and description beside the libraries in a folder; `description` holds CompiledModel's fields.

    Each library is sealed: the description's hash is put at its end, which the linker and the loader do not read. So no
    description is believed but the one that a library was compiled with: code that is told of more tokens, positions
    or instructions than it was made for reads and writes beyond its memory.
    """
    table = _save_weights(folder / WEIGHTS, weights)
    names = sorted(file.name for file in folder.iterdir())
    files = {name: _crc32(folder / name) for name in names if not LIBRARY.fullmatch(name)}
    content = {"format": FORMAT, **description, "weights": table, "files_crc32": dict.fromkeys(names, 0) | files}
    for name in filter(LIBRARY.fullmatch, names):
        with open(folder / name, "ab") as library:
            library.write(_seal(content, name))
    content["files_crc32"] = {name: _crc32(folder / name) for name in names}
    (folder / DESCRIPTION).write_text(json.dumps(content | {"sha256": _sha256(content)}, indent=1))


def is_ours(folder: Path) -> bool:
    """Tell if a folder holds nothing but a compiled model, whole or damaged, so that a new one may replace it."""
    return folder.is_dir() and all(
        file.name in (GRAPH, WEIGHTS, DESCRIPTION) or LIBRARY.fullmatch(file.name) for file in folder.iterdir()
    )


def load_compiled(path: Path | str) -> CompiledModel:
    """Read a compiled model's description, after checking that its files are whole and of that model. Loads no code.

    Raises UserError if the folder is missing, not one of ours, of another format, damaged, or made of several.
    """
    path = Path(path)
    if not (path / DESCRIPTION).is_file():
        if kind := other_kind(path, "compiled model"):
            raise UserError(f"{path}: not a compiled model but {kind}")
        raise UserError(f"{path}: no compiled model there (no {DESCRIPTION}); {REMAKE}")
    try:
        content = json.loads((path / DESCRIPTION).read_text())
        sha256 = content.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / DESCRIPTION}: damaged, or not of a compiled model; {REMAKE}") from error
    if sha256 != _sha256(content):
        raise UserError(f"{path / DESCRIPTION}: damaged or edited, it does not match its own hash; {REMAKE}")
    if content.get("format") != FORMAT:
        raise UserError(f"{path}: written in another format than this code reads; {REMAKE}")
    files = content.get("files_crc32")
    libraries = list(filter(LIBRARY.fullmatch, files)) if isinstance(files, dict) else []
    if not libraries:
        raise UserError(f"{path / DESCRIPTION}: damaged, it names no library; {REMAKE}")
    for name, crc32 in files.items():
        if Path(name).name != name or not (path / name).is_file() or _crc32(path / name) != crc32:
            raise UserError(f"{path / name}: missing or damaged, it does not match its checksum; {REMAKE}")
    for name in libraries:
        if not (path / name).read_bytes().endswith(_seal(content, name)):
            raise UserError(f"{path / DESCRIPTION}: edited, or of another model than {name}; {REMAKE}")
    content.pop("format")
    read: dict[str, Any] = {"config": content["config"] and config_from_json(content["config"])}
    read["signature"] = content.get("signature") and Signature.from_json(content["signature"])
    return CompiledModel(path=path, **content | read)


def _seal(content: dict[str, Any], name: str) -> bytes:
    """Make the end of a library of that name: the hash of the description without the checksums of libraries."""
    files = {file: 0 if LIBRARY.fullmatch(file) else crc32 for file, crc32 in content["files_crc32"].items()}
    return _sha256(content | {"files_crc32": files, "library": name}).encode() + SEAL


def _save_weights(path: Path, weights: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Write the arrays one after the other, each at a multiple of ALIGNMENT; return the table of their offsets."""
    table = []
    with open(path, "wb") as file:
        for name, array in weights.items():
            file.write(bytes(-file.tell() % ALIGNMENT))
            about = {"name": name, "dtype": str(array.dtype), "shape": list(array.shape), "offset": file.tell()}
            table.append(about)
            file.write(np.ascontiguousarray(array).data)
    return table


def _crc32(path: Path) -> int:
    """Compute the CRC-32 of a file: it finds accidental damage as SHA-256 does, in a fraction of the time."""
    crc, chunk = 0, memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(chunk):
            crc = zlib.crc32(chunk[:count], crc)
    return crc


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
