"""Samples by round, and what can be said from them. Statistics are derived here, late; samples are kept raw.

Engines take turns: a round gives each one turn, in an order that rotates. What slows the machine for a while then
slows all of them, so ratios are taken within a round, and how far an engine's own rounds differ is the noise floor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Measurement:
    """Seconds of each unit of one engine's work, in every timed call. samples_s: a tuple a round; empty if it sat out.

    Raises ValueError if there is no sample at all.
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
    """The median of a ratio over the rounds, with its lowest and highest round."""

    median: float
    low: float
    high: float


def median_of(measurement: Measurement) -> float:
    """The median of all samples, in seconds."""
    return median(sample for samples in measurement.samples_s for sample in samples)


def round_medians(measurement: Measurement) -> list[float | None]:
    """Each round's median in seconds, None where the engine sat the round out."""
    return [median(samples) if samples else None for samples in measurement.samples_s]


def spread_of(measurement: Measurement) -> float | None:
    """How far an engine differs from itself: slowest round over fastest, less 1. None with fewer than two rounds."""
    medians = [value for value in round_medians(measurement) if value is not None]
    return max(medians) / min(medians) - 1 if len(medians) > 1 else None


def speedup_of(measurement: Measurement, baseline: Measurement) -> Ratio | None:
    """How many times as fast as the baseline, from the rounds in which both ran. None if there is no such round."""
    pairs = zip(round_medians(baseline), round_medians(measurement), strict=True)
    ratios = [theirs / ours for theirs, ours in pairs if theirs is not None and ours is not None]
    return Ratio(median(ratios), min(ratios), max(ratios)) if ratios else None


def rotated(order: Sequence, round_number: int) -> list:
    """The order of turns in a round: each round begins with the next one."""
    start = round_number % len(order) if order else 0
    return [*order[start:], *order[:start]]
