"""PyTorch as the model is written: one operator after the other, attention spelled out."""

from typing import ClassVar

import numpy as np

from bench.artifacts import Artifacts
from bench.backends import Backend


class Engine(Backend):
    """The reference implementation in float32, which every ratio is taken to."""

    requires: ClassVar[dict[str, str]] = {"torch": "torch"}
    summary = "PyTorch, one operator after the other, attention spelled out"
    attention: ClassVar[str] = "explicit"
    arithmetic: ClassVar[str] = "float32"

    def load(self, artifacts: Artifacts, threads: int, variant: str) -> None:
        import torch

        from gpt.checkpoint import load_checkpoint

        torch.set_num_threads(threads)
        model = load_checkpoint(artifacts.checkpoint).build(attention=self.attention)
        self._model = model.to(getattr(torch, self.arithmetic))

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self._model(torch.from_numpy(ids)).numpy()

    def versions(self) -> dict[str, str]:
        import torch

        return {"torch": torch.__version__}
