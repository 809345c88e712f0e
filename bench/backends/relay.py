"""Runs modules of Relay, TVM's former graph language, by its graph executor: one module for each shape."""

import os
from pathlib import Path
from typing import ClassVar

import numpy as np

from bench.backends import ArtifactsT, Backend, Variant
from bench.harness.worker import Interpreter
from bench.models.artifacts import COMPILED_RELAY, Artifacts
from gpt.cli import UserError
from tvm_frontend.artifact import GRAPH, WEIGHTS, load_compiled
from tvm_frontend.relay.environment import find_environment, why_absent
from tvm_frontend.relay.worker import Executor, weights_of


class RelayEngine(Backend[ArtifactsT]):
    """Runs in Relay's own Python environment, which has TVM 0.17; the modules are built beforehand, one per shape.

    A subclass implements `_load` by `_start`.
    """

    requires: ClassVar[dict[str, str]] = {}
    static = True

    @classmethod
    def why_absent(cls) -> str | None:
        return why_absent()

    @classmethod
    def interpreter(cls) -> Interpreter:
        environment = find_environment()
        return Interpreter(str(environment.python), tuple(environment.variables.items()))

    def _start(self, folder: Path, arch: str | None = None) -> None:
        """Prepare to open the modules in a folder, for a GPU's arch or the CPU."""
        self._folder, self._arch = folder.resolve(), arch
        os.chdir(find_environment().folder)
        self._of_shape: tuple[tuple[int, int], Executor] | None = None  # the last shape that was run

    def _prefill(self, ids: np.ndarray) -> np.ndarray:
        return self._at(ids.shape).run(ids)

    def _at(self, shape: tuple[int, int]) -> Executor:
        if self._of_shape is None or self._of_shape[0] != shape:
            self._of_shape = None  # free it first: each module copies the weights
            self._of_shape = shape, self._open(shape)
        return self._of_shape[1]

    def _open(self, shape: tuple[int, int]) -> Executor:
        path = self._folder / "x".join(map(str, shape))
        if not path.exists():
            raise UserError(f"Relay's modules are of one shape each, and there is none for {path.name}")
        model = load_compiled(path)
        weights = weights_of(path / WEIGHTS, model.weights)
        return Executor(model.library(self._arch), path / GRAPH, weights, model.target["kind"])

    def versions(self) -> dict[str, str]:
        from importlib.metadata import version

        import tvm

        return {"Relay": f"TVM {tvm.__version__} of bitblas {version('bitblas')}"}


class Engine(RelayEngine[Artifacts]):
    """Runs the modules of the forward pass on a CPU."""

    summary = "Relay of TVM 0.17, LLVM 10, on the exported files: a module for each shape, by its graph executor"
    variants: ClassVar[dict[str, Variant]] = {
        "O0": Variant({"prefill": COMPILED_RELAY.format(0)}, about="no optimisation"),
        "O3": Variant({"prefill": COMPILED_RELAY.format(3)}, about="all of Relay's own, not tuned"),
    }

    def _load(self, artifacts: Artifacts, threads: int) -> None:
        self._start(artifacts.folder / self.variant.files["prefill"])
