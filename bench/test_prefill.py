"""pytest bench/ --benchmark-only

Prefill of each engine at each shape. The check stands before the timing in the same test: --benchmark-only skips
tests that time nothing.
"""

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.agreement import odd_shapes
from bench.conftest import Setup
from bench.machine import describe_machine
from bench.runner import PHASE, Runner, Shape
from bench.units import shape_name

MOST_ROUNDS, FEWEST_ROUNDS, SECONDS = 50, 3, 1.0  # of an engine at a shape: what fits in about SECONDS


class WorkerClock:
    """A timer for pytest-benchmark that only runs while a worker is inside a call."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def __call__(self) -> float:
        return self._seconds

    def prefill(self, runner: Runner, ids: np.ndarray) -> None:
        """One call of an engine."""
        self._seconds += runner.seconds_of_one(ids)


CLOCK = WorkerClock()


@pytest.mark.benchmark(timer=CLOCK)
def test_prefill(
    benchmark: BenchmarkFixture,
    runner: Runner,
    shape: Shape,
    setup: Setup,
    expected: Callable[[Shape], tuple[np.ndarray, np.ndarray]],
) -> None:
    """An engine gives the reference's logits at this shape and at odd ones; then its calls are timed."""
    for each in (*odd_shapes(setup.config), shape):
        if each not in runner.checks and runner.may_run(each):
            runner.check(setup.config, *expected(each), timed=each == shape)
    benchmark.group = f"{PHASE} {shape_name(shape)}"
    benchmark.extra_info.update(_description(runner, shape, setup))
    assert not runner.failed, runner.failed
    assert not runner.errors, runner.errors
    assert not runner.disagreed, runner.disagreed
    ids, _ = expected(shape)
    rounds = int(np.clip(SECONDS / runner.seconds_of_one(ids), FEWEST_ROUNDS, MOST_ROUNDS))
    benchmark.pedantic(CLOCK.prefill, (runner, ids), rounds=rounds, warmup_rounds=1)


def _description(runner: Runner, shape: Shape, setup: Setup) -> dict:
    each, agreement = runner.contender, runner.checks.get(shape)
    return {
        "engine": each.engine,
        "variant": each.variant,
        "phase": PHASE,
        "dtype": each.dtype,
        "B": shape[0],
        "T": shape[1],
        "threads": setup.plan.threads,
        "model": {"words": setup.words, "config": asdict(setup.config)},
        "versions": runner.versions,
        "machine": describe_machine(),
        "seed": setup.plan.seed,
        "agreement": asdict(agreement) if agreement else None,
        "checked_at": [shape_name(checked) for checked in runner.checks],
    }
