"""Prompts of odd lengths: does one take longer than its neighbours say, as where a kernel falls off its fast path."""

from statistics import median

import numpy as np

from bench.report.summary import medians_by_round
from gpt.config import GPTConfig

BAR = 1.25  # times the time interpolated from the neighbours
STEP = 16  # neighbours are multiples of it
ODD = (1, 17, 63, 65, 255, 257)


def neighbours(T: int) -> tuple[int, ...]:
    """The lengths that an odd one is held to: the multiples of STEP around it; of a single token, two."""
    below = T // STEP * STEP
    return (below, below + STEP) if below else (2,)


def sizes(config: GPTConfig) -> list[int]:
    """All lengths to time, the odd ones with their neighbours, as they fit the model."""
    groups = [(T, *neighbours(T)) for T in ODD]
    return sorted({T for group in groups if max(group) <= config.block_size for T in group})


def cliffs(rows: list[dict]) -> dict[str, dict[int, float]]:
    """Of each engine timed at odd lengths and their neighbours, one sequence each: T to its time over the interpolated.

    Of each round, linear in T, and of those ratios the median; of a single token, over the time of two.
    """
    times: dict[str, dict[int, list[float | None]]] = {}
    for row in rows:
        if (row["phase"], row["status"], row["B"]) == ("prefill", "timed", 1):
            times.setdefault(row["label"], {})[row["T"]] = medians_by_round(row)
    found = {label: {T: _over_neighbours(T, by_length) for T in ODD} for label, by_length in times.items()}
    known = {label: {T: ratio for T, ratio in ratios.items() if ratio} for label, ratios in found.items()}
    return {label: ratios for label, ratios in known.items() if ratios}


def _over_neighbours(T: int, times: dict[int, list[float | None]]) -> float | None:
    """The median over the rounds that have all three times; None if there is none."""
    around = neighbours(T)
    if not {T, *around} <= times.keys():
        return None
    rounds = zip(times[T], *(times[each] for each in around), strict=True)
    ratios = [odd / float(np.interp(T, around, known)) for odd, *known in rounds if None not in (odd, *known)]
    return median(ratios) if ratios else None
