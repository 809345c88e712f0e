"""Code of one compiler, compiled in several ways, timed in turns in one process: it is the same runtime for all."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from tqdm import tqdm

from bench.harness.measure import rotated

ROUNDS, ROUND_S = 5, 0.3


@dataclass(frozen=True)
class Contestant:
    """One way to compile the same work. ready_s: until its code was there. call: runs it once."""

    name: str
    ready_s: float
    call: Callable[[], object]


def times_of(found: list[Contestant]) -> list[float]:
    """The median seconds of a call of each, in turns."""
    samples: list[list[float]] = [[] for _ in found]
    for each in found:
        each.call()
    for number in tqdm(range(ROUNDS), desc="time", unit="round", leave=False):
        for index in rotated(range(len(found)), number):
            until = time.perf_counter() + ROUND_S
            while time.perf_counter() < until:
                start = time.perf_counter()
                found[index].call()
                samples[index].append(time.perf_counter() - start)
    return [median(each) for each in samples]
