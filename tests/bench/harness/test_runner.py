"""One candidate's way through checks and rounds, on a worker that answers from a list."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from bench.backends import Candidate
from bench.correctness.agreement import Errors
from bench.correctness.rounding import Rounding
from bench.harness.runner import LONGEST_CALL_S, LONGEST_CHECK_S, Runner, shares_of
from bench.harness.work import Decode, Generate, Prefill, Work
from bench.harness.worker import WorkerError
from bench.models.artifacts import Artifacts
from bench.models.build import SEEDED

CONFIG = SEEDED["tiny"]
WORK = Prefill(1, 4)
LOGITS = np.ones((1, 4, CONFIG.vocab_size))
IDS = np.zeros((1, 4), np.int64)
FILES = (("prefill", "ckpt.pt"), ("decode", "ckpt.pt"))


class FakeWorker:
    """Gives the logits, or fails; a call takes `seconds`."""

    def __init__(self, logits: Any = LOGITS, seconds: float = 0.001) -> None:
        self.logits, self.seconds, self.asked = logits, seconds, []

    def call(self, method: str, *_: object, deadline_s: float = 0) -> Any:
        self.asked.append(method)
        if isinstance(self.logits, Exception):
            raise self.logits
        logits = self.logits.astype("float32")
        return {"prefill": logits, "versions": {"fake": "1"}, "loss": 2.5}.get(method, logits[:, -1])

    def time(self, method: str, *_: object, budget_s: float, deadline_s: float = 0) -> list[float]:
        self.asked.append(f"time {method}")
        return [self.seconds] * 3

    def time_once(self, *_: object, deadline_s: float = 0) -> float:
        return self.seconds


class Ones:
    """A reference whose logits are all 1."""

    def __call__(
        self, ids: np.ndarray, positions: Sequence[int] | None = None, rounding: Rounding | None = None
    ) -> np.ndarray:
        return np.ones((len(ids), ids.shape[1] if positions is None else len(positions), CONFIG.vocab_size))

    def allowed(self, precision: str, rounding: Rounding | None = None) -> Errors:
        return Errors(1e-6, 1e-6, 1e-6)


def check(runner: Runner, work: Work, *, timed: bool) -> None:
    """As the comparison does, against logits of ones."""
    ids = work.ids(CONFIG, seed=0)
    runner.check(work, ids, Ones(), timed=timed)


@pytest.fixture
def runner_of() -> Callable[..., Runner]:
    """A runner of a fake worker, loaded and checked at one piece of work."""

    def make(**answers: Any) -> Runner:
        runner = Runner(Candidate("fake", "", "fp32", FILES, "a fake"), FakeWorker(**answers))
        runner.load(Artifacts("nowhere"), CONFIG, threads=1)
        if not runner.failed:
            check(runner, WORK, timed=True)
        return runner

    return make


def test_an_engine_that_agrees_is_measured(runner_of: Callable[..., Runner]) -> None:
    runner = runner_of()
    for _ in range(2):
        runner.take_turn(WORK, IDS, turn_s=1, share_s=10)
    assert runner.measurement_at(WORK).samples_s == ((0.001,) * 3,) * 2
    assert runner.versions == {"fake": "1"}


def test_an_engine_that_does_not_load_says_why(runner_of: Callable[..., Runner]) -> None:
    runner = runner_of(logits=WorkerError("out of plutonium"))
    assert runner.failed == "out of plutonium"
    assert not runner.may_run(WORK)


def test_an_engine_that_disagrees_is_not_timed(runner_of: Callable[..., Runner]) -> None:
    runner = runner_of(logits=LOGITS + 1)
    runner.take_turn(WORK, IDS, turn_s=1, share_s=10)
    assert "disagrees in prefill at 1×4: error 1.0e+00" in runner.disagreed
    assert runner.measurement_at(WORK) is None


def test_a_failure_at_one_work_leaves_the_others(runner_of: Callable[..., Runner]) -> None:
    runner = runner_of()
    runner._worker.logits = WorkerError("too odd")
    check(runner, Prefill(3, 3), timed=False)
    assert runner.errors == {Prefill(3, 3): "too odd"}
    assert runner.may_run(WORK)
    assert not runner.may_run(Prefill(3, 3))


def test_a_slow_engine_is_spared_what_is_only_checked(runner_of: Callable[..., Runner]) -> None:
    runner = runner_of(seconds=LONGEST_CHECK_S)
    runner._worker.asked.clear()
    check(runner, Prefill(1, 8), timed=False)
    assert list(runner.left_out) == [Prefill(1, 8)]
    assert runner._worker.asked == []


def test_what_would_take_too_long_is_left_out_and_said_to_be(runner_of: Callable[..., Runner]) -> None:
    runner = runner_of(seconds=LONGEST_CALL_S)
    check(runner, Prefill(1, 8), timed=True)
    assert runner.left_out[Prefill(1, 8)] == "left out: a call would take some 60 s"
    assert not runner.may_run(Prefill(1, 8))
    assert runner.may_run(WORK)


def test_the_loss_is_noted_or_why_there_is_none(runner_of: Callable[..., Runner]) -> None:
    windows = np.zeros((2, 17), np.int64)
    quick, slow, broken = runner_of(), runner_of(seconds=30.0), runner_of(logits=WorkerError("out of memory"))
    for runner in (quick, slow, broken):
        runner.measure_loss(windows)
    assert (quick.loss, quick.no_loss) == (2.5, None)
    assert (slow.loss, slow.no_loss) == (None, "left out: it would take some 240 s")
    assert (broken.loss, broken.no_loss) == (None, "out of memory")


def test_a_slow_engine_makes_one_call_a_turn_until_its_share_is_spent(runner_of: Callable[..., Runner]) -> None:
    runner = runner_of(seconds=3.0)
    for _ in range(5):
        runner.take_turn(WORK, IDS, turn_s=1, share_s=10)
    assert runner.measurement_at(WORK).samples_s == ((3.0,), (3.0,), (3.0,), (3.0,), ())


def test_a_slow_engine_makes_three_calls_at_least(runner_of: Callable[..., Runner]) -> None:
    runner = runner_of(seconds=3.0)
    for _ in range(5):
        runner.take_turn(WORK, IDS, turn_s=1, share_s=1)
    assert runner.measurement_at(WORK).samples_s == ((3.0,), (3.0,), (3.0,), (), ())


def test_what_a_slow_engine_compiles_for_a_shape_is_not_timed(runner_of: Callable[..., Runner]) -> None:
    """Its first call at each piece of work takes twice as long."""
    runner = runner_of(seconds=3.0)
    calls: list[float] = []
    runner._worker.time_once = lambda *_, deadline_s: calls.append(6.0 if not calls else 3.0) or calls[-1]
    for _ in range(2):
        runner.take_turn(WORK, IDS, turn_s=1, share_s=6)
    assert calls == [6.0, 3.0, 3.0]
    assert runner.measurement_at(WORK).samples_s == ((3.0,), (3.0,))


def test_a_phase_that_an_engine_has_not_is_not_run(runner_of: Callable[..., Runner]) -> None:
    runner = runner_of()
    assert runner.can(Decode(1, 1, 4))
    assert not runner.can(Generate(1, 4, 4))
    assert not runner.may_run(Generate(1, 4, 4))


def test_the_prompt_is_put_in_the_cache_once_for_all_rounds(runner_of: Callable[..., Runner]) -> None:
    runner, work = runner_of(), Decode(1, 1, 4)
    check(runner, work, timed=True)
    runner._worker.asked.clear()
    for _ in range(2):
        runner.take_turn(work, work.ids(CONFIG, seed=0), turn_s=1, share_s=10)
    assert runner._worker.asked == ["time decode", "time decode"]


def test_other_work_in_between_has_the_prompt_put_in_again(runner_of: Callable[..., Runner]) -> None:
    runner = runner_of()
    for context in (4, 5, 4):
        work = Decode(1, 1, context)
        runner.take_turn(work, work.ids(CONFIG, seed=0), turn_s=1, share_s=10)
    assert runner._worker.asked[-6:] == ["fill", "time decode"] * 3


def test_a_generation_is_measured_by_the_token() -> None:
    runner = Runner(Candidate("fake", "", "fp32", (("generate", "ckpt.pt"),), "a fake"), FakeWorker())
    work = Generate(1, 4, 8)
    runner.take_turn(work, work.ids(CONFIG, seed=0), turn_s=1, share_s=10)
    assert runner.measurement_at(work).samples_s == ((0.001 / 4,) * 3,)


def test_long_calls_have_more_of_the_time(runner_of: Callable[..., Runner]) -> None:
    runners = [runner_of(seconds=0.4), runner_of(seconds=4.0)]  # the fastest says how long a call is
    shares = shares_of(runners, [Prefill(1, 4), Prefill(3, 4)], seconds=64)
    assert shares == pytest.approx({Prefill(1, 4): 8 + 4, Prefill(3, 4): 8 + 12})


def test_who_sits_out_has_none_of_the_time(runner_of: Callable[..., Runner]) -> None:
    wrong, right = runner_of(logits=LOGITS + 1), runner_of()
    assert shares_of([wrong, right], [WORK], seconds=10) == {WORK: 10}
    assert shares_of([wrong], [WORK], seconds=10) == {WORK: 10}
    assert shares_of([right], [Decode(1, 1, 8)], seconds=10) == {Decode(1, 1, 8): 10}
