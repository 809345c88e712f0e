"""ONNX Runtime's CPU provider on the exported file."""

from typing import ClassVar

import numpy as np

from bench.artifacts import Artifacts
from bench.backends import Backend


class Engine(Backend):
    """One session for all shapes, all graph optimisations on, threads that spin between operators (its default)."""

    requires: ClassVar[dict[str, str]] = {"onnxruntime": "onnxruntime-gpu"}
    summary = "ONNX Runtime, CPU provider, on the exported file"
    stage = "exported"

    def load(self, artifacts: Artifacts, threads: int, variant: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        provider = "CPUExecutionProvider"
        self._session = onnxruntime.InferenceSession(str(artifacts.exported), options, providers=[provider])
        if self._session.get_providers() != [provider]:  # it falls back to others without raising
            raise RuntimeError(f"asked for {provider}, got {self._session.get_providers()}")

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        return self._session.run(["logits"], {"ids": ids})[0]

    def versions(self) -> dict[str, str]:
        import onnxruntime

        return {"onnxruntime": onnxruntime.__version__}
