"""TVM on the exported file: O0 is TVM's own untuned pipeline, O3 this project's schedules."""

from typing import ClassVar

import numpy as np

from bench.artifacts import Artifacts
from bench.backends import Backend


class Engine(Backend):
    """The compiled artifact, one for all shapes, without ONNX or torch."""

    requires: ClassVar[dict[str, str]] = {"tvm": "apache-tvm"}
    summary = "TVM on the exported file: O0 its own untuned pipeline, O3 this project's schedules"
    variants = ("O0", "O3")
    stage = "compiled"

    def load(self, artifacts: Artifacts, threads: int, variant: str) -> None:
        from tvm_frontend.artifact import load_compiled

        self._session = load_compiled(artifacts.compiled(variant)).start(threads)

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        return self._session.prefill(ids)

    def versions(self) -> dict[str, str]:
        import tvm

        return {"apache-tvm": tvm.__version__}
