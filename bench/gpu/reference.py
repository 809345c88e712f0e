"""What every engine on a device is held to: the eager model in float64, on the same device, at some positions."""

from collections.abc import Sequence

import numpy as np

from bench.correctness.reference import ReferenceModel
from bench.gpu.device import DeviceArtifacts
from bench.harness.runner import CALL_DEADLINE_S
from bench.harness.worker import WorkerError
from gpt.config import GPTConfig

FACTORY = f"{__name__}:Reference"


class Reference:
    """The model with attention spelled out, every product, sum and function in float64."""

    def load(self, artifacts: DeviceArtifacts, config: GPTConfig, threads: int, variant: str) -> None:
        """Load the checkpoint; arguments as of an engine's `load`."""
        import torch

        from gpt.checkpoint import load_checkpoint

        torch.set_num_threads(threads)
        self._device = artifacts.device
        self._model = load_checkpoint(artifacts.checkpoint).build(attention="explicit").to(self._device).double()

    def logits_at(self, ids: np.ndarray, at: Sequence[int]) -> np.ndarray:
        """The logits float64 [B, S, V] of ids int64 [B, T] at S positions, a sequence at a time: the rest takes GB."""
        import torch

        with torch.inference_mode():
            rows = [self._model(row[None])[0, list(at)].cpu() for row in torch.from_numpy(ids).to(self._device)]
        return torch.stack(rows).numpy()


class DeviceReferenceModel(ReferenceModel):
    """`ReferenceModel` on a device: called with ids int64 [B, T] and S positions it gives float64 [B, S, V].

    Raises WorkerError, in words that say that it is the reference's.
    """

    def __init__(self, artifacts: DeviceArtifacts, config: GPTConfig, threads: int) -> None:
        super().__init__(artifacts, config, threads, FACTORY)
        self._asked: tuple[bytes, tuple[int, ...]] | None = None
        self._known: np.ndarray | None = None

    def __call__(self, ids: np.ndarray, positions: Sequence[int] | None = None) -> np.ndarray:
        at = range(ids.shape[1]) if positions is None else positions
        asked = ids.tobytes(), tuple(at)
        if self._known is None or self._asked != asked:
            try:
                self._known = self._worker.call("logits_at", ids, list(at), deadline_s=CALL_DEADLINE_S)
            except WorkerError as error:
                raise WorkerError(f"the reference: {error}") from error
            self._asked = asked
        return self._known
