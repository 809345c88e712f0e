"""The reference on a device: the eager model in float64, on the same device, at some positions."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from bench.correctness.agreement import Errors, measure_allowed
from bench.correctness.reference import ReferenceModel, in_precision, logits_of
from bench.correctness.rounding import Rounding
from bench.gpu.device import DeviceArtifacts
from bench.harness.runner import CALL_DEADLINE_S
from bench.harness.worker import WorkerError
from bench.models.shape import Model

FACTORY = f"{__name__}:Reference"


class Reference:
    """The model with explicit attention, every product, sum and function in float64; it runs in a worker."""

    def load(self, artifacts: DeviceArtifacts, config: Model, threads: int, variant: str) -> None:
        """Load the checkpoint; the arguments are those of an engine's `load`."""
        import torch

        from gpt.checkpoint import load_checkpoint

        torch.set_num_threads(threads)
        self._device, self._checkpoint = artifacts.device, load_checkpoint(artifacts.checkpoint)
        self._model = self._checkpoint.build(attention="explicit").to(self._device).double()

    def logits_at(self, ids: np.ndarray, at: Sequence[int]) -> np.ndarray:
        """Compute the logits, float64 [B, S, V], of ids int64 [B, T] at S positions.

        Sequences run one at a time, as the logits at all positions of a batch take gigabytes.
        """
        import torch

        with torch.inference_mode():
            rows = [self._model(row[None])[0, list(at)].cpu() for row in torch.from_numpy(ids).to(self._device)]
        return torch.stack(rows).numpy()

    def allowed(self, precision: str, rounding: Rounding | None, seed: int) -> Errors:
        """Measure the errors that an engine of a precision may have; see `measure_allowed`. No rounding is known."""
        assert rounding is None, "no engine on a device rounds to int8 or int4"
        judge, measure = self._model, in_precision(self._checkpoint, precision).to(self._device)
        return measure_allowed(partial(logits_of, judge), partial(logits_of, measure), self._checkpoint.config, seed)


class DeviceReferenceModel(ReferenceModel):
    """The reference on a device, which sends the logits at the positions that are asked for, and no others.

    Raises WorkerError, whose message says that it is the reference's.
    """

    def __init__(self, artifacts: DeviceArtifacts, config: Model, threads: int, seed: int) -> None:
        super().__init__(artifacts, config, threads, FACTORY, seed)
        self._asked: tuple[bytes, tuple[int, ...]] | None = None
        self._known: np.ndarray | None = None

    def __call__(
        self, ids: np.ndarray, positions: Sequence[int] | None = None, rounding: Rounding | None = None
    ) -> np.ndarray:
        assert rounding is None, "no engine on a device rounds to int8 or int4"
        at = range(ids.shape[1]) if positions is None else positions
        asked = ids.tobytes(), tuple(at)
        if self._known is None or self._asked != asked:
            try:
                self._known = self._worker.call("logits_at", ids, list(at), deadline_s=CALL_DEADLINE_S)
            except WorkerError as error:
                raise WorkerError(f"the reference: {error}") from error
            self._asked = asked
        return self._known
