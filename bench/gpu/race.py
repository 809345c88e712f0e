"""The race of the engines on a GPU: the loop of `bench.harness.race`, by the device's clock and up to a deadline."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from bench.backends import Candidate
from bench.gpu.device import FACTORY, DeviceArtifacts, measure_limits
from bench.gpu.engines import takes_any_shape
from bench.gpu.reference import DeviceReferenceModel
from bench.harness.plan import Plan
from bench.harness.race import Race, precisions_of
from bench.harness.runner import Runner
from bench.harness.worker import Worker, WorkerError
from bench.roofline.bounds import Roofline
from gpt.cli import UserError
from gpt.progress import progress_bar
from gpt.version import PROJECT, project_version

LEAST_S = 1.0  # deadline of a call, however little time is left
NOTES_DEADLINE_S = 60.0
LOADED_AT_ONCE = 4  # engines; none is timed meanwhile


class DeviceWorker(Worker):
    """A worker whose engine is timed by the device's clock, and whose calls end at the deadline of the race.

    until: that deadline, by time.monotonic.
    """

    def __init__(self, candidate: Candidate, threads: int, until: float) -> None:
        super().__init__(candidate.factory, threads, candidate.interpreter)
        self._until = until

    def call(self, method: str, *arguments: Any, deadline_s: float = 600) -> Any:
        """Call as `Worker.call` does, with a deadline that is no later than the race's."""
        left_s = max(LEAST_S, self._until - time.monotonic())
        return super().call(method, *arguments, deadline_s=min(deadline_s, left_s))

    def notes(self) -> dict[str, str]:
        """Ask the engine what ran, also when the time is up."""
        return super().call("notes", deadline_s=NOTES_DEADLINE_S)

    def time(self, method: str, *arguments: Any, budget_s: float, deadline_s: float = 600) -> list[float]:
        """Time several calls by the device's clock: the seconds of each."""
        return self.call("samples", method, arguments, budget_s, deadline_s=deadline_s)

    def time_once(self, method: str, *arguments: Any, deadline_s: float = 600) -> float:
        """Time a few calls by the device's clock: the median of their seconds."""
        return median(self.time(method, *arguments, budget_s=0.0, deadline_s=deadline_s))


class DeviceRunner(Runner):
    """A runner of an engine on a device, which can say what ran there."""

    _worker: DeviceWorker

    def note(self) -> dict[str, str]:
        """Ask the engine what ran, if it was timed. If something else ran, or it cannot say, the engine has failed."""
        if self.failed or not any(any(rounds) for rounds in self._samples_s.values()):
            return {}
        try:
            return self._worker.notes()
        except WorkerError as error:
            self.failed = str(error)
            return {}


@dataclass
class DeviceRace(Race[DeviceRunner]):
    """A race on a device, whose results can be written down at any moment.

    device: its description by `bench.gpu.device.Probe`. notes: what each engine said that ran, by label.
    """

    device: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, dict[str, str]] = field(default_factory=dict)

    def load(self) -> None:
        """Load some engines at once, as long as there is time."""
        with ThreadPoolExecutor(LOADED_AT_ONCE) as pool:
            for runner, _ in zip(self.runners, pool.map(self.load_one, self.runners), strict=True):
                self.show(f"loaded {runner.candidate.label}")

    def ask_what_ran(self) -> None:
        """Ask each engine what ran, and note what it says."""
        for runner in self.runners:
            self.show(f"asking {runner.candidate.label} what ran")
            if said := runner.note():
                self.notes[runner.candidate.label] = said

    def results(self) -> dict[str, Any]:
        """Return plain JSON: `rows` as in `bench.report.page`, `checks`, `limits`, `device`, `versions`, `notes`."""
        return {
            "device": self.device,
            "limits": {precision: asdict(limits) for precision, limits in self.limits.items()},
            "rows": self.rows(),
            "checks": self.checks(),
            "versions": {PROJECT: project_version(), **self.versions()},
            "notes": self.notes,
        }


def run_race(
    artifacts: DeviceArtifacts,
    candidates: list[Candidate],
    plan: Plan,
    *,
    row_s: float,
    until: float,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Check and time every candidate that is present, each in a process of its own, in ROUNDS turns a row.

    row_s: seconds of timing a row. until: by time.monotonic; what is not begun by then is left out, and said to be.
    keep: is given the results whenever there are more of them; the last are returned, plain JSON. Raises UserError if
    the device's limits cannot be measured.
    """
    present = [each for each in candidates if not each.absent]
    precisions = precisions_of(candidates)
    with ExitStack() as stack, progress_bar(bar_format="{desc:<48.48} {bar} {elapsed}", leave=False) as progress:
        progress.set_description("measuring the device's limits")
        device, limits = _measure(artifacts.device, precisions, plan)
        runners = [
            DeviceRunner(each, stack.enter_context(DeviceWorker(each, plan.threads, until)), plan.works)
            for each in present
        ]
        race = DeviceRace(artifacts, plan, candidates, runners, progress, until, device=device)
        race.note_limits(limits, plan.works)
        progress.reset(total=1 + race.steps + len(runners) * (1 + len(plan.works)))
        race.load()
        reference = stack.enter_context(DeviceReferenceModel(artifacts, plan.config, plan.threads, plan.seed))
        any_shape = [runner for runner in runners if takes_any_shape(runner.candidate)]
        race.check(plan.always_checked, reference, any_shape)
        race.leave_out(plan.works)  # also those that were just checked: they are not timed yet
        keep(race.results())
        for work in plan.works:
            race.check([work], reference)
            race.run_rounds([work], {work: row_s})
            keep(race.results())
        if not race.is_over:
            race.show("measuring the device's limits again")
            race.note_limits(_measure(artifacts.device, precisions, plan)[1], plan.works)
        race.ask_what_ran()
        results = race.results()
        keep(results)
        return results


def _measure(device: str, precisions: list[str], plan: Plan) -> tuple[dict[str, Any], dict[str, Roofline]]:
    """Describe the device, and measure its limits by precision. Raises UserError."""
    with Worker(FACTORY, plan.threads) as probe:
        try:
            probe.call("load", device)
            return probe.call("describe"), measure_limits(probe, precisions, plan.config, plan.threads)
        except WorkerError as error:
            raise UserError(f"the limits of {device} could not be measured: {error}") from error
