"""One race: the engines on one model, each checked and timed alone, in turns, until the time is up."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from tqdm import tqdm

from bench.backends import Contender
from bench.gpu.device import FACTORY, DeviceArtifacts, measure_limits
from bench.gpu.engines import takes_any_shape
from bench.gpu.reference import TruthAt
from bench.harness.measure import rotated
from bench.harness.plan import ROUNDS, Plan
from bench.harness.results import checks_of, rows_of
from bench.harness.runner import Runner
from bench.harness.work import Work
from bench.harness.worker import Worker, WorkerError
from bench.roofline.bounds import Limits, best_of
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.version import PROJECT, project_version

NOT_REACHED = "the time was up, or the run ended, before it"
LEAST_S = 1.0  # that a call may take, however little time is left
NOTES_DEADLINE_S = 60.0
LOADED_AT_ONCE = 4  # engines; none is timed meanwhile


class DeviceWorker(Worker):
    """A worker whose engine is timed by its device's clock, and whose calls end when the time is up.

    until: by time.monotonic.
    """

    def __init__(self, contender: Contender, threads: int, until: float) -> None:
        super().__init__(contender.factory, threads, contender.interpreter)
        self._until = until

    def call(self, method: str, *arguments: Any, deadline_s: float = 600) -> Any:
        """As `Worker.call`, with a deadline that is no later than the end."""
        left_s = max(LEAST_S, self._until - time.monotonic())
        return super().call(method, *arguments, deadline_s=min(deadline_s, left_s))

    def notes(self) -> dict[str, str]:
        """What the engine says of what it did, also when the time is up."""
        return super().call("notes", deadline_s=NOTES_DEADLINE_S)

    def time(self, method: str, *arguments: Any, budget_s: float, deadline_s: float = 600) -> list[float]:
        return self.call("samples", method, arguments, budget_s, deadline_s=deadline_s)

    def time_once(self, method: str, *arguments: Any, deadline_s: float = 600) -> float:
        return median(self.time(method, *arguments, budget_s=0.0, deadline_s=deadline_s))


class DeviceRunner(Runner):
    """A runner of an engine that can say what ran."""

    def note(self) -> dict[str, str]:
        """What the engine says; if that is that something else ran, or it cannot say, all that it did has failed."""
        if self.failed or not any(any(rounds) for rounds in self._samples_s.values()):
            return {}
        try:
            return self._worker.notes()
        except WorkerError as error:
            self.failed = str(error)
            return {}


@dataclass
class _Race:
    """What is known so far. limits: by precision. notes: what an engine said of itself, by label."""

    contenders: list[Contender]
    runners: list[Runner]
    config: GPTConfig
    plan: Plan
    checked: list[Work]
    device: dict[str, Any]
    limits: dict[str, Limits]
    notes: dict[str, dict[str, str]]

    def results(self) -> dict[str, Any]:
        """As plain JSON: `rows` as in `bench.report.page`, `checks`, `limits`, `device`, `versions`, `notes`."""
        rows = [
            row
            for work in self.plan.works
            for row in rows_of(work, self.contenders, self.runners, self.config, self.limits, self.plan)
        ]
        works = list(dict.fromkeys([*self.checked, *self.plan.works]))
        return {
            "device": self.device,
            "limits": {precision: asdict(each) for precision, each in self.limits.items()},
            "rows": rows,
            "checks": [check for runner in self.runners for check in checks_of(runner, works, self.plan)],
            "versions": {
                PROJECT: project_version(),
                **{name: version for each in self.runners for name, version in sorted(each.versions.items())},
            },
            "notes": self.notes,
        }


def run_race(
    artifacts: DeviceArtifacts,
    config: GPTConfig,
    contenders: list[Contender],
    plan: Plan,
    *,
    row_s: float,
    until: float,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Check and time every contender that is present, each in a process of its own, in ROUNDS turns a row.

    row_s: seconds of timing a row. until: by time.monotonic; what is not begun by then is left out, and said to be.
    keep: is given the results whenever there are more of them; the last are returned, plain JSON. Raises UserError if
    the device's limits cannot be measured.
    """
    kinds = dict.fromkeys(type(work) for work in plan.works)
    checked = [work for kind in kinds for work in kind.checked(config)]
    present = [each for each in contenders if not each.absent]
    precisions = list(dict.fromkeys(each.precision for each in contenders))
    with ExitStack() as stack, tqdm(bar_format="{desc:<48.48} {bar} {elapsed}", leave=False) as progress:
        turns = len(present) * len(plan.works) * (ROUNDS + 1)
        progress.reset(total=2 + 2 * len(present) + len(present) * len(checked) + turns)
        _show(progress, "measuring the device's limits")
        device, limits = _measure(artifacts.device, precisions, config, plan)
        runners = [
            DeviceRunner(each, stack.enter_context(DeviceWorker(each, plan.threads, until)), plan.works)
            for each in present
        ]
        found = _Race(contenders, runners, config, plan, checked, device, limits, {})
        for runner in runners:
            runner.left_out = dict.fromkeys((*checked, *plan.works), NOT_REACHED)
        for label in _load(runners, artifacts, config, plan, until):
            _show(progress, f"loaded {label}")
        truth = stack.enter_context(TruthAt(artifacts, config, plan.threads))
        any_shape = [runner for runner in runners if takes_any_shape(runner.contender)]
        for work in checked:
            _check(any_shape, work, truth, found, progress, until)
        for runner in runners:
            runner.left_out |= dict.fromkeys(plan.works, NOT_REACHED)  # also what was checked: it is not timed yet
        keep(found.results())
        for work in plan.works:
            _check(runners, work, truth, found, progress, until)
            ids = work.ids(config, plan.seed)
            for number in range(ROUNDS):
                for runner in rotated(runners, number):
                    _show(progress, f"timing {runner.contender.label}: {work.phase} {work.name}")
                    runner.take_turn(work, ids, row_s / ROUNDS, row_s)
            keep(found.results())
        if time.monotonic() < until:
            _show(progress, "measuring the device's limits again")
            _, after = _measure(artifacts.device, precisions, config, plan)
            found.limits = {precision: best_of(limits[precision], after[precision]) for precision in precisions}
        for runner in runners:
            _show(progress, f"asking {runner.contender.label} what ran")
            if said := runner.note():
                found.notes[runner.contender.label] = said
        results = found.results()
        keep(results)
        return results


