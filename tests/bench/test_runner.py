"""One contender's way through checks and rounds, on a worker that answers from a list."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench.artifacts import Artifacts
from bench.backends import Contender
from bench.prepare import SEEDED
from bench.runner import LONGEST_CHECK_S, Runner
from bench.worker import WorkerError

CONFIG = SEEDED["tiny"]
LOGITS = np.ones((1, 4, CONFIG.vocab_size))
IDS = np.zeros((1, 4), np.int64)
SHAPE = (1, 4)


class FakeWorker:
    """Gives the logits, or fails; a call takes `seconds`."""

    def __init__(self, logits: Any = LOGITS, seconds: float = 0.001) -> None:
        self.logits, self.seconds, self.asked = logits, seconds, []

    def call(self, method: str, *_: object, deadline_s: float = 0) -> Any:
        self.asked.append(method)
        if isinstance(self.logits, Exception):
            raise self.logits
        return self.logits.astype("float32") if method == "prefill" else {"fake": "1"}

    def time(self, *_: object, budget_s: float, deadline_s: float = 0) -> list[float]:
        return [self.seconds] * 3

    def time_once(self, *_: object, deadline_s: float = 0) -> float:
        return self.seconds


@pytest.fixture
def runner_of() -> Callable[..., Runner]:
    """A runner of a fake worker, loaded and checked at one shape."""

    def make(**answers: Any) -> Runner:
        runner = Runner(Contender("fake", "", "float32", "checkpoint", "a fake", ()), FakeWorker(**answers))
        runner.load(Artifacts("nowhere"), threads=1)
        if not runner.failed:
            runner.check(CONFIG, IDS, LOGITS, timed=True)
        return runner

    return make


def test_an_engine_that_agrees_is_measured(runner_of: Callable[..., Runner]) -> None:
    runner = runner_of()
    for _ in range(2):
        runner.take_turn(IDS, turn_s=1, share_s=10)
    assert runner.measurement_at(SHAPE).samples_s == ((0.001,) * 3,) * 2
    assert runner.versions == {"fake": "1"}


def test_an_engine_that_does_not_load_says_why(runner_of: Callable[..., Runner]) -> None:
    runner = runner_of(logits=WorkerError("out of plutonium"))
    assert runner.failed == "out of plutonium"
    assert not runner.may_run(SHAPE)


def test_an_engine_that_disagrees_is_not_timed(runner_of: Callable[..., Runner]) -> None:
    runner = runner_of(logits=LOGITS + 1)
    runner.take_turn(IDS, turn_s=1, share_s=10)
    assert "disagrees at 1×4: error 1.0e+00" in runner.disagreed
    assert runner.measurement_at(SHAPE) is None


def test_a_failure_at_one_shape_leaves_the_others(runner_of: Callable[..., Runner]) -> None:
    runner = runner_of()
    runner._worker.logits = WorkerError("too odd")
    runner.check(CONFIG, np.zeros((3, 3), np.int64), LOGITS, timed=False)
    assert runner.errors == {(3, 3): "too odd"}
    assert runner.may_run(SHAPE)
    assert not runner.may_run((3, 3))


def test_a_slow_engine_is_spared_shapes_that_are_only_checked(runner_of: Callable[..., Runner]) -> None:
    runner = runner_of(seconds=LONGEST_CHECK_S)
    runner._worker.asked.clear()
    runner.check(CONFIG, np.zeros((1, 8), np.int64), LOGITS, timed=False)
    assert runner.unchecked == [(1, 8)]
    assert runner._worker.asked == []


def test_a_slow_engine_makes_one_call_a_turn_until_its_share_is_spent(runner_of: Callable[..., Runner]) -> None:
    runner = runner_of(seconds=3.0)
    for _ in range(4):
        runner.take_turn(IDS, turn_s=1, share_s=5)
    assert runner.measurement_at(SHAPE).samples_s == ((3.0,), (3.0,), (), ())
