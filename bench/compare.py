"""The whole comparison of one model: check every engine, then time those that agree, then say it in rows."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field

import numpy as np
from tqdm import tqdm

from bench import limits, reference
from bench.agreement import Agreement, compare_logits, odd_shapes, random_ids, tolerance_of
from bench.artifacts import Artifacts
from bench.backends import Contender
from bench.limits import Bound, Limits, bound_of, weight_bytes
from bench.measure import Measurement, median_of, rotated, speedup_of, spread_of
from bench.worker import Worker, WorkerError
from gpt.config import GPTConfig

BASELINE = "eager"  # what speed-ups are taken to
PHASE = "prefill"
ROUNDS = 5
FEWEST_ROUNDS = 2  # of an engine too slow for its share of the time: with one it could not be compared with itself
LOAD_DEADLINE_S = 300.0
CALL_DEADLINE_S = 300.0  # the first call at a shape compiles in some engines
LONGEST_CHECK_S = 45.0  # a check that is not of a timed shape is left out, and said to be, if it would take longer

Shape = tuple[int, int]  # (B, T)


@dataclass(frozen=True)
class Plan:
    """What to compare. shapes: (B, T) to time. minutes: for the timing itself; loading and checking come on top.

    seed: of the random ids. Raises ValueError for a value that makes no sense.
    """

    shapes: tuple[Shape, ...]
    threads: int
    minutes: float = 0.75
    seed: int = field(default_factory=lambda: int.from_bytes(os.urandom(4)))

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads={self.threads}: must be at least 1")
        if not self.minutes > 0:
            raise ValueError(f"minutes={self.minutes}: must be more than 0")


@dataclass
class Runner:
    """A contender at work. failed: what stopped it for good. unchecked: odd shapes too slow for it to be checked at."""

    contender: Contender
    worker: Worker
    failed: str | None = None
    disagreed: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    checks: dict[Shape, Agreement] = field(default_factory=dict)
    errors: dict[Shape, str] = field(default_factory=dict)
    unchecked: list[Shape] = field(default_factory=list)
    seconds_per_token: float = 0.0
    samples_s: dict[Shape, list[tuple[float, ...]]] = field(default_factory=dict)

    def may_run(self, shape: Shape) -> bool:
        """Whether it is still in the race at a shape."""
        return not self.failed and not self.disagreed and shape not in self.errors


def default_shapes(config: GPTConfig) -> tuple[Shape, ...]:
    """A short prompt, a long one and a batch of them; for long blocks the lengths of the project's own tables."""
    if config.block_size >= 512:
        return (1, 64), (1, 128), (4, 64)
    return (1, max(1, config.block_size // 4)), (1, config.block_size), (8, config.block_size)


def compare(artifacts: Artifacts, config: GPTConfig, contenders: list[Contender], plan: Plan) -> dict:
    """Check and time every contender that is present, each alone in its own process, and return the results' rows.

    The dict holds `limits`, `checks` and `rows`, all plain JSON; `bench.report` says what is in a row.
    """
    started = time.perf_counter()
    with ExitStack() as stack, tqdm(unit="step", leave=False, bar_format="{desc:<40.40} {bar} {elapsed}") as progress:
        show = progress.set_description
        runners = [
            Runner(contender, stack.enter_context(Worker(contender.factory, plan.threads)))
            for contender in contenders
            if not contender.missing
        ]
        progress.reset(total=2 * len(runners) + len(runners) * len(_all_shapes(config, plan)) + 100)
        for runner in runners:
            show(f"loading {runner.contender.label}")
            _load(runner, artifacts, plan)
            progress.update(2)
        _check_all(runners, artifacts, config, plan, progress)
        with Worker(limits.FACTORY, plan.threads) as probe:
            show("measuring the machine's limits")
            measured = _measure_limits(probe, config, plan)
            _time_all(runners, config, plan, progress)
            show("measuring the machine's limits again")
            measured = _measure_limits(probe, config, plan, measured)
    rows = [row for shape in plan.shapes for row in _rows_at(shape, runners, contenders, config, plan, measured)]
    return {
        "limits": asdict(measured),
        "checks": [check for runner in runners for check in _checks_of(runner, config, plan)],
        "rows": rows,
        "versions": {name: version for runner in runners for name, version in sorted(runner.versions.items())},
        "seconds": time.perf_counter() - started,
    }


def check(worker: Worker, contender: Contender, config: GPTConfig, ids: np.ndarray, expected: np.ndarray) -> Agreement:
    """Run a loaded engine once and compare its logits with the reference's. Raises WorkerError if it cannot."""
    logits = worker.call(PHASE, ids, deadline_s=CALL_DEADLINE_S)
    return compare_logits(expected, logits, tolerance_of(contender.dtype, config))


def _all_shapes(config: GPTConfig, plan: Plan) -> list[Shape]:
    return list(dict.fromkeys([*odd_shapes(config), *plan.shapes]))


@contextmanager
def _failures_of(runner: Runner, shape: Shape | None = None) -> Iterator[None]:
    """Note a worker's failure: at one shape, or for good."""
    try:
        yield
    except WorkerError as error:
        if shape is None:
            runner.failed = str(error)
        else:
            runner.errors[shape] = str(error)


def _load(runner: Runner, artifacts: Artifacts, plan: Plan) -> None:
    with _failures_of(runner):
        runner.worker.call("load", artifacts, plan.threads, runner.contender.variant, deadline_s=LOAD_DEADLINE_S)
        runner.versions = runner.worker.call("versions")


def _check_all(runners: list[Runner], artifacts: Artifacts, config: GPTConfig, plan: Plan, progress: tqdm) -> None:
    with Worker(reference.FACTORY, plan.threads) as truth:
        progress.set_description("loading the reference")
        truth.call("load", artifacts, plan.threads, "", deadline_s=LOAD_DEADLINE_S)
        for shape in _all_shapes(config, plan):
            ids = random_ids(config, *shape, plan.seed)
            expected = truth.call(PHASE, ids, deadline_s=CALL_DEADLINE_S)
            for runner in runners:
                progress.set_description(f"checking {runner.contender.label} at {shape[0]}×{shape[1]}")
                if runner.may_run(shape):
                    _check_one(runner, config, shape, ids, expected, timed=shape in plan.shapes)
                progress.update()


def _check_one(
    runner: Runner, config: GPTConfig, shape: Shape, ids: np.ndarray, expected: np.ndarray, timed: bool
) -> None:
    if not timed and runner.seconds_per_token * ids.size > LONGEST_CHECK_S:
        runner.unchecked.append(shape)
        return
    with _failures_of(runner, shape):
        agreement = check(runner.worker, runner.contender, config, ids, expected)
        runner.checks[shape] = agreement
        if not agreement.agrees:
            runner.disagreed = f"disagrees at {shape[0]}×{shape[1]}: {agreement.reason}"
            return
        if ids.size > 1:  # the call before may have compiled something; this one tells how slow the engine is
            [seconds] = runner.worker.time(PHASE, ids, budget_s=0, deadline_s=CALL_DEADLINE_S)
            runner.seconds_per_token = seconds / ids.size


def _measure_limits(probe: Worker, config: GPTConfig, plan: Plan, earlier: Limits | None = None) -> Limits:
    """The limits, or the better of those found earlier and now."""
    if earlier is None:
        probe.call("load", plan.threads)
    size = weight_bytes(config)
    peak = probe.call("peak_flops_per_s")
    near, far = probe.call("read_bytes_per_s", size), probe.call("read_bytes_per_s", limits.UNCACHED_BYTES)
    if earlier:
        peak = max(peak, earlier.peak_flops_per_s)
        near = max(near, earlier.bandwidth_bytes_per_s)
        far = max(far, earlier.memory_bytes_per_s)
    return Limits(plan.threads, peak, near, size, far)


def _time_all(runners: list[Runner], config: GPTConfig, plan: Plan, progress: tqdm) -> None:
    share_s = plan.minutes * 60 / len(plan.shapes) / max(1, len(runners))  # of one engine at one shape
    step = (progress.total - progress.n) / (len(plan.shapes) * ROUNDS * max(1, len(runners)))
    for shape in plan.shapes:
        ids = random_ids(config, *shape, plan.seed)
        for runner in runners:
            runner.samples_s[shape] = []
        for number in range(ROUNDS):
            for runner in rotated(runners, number):
                progress.set_description(f"timing {runner.contender.label} at {shape[0]}×{shape[1]}")
                _take_turn(runner, shape, ids, share_s)
                progress.update(step)


def _take_turn(runner: Runner, shape: Shape, ids: np.ndarray, share_s: float) -> None:
    taken = runner.samples_s[shape]
    spent = sum(sum(samples) for samples in taken)
    sits_out = not runner.may_run(shape) or (len(taken) >= FEWEST_ROUNDS and spent >= share_s)
    with _failures_of(runner, shape):
        samples: list[float] = []
        if not sits_out:
            samples = runner.worker.time(PHASE, ids, budget_s=share_s / ROUNDS, deadline_s=CALL_DEADLINE_S)
        taken.append(tuple(samples))


def _measurement_of(runner: Runner, shape: Shape) -> Measurement | None:
    samples = tuple(runner.samples_s.get(shape, ()))
    if not runner.may_run(shape) or len(samples) < ROUNDS:
        return None
    contender = runner.contender
    return Measurement(contender.engine, contender.variant, PHASE, contender.dtype, *shape, samples)


def _rows_at(
    shape: Shape, runners: list[Runner], contenders: list[Contender], config: GPTConfig, plan: Plan, measured: Limits
) -> Iterator[dict]:
    by_contender = {runner.contender: runner for runner in runners}
    bound = bound_of(measured, config, *shape)
    found = [_measurement_of(runner, shape) for runner in runners]
    baseline = next((each for each in found if each and each.engine == BASELINE), None)
    for contender in contenders:
        runner = by_contender.get(contender)
        row = {
            "engine": contender.engine,
            "variant": contender.variant,
            "label": contender.label,
            "summary": contender.summary,
            "phase": PHASE,
            "dtype": contender.dtype,
            "B": shape[0],
            "T": shape[1],
            "threads": plan.threads,
        }
        status, reason = _status_of(contender, runner, shape)
        measurement = _measurement_of(runner, shape) if runner and status == "timed" else None
        yield (
            row
            | {"status": status, "reason": reason, "limit_ms": bound.seconds * 1e3, "limit_binds": bound.binds}
            | _times_of(measurement, baseline, bound)
            | _errors_of(runner, shape, tolerance_of(contender.dtype, config))
        )


def _status_of(contender: Contender, runner: Runner | None, shape: Shape) -> tuple[str, str | None]:
    """`timed`, or why not: `absent` (a package is), `failed` (it raised, died or hung), `disagrees`."""
    if runner is None:
        return "absent", contender.reason_missing
    if runner.disagreed:
        return "disagrees", runner.disagreed
    if reason := runner.failed or runner.errors.get(shape):
        return "failed", reason
    return "timed", None


def _times_of(measurement: Measurement | None, baseline: Measurement | None, bound: Bound) -> dict:
    if measurement is None:
        names = ("median_ms", "spread", "speedup", "percent_of_limit")
        return {"samples_ms": [], "samples_by_round": []} | dict.fromkeys(names)
    median_s = median_of(measurement)
    speedup = speedup_of(measurement, baseline) if baseline else None
    return {
        "samples_ms": [sample * 1e3 for samples in measurement.samples_s for sample in samples],
        "samples_by_round": [len(samples) for samples in measurement.samples_s],
        "median_ms": median_s * 1e3,
        "spread": spread_of(measurement),
        "speedup": asdict(speedup) if speedup else None,
        "percent_of_limit": 100 * bound.seconds / median_s,
    }


def _errors_of(runner: Runner | None, shape: Shape, tolerance: float) -> dict:
    agreement = runner.checks.get(shape) if runner else None
    names = ("max_abs_err", "max_rel_err", "top1_match", "agrees")
    errors = {name: getattr(agreement, name) if agreement else None for name in names}
    if runner and runner.disagreed:  # at whichever shape: its numbers are not to be trusted at the others either
        errors["agrees"] = False
    return errors | {"tolerance": tolerance}


def _checks_of(runner: Runner, config: GPTConfig, plan: Plan) -> Iterator[dict]:
    """Every check of an engine, of shapes that are timed and of those that are not."""
    for shape in _all_shapes(config, plan):
        agreement = runner.checks.get(shape)
        note = "too slow to be checked here" if shape in runner.unchecked else runner.errors.get(shape)
        found = asdict(agreement) if agreement else {"agrees": None, "reason": note or runner.failed}
        yield {"label": runner.contender.label, "B": shape[0], "T": shape[1]} | found
