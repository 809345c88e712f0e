"""The compiled model: a folder with a library, its weights and a description. Runs without ONNX and without torch."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt.cli import UserError
from gpt.config import GPTConfig, config_from_json
from gpt.files import sha256_file
from tvm_frontend.target import check_runs_here

if TYPE_CHECKING:
    from tvm_frontend.session import CachedSession, Session

FORMAT = 3
LIBRARY, WEIGHTS, DESCRIPTION = "library.so", "weights.bin", "model.json"
REMAKE = "make it again with: python -m tvm_frontend.compile"


@dataclass(frozen=True)
class CompiledModel:
    """A compiled model on disk and what the next room needs to know of it; `load_compiled` reads it.

    path: the folder. config, tokenizer, dtype, form: as in the export, form being `forward` or `cached`. frontend: who
    read it. fixed_shape: the one [B, T] that it takes, None for all. precision: of the products. target:
    `CompileTarget` as JSON. opt_level: 0 or 3. pipeline: the phases that made it, in order. phases_s: the seconds each
    took. exported_sha256, checkpoint_sha256: of the file that was compiled and the checkpoint that it came from.
    files_sha256: of the library and the weights. versions: of the compiler.
    """

    path: Path
    config: GPTConfig
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
    exported_sha256: str
    checkpoint_sha256: str
    files_sha256: dict[str, str]
    versions: dict[str, str]

    def start(self, threads: int | None = None) -> "Session | CachedSession":
        """Load the library and the weights, ready to run on `threads` CPU threads (default: all cores given to us).

        The number of threads is the process's: TVM reads it once, when the first kernel runs. A model with a cache
        gives a `CachedSession`. Raises UserError if this machine cannot run the code.
        """
        from tvm_frontend.session import CachedSession, Session

        check_runs_here(self.target)
        kind = CachedSession if self.form == "cached" else Session
        return kind(self, threads or len(os.sched_getaffinity(0)))


def save_compiled(folder: Path, executable: Any, weights: dict[str, np.ndarray], description: dict[str, Any]) -> None:
    """Write library, weights and description into an existing folder; `description` holds CompiledModel's fields."""
    import tvm

    executable.export_library(str(folder / LIBRARY))
    by_place = {str(i): tvm.runtime.tensor(array) for i, array in enumerate(weights.values())}
    tvm.runtime.save_param_dict_to_file(by_place, str(folder / WEIGHTS))
    files = {name: sha256_file(folder / name) for name in (LIBRARY, WEIGHTS)}
    content = {"format": FORMAT, **description, "files_sha256": files}
    (folder / DESCRIPTION).write_text(json.dumps(content | {"sha256": _sha256(content)}, indent=1))


def is_ours(folder: Path) -> bool:
    """Whether a folder holds nothing but a compiled model, whole or damaged, so that a new one may replace it."""
    return folder.is_dir() and {file.name for file in folder.iterdir()} <= {LIBRARY, WEIGHTS, DESCRIPTION}


def load_compiled(path: Path | str) -> CompiledModel:
    """Read a compiled model's description, after checking that its files are whole. Loads no code.

    Raises UserError if the folder is missing, not one of ours, of another format, or damaged.
    """
    path = Path(path)
    if not (path / DESCRIPTION).is_file():
        raise UserError(f"{path}: no compiled model there (no {DESCRIPTION}); {REMAKE}")
    try:
        content = json.loads((path / DESCRIPTION).read_text())
        sha256 = content.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / DESCRIPTION}: damaged, or not of a compiled model; {REMAKE}") from error
    if sha256 != _sha256(content):
        raise UserError(f"{path / DESCRIPTION}: damaged or edited, it does not match its own hash; {REMAKE}")
    if content.pop("format") != FORMAT:
        raise UserError(f"{path}: written in another format than this code reads; {REMAKE}")
    model = CompiledModel(path=path, **content | {"config": config_from_json(content["config"])})
    for name, sha256 in model.files_sha256.items():
        if not (path / name).is_file() or sha256_file(path / name) != sha256:
            raise UserError(f"{path / name}: missing or damaged, it does not match its hash; {REMAKE}")
    return model


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