def _measure(
    device: str, precisions: list[str], config: GPTConfig, plan: Plan
) -> tuple[dict[str, Any], dict[str, Limits]]:
    """What the device is, and its limits. Raises UserError."""
    with Worker(FACTORY, plan.threads) as probe:
        try:
            probe.call("load", device)
            return probe.call("describe"), measure_limits(probe, precisions, config, plan.threads)
        except WorkerError as error:
            raise UserError(f"the limits of {device} could not be measured: {error}") from error


def _load(
    runners: list[Runner], artifacts: DeviceArtifacts, config: GPTConfig, plan: Plan, until: float
) -> Iterator[str]:
    """Load some engines at once, as long as there is time; the labels of those that are done."""

    def load(runner: Runner) -> str:
        if time.monotonic() < until:
            runner.load(artifacts, config, plan.threads)
        return runner.contender.label

    with ThreadPoolExecutor(LOADED_AT_ONCE) as pool:
        yield from pool.map(load, runners)


def _check(runners: list[Runner], work: Work, truth: TruthAt, found: _Race, progress: tqdm, until: float) -> None:
    ids = work.ids(found.config, found.plan.seed)
    for runner in runners:
        _show(progress, f"checking {runner.contender.label}: {work.phase} {work.name}")
        if time.monotonic() < until:
            runner.left_out.pop(work, None)
        if runner.may_run(work):
            runner.check(work, ids, truth, found.config, timed=work in found.plan.works)


def _show(progress: tqdm, text: str) -> None:
    progress.set_description(text, refresh=False)
    progress.update()
