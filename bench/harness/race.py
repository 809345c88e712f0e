"""The race of the engines on one model: every engine is checked against the reference, then timed in rotating turns.

`Race` is the one loop of `python -m bench` and `python -m bench.gpu`; `compare` runs it on a CPU, `bench.gpu.race` on a
GPU. They differ in what is passed to it: the workers, which own the clock, the deadline, the seconds of a turn, and
when the machine's limits are measured.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain, product
from typing import Generic, TypeVar

import numpy as np
from tqdm import tqdm

from bench.backends import Candidate
from bench.correctness.reference import FACTORY, ReferenceModel
from bench.correctness.rounding import Rounding
from bench.harness.measure import rotated
from bench.harness.plan import ROUNDS, Plan
from bench.harness.results import checks_of, losses_of, rows_of
from bench.harness.runner import Runner, shares_of
from bench.harness.work import References, Work
from bench.harness.worker import Worker
from bench.models.artifacts import Artifacts
from bench.roofline import probe as probes
from bench.roofline.bounds import Roofline, best_of, weight_bytes
from gpt.progress import progress_bar

RunnerT = TypeVar("RunnerT", bound=Runner)
NOT_REACHED = "the time was up, or the run ended, before it"


@dataclass
class Race(Generic[RunnerT]):
    """The engines on one model, each in a process of its own, and all that is known of them so far.

    Every work is left out of the results, as NOT_REACHED, until `check` reaches it.

    candidates: all of them, as an absent one has rows too. runners: of those that are present. until: the deadline by
    time.monotonic; no check or load begins after it. limits: the highest rates seen, by precision. limits_at: the same
    of the rounds of each work, to which its times are compared.
    """

    artifacts: Artifacts
    plan: Plan
    candidates: list[Candidate]
    runners: list[RunnerT]
    progress: tqdm
    until: float = math.inf
    limits: dict[str, Roofline] = field(default_factory=dict)
    limits_at: dict[Work, dict[str, Roofline]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.leave_out(self.plan.to_check)

    @property
    def is_over(self) -> bool:
        """Return True once the deadline has passed."""
        return time.monotonic() >= self.until

    @property
    def steps(self) -> int:
        """Count the moves of the progress bar in `load`, `check` of all works once, and `run_rounds` of all works."""
        able = [sum(runner.can(work) for runner in self.runners) for work in self.plan.to_check]
        timed = [sum(runner.can(work) for runner in self.runners) for work in self.plan.works]
        return len(self.runners) + sum(able) + ROUNDS * sum(timed)

    def show(self, text: str) -> None:
        """Say in the progress bar what is done next, and move it by one."""
        self.progress.set_description(text, refresh=False)
        self.progress.update()

    def leave_out(self, works: Collection[Work]) -> None:
        """Mark works as not reached by any engine; a check of one lifts the mark."""
        for runner in self.runners:
            runner.left_out |= dict.fromkeys(works, NOT_REACHED)

    def load(self) -> None:
        """Load the engines, one after the other."""
        for runner in self.runners:
            self.show(f"loading {runner.candidate.label}")
            self.load_one(runner)

    def load_one(self, runner: Runner) -> None:
        """Load an engine, unless the race is over."""
        if not self.is_over:
            runner.load(self.artifacts, self.plan.config, self.plan.threads)

    def check(self, works: Iterable[Work], references: References, runners: Collection[Runner] | None = None) -> None:
        """Compare the engines with their references at each work, as long as the race is not over.

        Engines that share a reference follow one another, as it holds one model and the logits of one work at a time.
        runners: those to check; by default all of the race.
        """
        groups: dict[Rounding | None, list[Runner]] = {}
        for runner in self.runners if runners is None else runners:
            groups.setdefault(runner.candidate.rounding, []).append(runner)
        for group, work in product(groups.values(), list(works)):
            ids = self.plan.ids_of(work)
            for runner in group:
                if not runner.can(work):
                    continue
                self.show(f"checking {runner.candidate.label}: {work.phase} {work.name}")
                if not self.is_over:
                    runner.left_out.pop(work, None)
                if runner.may_run(work):
                    runner.check(work, ids, references, timed=work in self.plan.works)

    def run_rounds(
        self,
        works: Collection[Work],
        shares_s: Mapping[Work, float],
        before_round: Callable[[Work], None] | None = None,
    ) -> None:
        """Time the engines in ROUNDS rounds of the works; in each round the next engine has the first turn.

        shares_s: seconds of an engine at each work, over all rounds. before_round: called with the work before its
        turns in each round.
        """
        for number, work in product(range(ROUNDS), works):
            if before_round:
                before_round(work)
            ids, share_s = self.plan.ids_of(work), shares_s[work]
            for runner in rotated([runner for runner in self.runners if runner.can(work)], number):
                self.show(f"timing {runner.candidate.label}: {work.phase} {work.name}")
                runner.take_turn(work, ids, share_s / ROUNDS, share_s)

    def note_limits(self, measured: dict[str, Roofline], works: Collection[Work]) -> None:
        """Take limits, by precision, into account for the times of the works: the highest rates seen count."""
        for known in (self.limits, *(self.limits_at.setdefault(work, {}) for work in works)):
            known |= {name: best_of(known.get(name, limits), limits) for name, limits in measured.items()}

    def rows(self) -> list[dict]:
        """Make a row for each work and candidate; see `bench.harness.results`."""
        rows = (
            rows_of(work, self.candidates, self.runners, self.limits_at[work], self.plan) for work in self.plan.works
        )
        return list(chain.from_iterable(rows))

    def checks(self) -> list[dict]:
        """Make a row for each check of each engine that is present."""
        return list(chain.from_iterable(checks_of(runner, self.plan) for runner in self.runners))

    def versions(self) -> dict[str, str]:
        """Return the version of each package that decides the speed of an engine."""
        return {name: version for runner in self.runners for name, version in sorted(runner.versions.items())}


def precisions_of(candidates: Iterable[Candidate]) -> list[str]:
    """List the precisions of the candidates, each once."""
    return list(dict.fromkeys(candidate.precision for candidate in candidates))


def compare(
    artifacts: Artifacts,
    candidates: list[Candidate],
    plan: Plan,
    reference_factory: str = FACTORY,
    windows: np.ndarray | None = None,
) -> dict:
    """Check and time every candidate that is present, on the CPU.

    reference_factory: `module:Class` of the reference, as `bench.correctness.reference.Reference`. windows: of a text,
    int64 [N, T + 1], for the loss. Returns `limits` by precision, `checks`, `rows`, `losses`, `versions` and `seconds`,
    all plain JSON.
    """
    started = time.perf_counter()
    with ExitStack() as stack, progress_bar(bar_format="{desc:<40.40} {bar} {elapsed}", leave=False) as progress:
        runners = [
            Runner(each, stack.enter_context(Worker(each.factory, plan.threads, each.interpreter)), plan.works)
            for each in candidates
            if not each.absent
        ]
        race = Race(artifacts, plan, candidates, runners, progress)
        losses = 0 if windows is None else len(runners) + 1
        progress.reset(total=race.steps + losses + ROUNDS * len(plan.works))
        race.load()
        with ReferenceModel(artifacts, plan.config, plan.threads, reference_factory, plan.seed) as reference:
            race.check(plan.to_check, reference)
            reference_loss = None if windows is None else _measure_losses(race, reference, windows)
        with Worker(probes.FACTORY, plan.threads) as probe:
            probe.call("load", plan.threads)
            _time_all(race, probe)
    return {
        "limits": {name: asdict(limits) for name, limits in race.limits.items()},
        "checks": race.checks(),
        "rows": race.rows(),
        "losses": [] if reference_loss is None else losses_of(reference_loss, runners, plan),
        "versions": race.versions(),
        "seconds": time.perf_counter() - started,
    }


def _measure_losses(race: Race, reference: ReferenceModel, windows: np.ndarray) -> float:
    """Measure each engine's loss on windows int64 [N, T + 1], noted in its runner, and return the reference's."""
    for runner in race.runners:
        race.show(f"loss of {runner.candidate.label}")
        runner.measure_loss(windows)
    race.show("loss of the reference")
    return reference.loss(windows)


def _time_all(race: Race, probe: Worker) -> None:
    """Time all works in plan.minutes, and the machine's limits before each round of one, as it is then."""
    plan, precisions = race.plan, precisions_of(race.candidates)

    def measure_limits(work: Work) -> None:
        race.show(f"the machine's limits: {work.phase} {work.name}")
        race.note_limits({name: _limits_now(probe, name, plan) for name in precisions}, [work])

    shares_s = shares_of(race.runners, plan.works, plan.minutes * 60)
    for group in [plan.works] if plan.together else [(work,) for work in plan.works]:
        race.run_rounds(group, shares_s, measure_limits)


def _limits_now(probe: Worker, precision: str, plan: Plan) -> Roofline:
    size = weight_bytes(plan.config, precision)
    peak, bandwidth = probe.call("peak_flops_per_s", precision), probe.call("read_bytes_per_s", size)
    memory = probe.call("read_bytes_per_s", probes.UNCACHED_BYTES)
    return Roofline(plan.threads, peak, bandwidth, size, memory, precision)
