"""PyTorch as the model is written: one operator after the other, attention spelled out."""

from typing import ClassVar

import numpy as np

from bench.artifacts import CHECKPOINT, Artifacts
from bench.backends import Backend


class Engine(Backend):
    """The reference implementation in float32, which every ratio is taken to."""

    requires: ClassVar[dict[str, str]] = {"torch": "torch"}
    summary = "PyTorch, one operator after the other, attention spelled out; a KV cache in place"
    variants: ClassVar[dict[str, dict[str, str]]] = {"": dict.fromkeys(("prefill", "decode", "generate"), CHECKPOINT)}
    attention: ClassVar[str] = "explicit"
    arithmetic: ClassVar[str] = "float32"

    def _load(self, artifacts: Artifacts, threads: int, variant: str) -> None:
        import torch

        from gpt.checkpoint import load_checkpoint

        torch.set_num_threads(threads)
        model = load_checkpoint(artifacts.checkpoint).build(attention=self.attention)
        self._model = model.to(getattr(torch, self.arithmetic))

    def _prefill(self, ids: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self._model(torch.from_numpy(ids)).numpy()

    def _fill(self, ids: np.ndarray) -> np.ndarray:
        from gpt.cache import KVCache

        self._cache = KVCache(self.config, len(ids))
        return self._step(ids)

    def _decode(self, ids: np.ndarray, context: int) -> np.ndarray:
        self._cache.length = context
        return self._step(ids)

    def _step(self, ids: np.ndarray) -> np.ndarray:
        """Put ids behind what is in the cache: the last position's logits [B, V]."""
        import torch

        with torch.inference_mode():
            return self._model(torch.from_numpy(ids), last_only=True, cache=self._cache).numpy()[:, -1]

    def versions(self) -> dict[str, str]:
        import torch

        return {"torch": torch.__version__}
