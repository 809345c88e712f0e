"""OpenVINO's CPU plugin on the exported file, held to float32."""

from typing import ClassVar

import numpy as np

from bench.artifacts import Artifacts
from bench.backends import Backend


class Engine(Backend):
    """The model reshaped and compiled anew for each shape; the first call at a shape compiles and is never timed."""

    requires: ClassVar[dict[str, str]] = {"openvino": "openvino"}
    summary = "OpenVINO, CPU plugin held to float32, on the exported file, one compilation a shape"
    stage = "exported"

    def load(self, artifacts: Artifacts, threads: int, variant: str) -> None:
        import openvino

        self._core = openvino.Core()
        self._path = artifacts.exported
        self._settings = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",  # by default bfloat16 where the CPU has it
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        self._compiled = {}

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        if ids.shape not in self._compiled:
            model = self._core.read_model(self._path)
            model.reshape(list(ids.shape))
            self._compiled[ids.shape] = self._core.compile_model(model, "CPU", self._settings)
        return self._compiled[ids.shape](ids, share_inputs=True, share_outputs=True)[0]

    def versions(self) -> dict[str, str]:
        import openvino

        return {"openvino": openvino.__version__}
