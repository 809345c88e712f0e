"""Times work on a device by the device's own clock, and on a CPU by the CPU's."""

import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

from bench.harness.worker import FEWEST_SAMPLES, WARM_UP, sample

MOST_SAMPLES = 200  # per turn
LATE_S = 1e-3  # delay with which the host may notice the end of the work


def sample_on(device: str, call: Callable[[], object], budget_s: float) -> list[float]:
    """Time some calls, more while the budget lasts, after a warm-up that is not counted: the seconds of each.

    device: `cuda`, where the calls are queued one behind the other on torch's current stream, an event between each
    two, and are waited for together; or `cpu`. Raises RuntimeError if the work ran on another stream than the events.
    """
    if device == "cpu":
        return sample(call, budget_s)
    return sample_queues(partial(_queue, call), budget_s)


def sample_queues(seconds_of: Callable[[int], list[float]], budget_s: float) -> list[float]:
    """Time as `sample_on` does calls that are queued together: `seconds_of(n)` gives the seconds of each of n."""
    warm, once = 0.0, max(seconds_of(1))
    while warm < WARM_UP * budget_s:
        samples = seconds_of(_count(WARM_UP * budget_s, once))
        warm, once = warm + sum(samples), min(samples)
    return seconds_of(_count(budget_s, once))


def _count(budget_s: float, once_s: float) -> int:
    return int(min(max(budget_s / max(once_s, 1e-6), FEWEST_SAMPLES), MOST_SAMPLES))


def _queue(call: Callable[[], object], count: int) -> list[float]:
    import torch

    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    start = time.perf_counter()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()  # waits for all streams
    host_s = time.perf_counter() - start
    seconds = [first.elapsed_time(second) / 1e3 for first, second in pairwise(events)]
    check_all_was_seen(sum(seconds), host_s)
    return seconds


def check_all_was_seen(events_s: float, host_s: float) -> None:
    """Raise RuntimeError if the events saw less than half of what the host waited for: then they do not time it."""
    if host_s > 2 * events_s + LATE_S:
        raise RuntimeError(
            f"the events saw {events_s * 1e3:.3f} ms of work, and the host waited {host_s * 1e3:.3f} ms for it: it "
            "runs on another stream than torch's current one"
        )
