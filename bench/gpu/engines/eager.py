"""Runs the model by PyTorch as it is written, in bfloat16, one operator after the other."""

from typing import TYPE_CHECKING, ClassVar

from bench.backends import Variant
from bench.gpu.device import DeviceArtifacts
from bench.gpu.engine import DeviceEngine
from bench.gpu.phases import DEVICE_PHASES
from bench.models.artifacts import CHECKPOINT

if TYPE_CHECKING:
    from torch import Tensor

    from gpt.cache import KVCache

FILES = dict.fromkeys(DEVICE_PHASES, CHECKPOINT)


class Engine(DeviceEngine):
    """The baseline of speed-ups: weights, cache and activations in bfloat16, attention spelled out."""

    requires: ClassVar[dict[str, str]] = {"torch": "torch"}
    summary = "PyTorch, one operator after the other, attention spelled out; a KV cache in place"
    variants: ClassVar[dict[str, Variant]] = {"": Variant(FILES, "bf16")}
    attention: ClassVar[str] = "explicit"

    def _load(self, artifacts: DeviceArtifacts, threads: int) -> None:
        import torch

        from gpt.checkpoint import load_checkpoint

        torch.set_num_threads(threads)
        self._model = load_checkpoint(artifacts.checkpoint).build(attention=self.attention)
        self._model.to(self.device, torch.bfloat16)
        self._cache: KVCache | None = None

    def _first(self, ids: "Tensor") -> "Tensor":
        import torch

        from gpt.cache import KVCache

        if self._cache is None or self._cache.keys.shape[1] != len(ids):
            self._cache = None  # before there are two
            self._cache = KVCache(self.gpt, len(ids), torch.device(self.device), torch.bfloat16)
        return self._next(ids, 0)

    def _next(self, ids: "Tensor", context: int) -> "Tensor":
        import torch

        if self._cache is None:
            raise RuntimeError("there is no cache yet: a prompt comes before its next token")
        self._cache.length = context
        with torch.inference_mode():
            return self._model(ids, last_only=True, cache=self._cache)[:, 0]

    def versions(self) -> dict[str, str]:
        import torch

        return {"torch": torch.__version__}
