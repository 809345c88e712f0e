"""TVM on the exported files: O0 is TVM's own untuned pipeline, O3 this project's schedules."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bench.artifacts import COMPILED_CACHED, COMPILED_O0, COMPILED_O3, Artifacts
from bench.backends import Backend

if TYPE_CHECKING:
    from tvm_frontend.session import CachedSession, Session


class Engine(Backend):
    """The compiled artifacts, each for all shapes, without ONNX or torch."""

    requires: ClassVar[dict[str, str]] = {"tvm": "apache-tvm"}
    summary = "TVM on the exported files: O0 its own untuned pipeline, O3 this project's schedules, a KV cache in place"
    variants: ClassVar[dict[str, dict[str, str]]] = {
        "O0": {"prefill": COMPILED_O0},
        "O3": {"prefill": COMPILED_O3, "decode": COMPILED_CACHED, "generate": COMPILED_CACHED},
    }

    def _load(self, artifacts: Artifacts, threads: int, variant: str) -> None:
        self._forward_folder, self._cached_folder = artifacts.compiled(variant), artifacts.compiled(f"{variant}-cache")
        self._threads = threads

    def _prefill(self, ids: np.ndarray) -> np.ndarray:
        return self._forward.prefill(ids)

    def _fill(self, ids: np.ndarray) -> np.ndarray:
        return self._with_cache.fill(ids)

    def _decode(self, ids: np.ndarray, context: int) -> np.ndarray:
        return self._with_cache.decode(ids, context)

    @cached_property
    def _forward(self) -> "Session":
        return self._start(self._forward_folder)

    @cached_property
    def _with_cache(self) -> "CachedSession":
        return self._start(self._cached_folder)

    def _start(self, folder: Path) -> "Session | CachedSession":
        from tvm_frontend.artifact import load_compiled

        return load_compiled(folder).start(self._threads)

    def versions(self) -> dict[str, str]:
        import tvm

        return {"apache-tvm": tvm.__version__}
