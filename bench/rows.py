"""What the runners found, as plain rows of JSON; `bench.report` says what is in a row."""

from collections.abc import Iterator
from dataclasses import asdict

from bench.agreement import tolerance_of
from bench.backends import Contender
from bench.limits import Bound
from bench.measure import Measurement, median_of, speedup_of, spread_of
from bench.runner import PHASE, Runner, Shape
from gpt.config import GPTConfig

BASELINE = "eager"  # what speed-ups are taken to


def rows_of(
    shape: Shape, contenders: list[Contender], runners: list[Runner], config: GPTConfig, threads: int, bound: Bound
) -> Iterator[dict]:
    """One row for each contender at one shape, for absent ones and failed ones too."""
    by_contender = {runner.contender: runner for runner in runners}
    baseline = next((runner.measurement_at(shape) for runner in runners if runner.contender.engine == BASELINE), None)
    for contender in contenders:
        runner = by_contender.get(contender)
        status, reason = _status_of(contender, runner, shape)
        yield {
            "engine": contender.engine,
            "variant": contender.variant,
            "label": contender.label,
            "summary": contender.summary,
            "phase": PHASE,
            "dtype": contender.dtype,
            "B": shape[0],
            "T": shape[1],
            "threads": threads,
            "status": status,
            "reason": reason,
            **_times_of(runner.measurement_at(shape) if runner else None, baseline, bound),
            "limit_ms": bound.seconds * 1e3,
            "limit_binds": bound.binds,
            **_errors_of(runner, shape),
            "tolerance": tolerance_of(contender.dtype, config),
        }


def checks_of(runner: Runner, shapes: list[Shape]) -> Iterator[dict]:
    """Every check of an engine, of shapes that are timed and of those that are not."""
    for shape in shapes:
        agreement = runner.checks.get(shape)
        if agreement:
            found = asdict(agreement)
        else:
            slow = "left out: too slow for a shape that is not timed" if shape in runner.unchecked else None
            reason = runner.failed or runner.errors.get(shape) or slow or runner.disagreed
            found = {"agrees": None, "reason": reason}
        yield {"label": runner.contender.label, "B": shape[0], "T": shape[1]} | found


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


def _errors_of(runner: Runner | None, shape: Shape) -> dict:
    agreement = runner.checks.get(shape) if runner else None
    names = ("max_abs_err", "max_rel_err", "top1_match", "agrees")
    errors = {name: getattr(agreement, name) if agreement else None for name in names}
    # An engine that is wrong at one shape is not to be trusted at the others.
    return errors | ({"agrees": False} if runner and runner.disagreed else {})
