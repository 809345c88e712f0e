"""Timing by a device's events, with a device that does what it is told."""

from types import SimpleNamespace

import pytest
import torch

from bench.gpu import clock
from bench.harness.worker import FEWEST_SAMPLES


class Device:
    """A queue of work with a clock: `now_s` is when all that was asked of it is done."""

    def __init__(self) -> None:
        self.now_s, self.calls, self.unseen_s = 0.0, 0, 0.0

    def work(self, seconds: float) -> None:
        self.calls += 1
        self.now_s += seconds

    def work_elsewhere(self, seconds: float) -> None:
        """On another stream: the host waits for it, and the events are done before it."""
        self.unseen_s += seconds

    def event(self, enable_timing: bool) -> "Device.Event":
        assert enable_timing
        return Device.Event(self)

    class Event:
        def __init__(self, device: "Device") -> None:
            self.device = device

        def record(self) -> None:
            self.at_s = self.device.now_s

        def elapsed_time(self, later: "Device.Event") -> float:
            return (later.at_s - self.at_s) * 1e3


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """In CUDA's place."""
    found = Device()
    monkeypatch.setattr(torch.cuda, "Event", found.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: found.now_s + found.unseen_s))
    return found


def test_each_call_is_timed_by_the_events_around_it(device: Device) -> None:
    samples = clock.sample_on("cuda", lambda: device.work(0.01), budget_s=0.5)
    assert samples == pytest.approx([0.01] * 50)
    assert device.calls > 50  # it was warmed up


def test_a_slow_call_is_repeated_a_few_times_and_a_quick_one_not_for_ever(device: Device) -> None:
    assert len(clock.sample_on("cuda", lambda: device.work(2.0), budget_s=0.1)) == FEWEST_SAMPLES
    assert len(clock.sample_on("cuda", lambda: device.work(1e-5), budget_s=1.0)) == clock.MOST_SAMPLES


def test_what_a_first_call_compiles_is_not_timed(device: Device) -> None:
    samples = clock.sample_on("cuda", lambda: device.work(0.01 if device.calls else 60.0), budget_s=0.1)
    assert max(samples) == pytest.approx(0.01)


def test_work_on_a_stream_that_the_events_do_not_see_is_an_error(device: Device) -> None:
    with pytest.raises(RuntimeError, match="another stream than torch's current one"):
        clock.sample_on("cuda", lambda: device.work_elsewhere(0.01), budget_s=0.1)


def test_a_cpu_has_its_own_clock() -> None:
    assert all(seconds > 0 for seconds in clock.sample_on("cpu", lambda: sum(range(100)), budget_s=0.001))
