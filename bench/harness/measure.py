"""Samples by round, and the statistics that are derived from them. Samples are kept raw; a statistic is computed late.

Engines take turns: a round gives each engine one turn, in an order that rotates. A disturbance of the machine then
slows all engines of a round, so ratios are taken within a round. The spread of an engine's own rounds is the noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Measurement:
    """Every timed call of one engine at one work, in seconds per unit of the work.

    samples_s has a tuple for each round, which is empty if the engine was not timed in it. Raises
    ValueError if there is no sample at all.
    """

    engine: str
    variant: str
    phase: str
    precision: str
    B: int
    T: int
    context: int
    samples_s: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not any(self.samples_s):
            raise ValueError("samples_s=(): must hold at least one sample")


@dataclass(frozen=True)
class Ratio:
    """A ratio of two engines: its median over the rounds, its lowest and its highest round."""

    median: float
    low: float
    high: float


def median_of(measurement: Measurement) -> float:
    """Compute the median of all samples, in seconds."""
    return median(sample for samples in measurement.samples_s for sample in samples)


def round_medians(measurement: Measurement) -> list[float | None]:
    """Compute each round's median in seconds, None for a round without samples."""
    return [median(samples) if samples else None for samples in measurement.samples_s]


def spread_of(measurement: Measurement) -> float | None:
    """Compute the slowest round's median over the fastest round's, less 1. None with fewer than two rounds."""
    medians = [value for value in round_medians(measurement) if value is not None]
    return max(medians) / min(medians) - 1 if len(medians) > 1 else None


def speedup_of(measurement: Measurement, baseline: Measurement) -> Ratio | None:
    """Compute the speed-up over the baseline from the rounds in which both ran. None if there is no such round."""
    pairs = zip(round_medians(baseline), round_medians(measurement), strict=True)
    ratios = [theirs / ours for theirs, ours in pairs if theirs is not None and ours is not None]
    return Ratio(median(ratios), min(ratios), max(ratios)) if ratios else None


def rotated(order: Sequence[T], round_number: int) -> list[T]:
    """Return the order of turns in a round, in which the next one comes first, round by round."""
    start = round_number % len(order) if order else 0
    return [*order[start:], *order[:start]]
