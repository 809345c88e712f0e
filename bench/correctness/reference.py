"""The reference that every engine is compared with: the eager model in float64."""

from collections.abc import Sequence

import numpy as np

from bench.backends import eager
from bench.harness.runner import CALL_DEADLINE_S, LOAD_DEADLINE_S
from bench.harness.worker import Worker
from bench.models.artifacts import Artifacts
from gpt.config import GPTConfig

FACTORY = f"{__name__}:Reference"


class Reference(eager.Engine):
    """Eager in float64; its logits are float64 [B, T, V]. Not an engine: it is never timed."""

    summary = "eager in float64"
    arithmetic = "float64"


class ReferenceModel:
    """The reference in a worker of its own; see `bench.harness.work.Reference`. Use it as a context manager.

    The logits of the last ids are kept, as engine after engine asks for the same. factory: `module:Class` of the
    model. Raises WorkerError if the model does.
    """

    def __init__(self, artifacts: Artifacts, config: GPTConfig, threads: int, factory: str = FACTORY) -> None:
        self._worker = Worker(factory, threads)
        self._arguments = (artifacts, config, threads, "")
        self._last: tuple[np.ndarray, np.ndarray] | None = None

    def __enter__(self) -> "ReferenceModel":
        try:
            self._worker.call("load", *self._arguments, deadline_s=LOAD_DEADLINE_S)
        except BaseException:
            self._worker.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()

    def __call__(self, ids: np.ndarray, positions: Sequence[int] | None = None) -> np.ndarray:
        if self._last is None or not np.array_equal(self._last[0], ids):
            self._last = ids, self._worker.call("prefill", ids, deadline_s=CALL_DEADLINE_S)
        logits = self._last[1]  # [B, T, V]
        return logits if positions is None else logits[:, list(positions)]

    def loss(self, windows: np.ndarray) -> float:
        """Compute the loss, in nats per token, on windows of a text, int64 [N, T + 1]."""
        return self._worker.call("loss", windows, deadline_s=CALL_DEADLINE_S)
