"""Relay, TVM's former importer, on the exported files: a module for each shape, by its graph executor."""

import os
from typing import ClassVar

import numpy as np

from bench.artifacts import COMPILED_RELAY, Artifacts
from bench.backends import Backend, Variant
from bench.worker import Interpreter
from gpt.cli import UserError
from tvm_frontend.artifact import GRAPH, WEIGHTS, load_compiled
from tvm_frontend.relay.environment import find_environment, why_absent
from tvm_frontend.relay.worker import Executor, weights_of


class Engine(Backend):
    """Runs in Relay's own environment, with TVM 0.17 in this process; the modules are built before, one a shape."""

    requires: ClassVar[dict[str, str]] = {}
    summary = "Relay of TVM 0.17, LLVM 10, on the exported files: a module for each shape, by its graph executor"
    variants: ClassVar[dict[str, Variant]] = {
        "O0": Variant({"prefill": COMPILED_RELAY.format(0)}, about="no optimisation"),
        "O3": Variant({"prefill": COMPILED_RELAY.format(3)}, about="all of Relay's own, not tuned"),
    }
    static = True

    @classmethod
    def why_absent(cls) -> str | None:
        return why_absent()

    @classmethod
    def interpreter(cls) -> Interpreter:
        environment = find_environment()
        return Interpreter(str(environment.python), tuple(environment.variables.items()))

    def _load(self, artifacts: Artifacts, threads: int) -> None:
        self._folder = (artifacts.folder / self.variant.files["prefill"]).resolve()
        os.chdir(find_environment().folder)
        self._of_shape: tuple[tuple[int, int] | None, Executor | None] = None, None  # the last one

    def _prefill(self, ids: np.ndarray) -> np.ndarray:
        if self._of_shape[0] != ids.shape:
            self._of_shape = None, None  # each has weights of its own
            self._of_shape = ids.shape, self._open(ids.shape)
        return self._of_shape[1].run(ids)

    def _open(self, shape: tuple[int, int]) -> Executor:
        path = self._folder / "x".join(map(str, shape))
        if not path.exists():
            raise UserError(f"Relay's modules are of one shape each, and there is none for {path.name}")
        model = load_compiled(path)
        return Executor(model.library(None), path / GRAPH, weights_of(path / WEIGHTS, model.weights))

    def versions(self) -> dict[str, str]:
        from importlib.metadata import version

        import tvm

        return {"Relay": f"TVM {tvm.__version__} of bitblas {version('bitblas')}"}
