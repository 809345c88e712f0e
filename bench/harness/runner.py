"""Runs one candidate: it is loaded, checked and timed in its own process, and its failures are noted."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

from bench.backends import Candidate
from bench.correctness.agreement import Agreement
from bench.harness.measure import Measurement
from bench.harness.work import References, Work
from bench.harness.worker import Worker, WorkerError
from bench.models.artifacts import Artifacts
from bench.models.shape import Model

FEWEST_ROUNDS = 3  # of an engine over its share of the time; with fewer, one outlier could be the median
LOAD_DEADLINE_S = 300.0
CALL_DEADLINE_S = 300.0  # the first call at a shape compiles in some engines
WARMED_S = 5.0  # there is no warm-up call if a call is expected to take longer
SLOW_S = 2.0  # a call expected to take longer is not repeated for a better estimate
# Work that is expected to take longer is left out, and the results say so.
LONGEST_CHECK_S = 30.0  # of work that is only checked
LONGEST_CALL_S = 30.0  # of work that is timed
LONGEST_LOSS_S = 60.0  # of a text


class Runner:
    """A candidate with its worker. A failure of the worker is noted here and never raised.

    works: those that are timed, which are all that a static engine can do. versions: of its packages. checks: its
    Agreement at each work. errors: the message of each work that failed. left_out: the reason of each work that was
    not run. failed: why it could not be loaded. disagreed: at which work, and by how much. loss: on a text, in nats
    per token; None without one, and then no_loss says why.
    """

    def __init__(self, candidate: Candidate, worker: Worker, works: Collection[Work] = ()) -> None:
        self.candidate = candidate
        self._works = works
        self.versions: dict[str, str] = {}
        self.checks: dict[Work, Agreement] = {}
        self.errors: dict[Work, str] = {}
        self.left_out: dict[Work, str] = {}
        self.failed: str | None = None
        self.disagreed: str | None = None
        self.loss: float | None = None
        self.no_loss: str | None = None
        self._worker = worker
        self._begun: Work | None = None
        self._seconds_per_token: dict[str, float] = {}  # by phase
        self._samples_s: dict[Work, list[tuple[float, ...]]] = {}

    def can(self, work: Work) -> bool:
        """Return True if the engine has the work's phase, and, if it is static, a module for its shape."""
        return work.phase in self.candidate.phases and (not self.candidate.static or work in self._works)

    def may_run(self, work: Work) -> bool:
        """Return True if the engine can do the work, agrees so far, and neither failed nor was left out at it."""
        gone = self.failed or self.disagreed or work in self.errors or work in self.left_out
        return self.can(work) and not gone

    def expected_s(self, work: Work) -> float:
        """Estimate the seconds of a call from the works of its phase that were checked; 0 if none was."""
        return self._seconds_per_token.get(work.phase, 0.0) * work.B * work.T

    def load(self, artifacts: Artifacts, config: Model, threads: int) -> None:
        """Load the engine in the worker, on `threads` threads."""
        try:
            arguments = (artifacts, config, threads, self.candidate.variant)
            self._worker.call("load", *arguments, deadline_s=LOAD_DEADLINE_S)
            self.versions = self._worker.call("versions")
        except WorkerError as error:
            self.failed = str(error)

    def check(self, work: Work, ids: np.ndarray, references: References, *, timed: bool) -> None:
        """Compare the engine with its reference at a work; a work that would take too long is left out.

        timed: the work is timed afterwards, so its limit is that of a call and not of a check.
        """
        expected_s = self.expected_s(work)
        if expected_s > (LONGEST_CALL_S if timed else LONGEST_CHECK_S):
            self.left_out[work] = f"left out: a call would take some {expected_s:.0f} s"
            return
        with self._noting_errors(work):
            self._begun = None
            each = self.candidate
            reference = partial(references, rounding=each.rounding)
            agreement = work.check(self._ask, reference, ids, references.allowed(each.precision, each.rounding))
            self.checks[work] = agreement
            if not agreement.agrees:
                self.disagreed = f"disagrees in {work.phase} at {work.name}: {agreement.reason}"
                return
            if work.tells_speed and self.expected_s(work) < SLOW_S:
                # A call of the check may have compiled something; this one tells how slow the engine is.
                self._seconds_per_token[work.phase] = self.seconds_of_one(work, ids) / (work.B * work.T)

    def seconds_of_one(self, work: Work, ids: np.ndarray) -> float:
        """Time one call by the worker's clock, in seconds. Raises WorkerError."""
        self._begin(work, ids)
        method, arguments = work.call(ids)
        return self._worker.time_once(method, *arguments, deadline_s=CALL_DEADLINE_S)

    def take_turn(self, work: Work, ids: np.ndarray, turn_s: float, share_s: float) -> None:
        """Time calls for about `turn_s`; if one call takes longer, make one, in each round until `share_s` is spent."""
        rounds = self._samples_s.setdefault(work, [])
        spent = sum(sum(samples) for samples in rounds)
        if not self.may_run(work) or (len(rounds) >= FEWEST_ROUNDS and spent >= share_s):
            rounds.append(())
            return
        with self._noting_errors(work):
            if (expected_s := self.expected_s(work)) >= turn_s:  # a single call, which is its own warm-up
                if not rounds and expected_s < WARMED_S:  # what an engine compiles for a shape is not part of the call
                    self.seconds_of_one(work, ids)
                rounds.append((self.seconds_of_one(work, ids),))
                return
            self._begin(work, ids)
            method, arguments = work.call(ids)
            samples = self._worker.time(method, *arguments, budget_s=turn_s, deadline_s=CALL_DEADLINE_S)
            rounds.append(tuple(samples))

    def measure_loss(self, windows: np.ndarray) -> None:
        """Measure the loss on windows of a text, int64 [N, T + 1], if the engine agrees, and note it."""
        B, T = len(windows), windows.shape[1] - 1
        expected_s = self._seconds_per_token.get("prefill", 0.0) * B * T
        if self.failed or self.disagreed:
            self.no_loss = self.failed or self.disagreed
        elif expected_s > LONGEST_LOSS_S:
            self.no_loss = f"left out: it would take some {expected_s:.0f} s"
        else:
            try:
                self.loss = self._worker.call("loss", windows, deadline_s=CALL_DEADLINE_S)
            except WorkerError as error:
                self.no_loss = str(error)

    def measurement_at(self, work: Work) -> Measurement | None:
        """Return all rounds of a work in seconds per unit; None if the engine failed at it or was not timed."""
        if not self.may_run(work) or not any(self._samples_s.get(work, ())):
            return None
        each = self.candidate
        rounds = [tuple(sample / work.units_a_call for sample in samples) for samples in self._samples_s[work]]
        names = (each.engine, each.variant, work.phase, each.precision)
        return Measurement(*names, work.B, work.T, work.context, tuple(rounds))

    def _ask(self, method: str, *arguments: object) -> np.ndarray:
        return self._worker.call(method, *arguments, deadline_s=CALL_DEADLINE_S)

    def _begin(self, work: Work, ids: np.ndarray) -> None:
        """Have the engine prepare the work, as by filling the cache, unless it was the last one to be prepared."""
        if work != self._begun and (request := work.before(ids)):
            method, arguments = request
            self._ask(method, *arguments)
        self._begun = work

    @contextmanager
    def _noting_errors(self, work: Work) -> Iterator[None]:
        try:
            yield
        except WorkerError as error:
            self.errors[work] = str(error)


def shares_of(runners: Collection[Runner], works: Collection[Work], seconds: float) -> dict[Work, float]:
    """Divide `seconds` among the works: the seconds of each engine at each work.

    Half of the time is shared equally; half is proportional to a call of the fastest engine, as large works would
    otherwise have a call or two and small ones hundreds.
    """
    able = {work: [runner for runner in runners if runner.may_run(work)] for work in works}
    lengths = {work: min((runner.expected_s(work) for runner in each), default=0.0) for work, each in able.items()}
    pairs = sum(len(each) for each in able.values())
    whole = sum(lengths[work] * len(each) for work, each in able.items())
    return {
        work: seconds * (1 / pairs + lengths[work] / whole) / 2 if whole else seconds / max(1, pairs) for work in works
    }
