"""Times of several builds of the same work in one process, for compilers that all run on the same runtime.

`bench.harness.race` gives each engine a process; builds of one compiler differ in their code alone, so they may share
one. The rounds, their rotating order and the sampling are those of the race.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from bench.harness.measure import rotated
from bench.harness.plan import ROUNDS
from bench.harness.worker import sample
from gpt.progress import progress_bar

ROUND_S = 0.3  # budget of a build's turn in each round


@dataclass(frozen=True)
class Build:
    """One way to compile the same work. ready_s: seconds until its code was there. call: runs it once."""

    name: str
    ready_s: float
    call: Callable[[], object]


def times_of(found: Sequence[Build]) -> list[float]:
    """Time all builds in turns: the median seconds of a call of each."""
    samples: list[list[float]] = [[] for _ in found]
    for each in found:
        each.call()
    for number in progress_bar(range(ROUNDS), desc="time", unit="round", leave=False):
        for index in rotated(range(len(found)), number):
            samples[index] += sample(found[index].call, ROUND_S)
    return [median(each) for each in samples]
