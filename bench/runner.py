"""One contender at work: loaded, checked and timed in its own process, and whatever befell it on the way."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from bench.agreement import Agreement, compare_logits, tolerance_of
from bench.artifacts import Artifacts
from bench.backends import Contender
from bench.measure import Measurement
from bench.worker import Worker, WorkerError
from gpt.config import GPTConfig

PHASE = "prefill"
FEWEST_ROUNDS = 2  # of an engine too slow for its share of the time: with one it could not be compared with itself
LOAD_DEADLINE_S = 300.0
CALL_DEADLINE_S = 300.0  # the first call at a shape compiles in some engines
SLOW_S = 2.0  # a call expected to take longer is not repeated just to know it better
LONGEST_CHECK_S = 30.0  # a shape that is only checked, not timed, is left out, and said to be, if it took longer

Shape = tuple[int, int]  # (B, T)


class Runner:
    """A contender with its worker. A failure of the worker is noted here and never raised.

    versions: of its packages. checks: its Agreement at each shape. errors: what the worker said where it failed.
    unchecked: the shapes left out. failed: why it could not even be loaded. disagreed: where, and by how much.
    """

    def __init__(self, contender: Contender, worker: Worker) -> None:
        self.contender = contender
        self.versions: dict[str, str] = {}
        self.checks: dict[Shape, Agreement] = {}
        self.errors: dict[Shape, str] = {}
        self.unchecked: list[Shape] = []
        self.failed: str | None = None
        self.disagreed: str | None = None
        self._worker = worker
        self._seconds_per_token = 0.0
        self._samples_s: dict[Shape, list[tuple[float, ...]]] = {}

    def may_run(self, shape: Shape) -> bool:
        """Whether it loaded, has not disagreed anywhere, and has not failed at this shape."""
        return not self.failed and not self.disagreed and shape not in self.errors

    def load(self, artifacts: Artifacts, threads: int) -> None:
        """Load the engine in the worker."""
        try:
            arguments = (artifacts, threads, self.contender.variant)
            self._worker.call("load", *arguments, deadline_s=LOAD_DEADLINE_S)
            self.versions = self._worker.call("versions")
        except WorkerError as error:
            self.failed = str(error)

    def check(self, config: GPTConfig, ids: np.ndarray, expected: np.ndarray, *, timed: bool) -> None:
        """Compare the logits with the reference's; a shape that is not timed is left out if it would take long."""
        shape = ids.shape
        if not timed and self._seconds_per_token * ids.size > LONGEST_CHECK_S:
            self.unchecked.append(shape)
            return
        with self._noting_errors(shape):
            logits = self._worker.call(PHASE, ids, deadline_s=CALL_DEADLINE_S)
            agreement = compare_logits(expected, logits, tolerance_of(self.contender.dtype, config))
            self.checks[shape] = agreement
            if not agreement.agrees:
                self.disagreed = f"disagrees at {shape[0]}×{shape[1]}: {agreement.reason}"
                return
            if ids.size > 1 and self._seconds_per_token * ids.size < SLOW_S:
                # The call before may have compiled something; this one tells how slow the engine is.
                self._seconds_per_token = self.seconds_of_one(ids) / ids.size

    def seconds_of_one(self, ids: np.ndarray) -> float:
        """Seconds of one call, by the worker's clock. Raises WorkerError."""
        return self._worker.time_once(PHASE, ids, deadline_s=CALL_DEADLINE_S)

    def take_turn(self, ids: np.ndarray, turn_s: float, share_s: float) -> None:
        """Time calls for about `turn_s`; an engine whose one call takes longer makes one, until its share is spent."""
        shape = ids.shape
        rounds = self._samples_s.setdefault(shape, [])
        spent = sum(sum(samples) for samples in rounds)
        if not self.may_run(shape) or (len(rounds) >= FEWEST_ROUNDS and spent >= share_s):
            rounds.append(())
            return
        with self._noting_errors(shape):
            if self._seconds_per_token * ids.size >= turn_s:  # needs no warm-up: it is one
                rounds.append((self.seconds_of_one(ids),))
            else:
                samples = self._worker.time(PHASE, ids, budget_s=turn_s, deadline_s=CALL_DEADLINE_S)
                rounds.append(tuple(samples))

    def measurement_at(self, shape: Shape) -> Measurement | None:
        """All rounds at a shape; None if it did not stay in the race."""
        if not self.may_run(shape) or not any(self._samples_s.get(shape, ())):
            return None
        each = self.contender
        return Measurement(each.engine, each.variant, PHASE, each.dtype, *shape, tuple(self._samples_s[shape]))

    @contextmanager
    def _noting_errors(self, shape: Shape) -> Iterator[None]:
        try:
            yield
        except WorkerError as error:
            self.errors[shape] = str(error)
