"""Finds performance cliffs: prompt lengths that take longer than their neighbours suggest.

A cliff shows that a kernel leaves its fast path where a length is not a multiple of its tile.
"""

from statistics import median

import numpy as np

from bench.models.shape import Model
from bench.report.summary import medians_by_round

BAR = 1.25  # a cliff takes more than 1.25 times the time interpolated from its neighbours
STEP = 16  # neighbours are multiples of 16
CLIFF_LENGTHS = (1, 17, 63, 65, 255, 257)


def neighbours(T: int) -> tuple[int, ...]:
    """Return the lengths to compare T with: the multiples of STEP around it, or two tokens for a single one."""
    below = T // STEP * STEP
    return (below, below + STEP) if below else (2,)


def sizes(config: Model) -> list[int]:
    """List all lengths to time: CLIFF_LENGTHS with their neighbours, as far as they fit in block_size."""
    groups = [(T, *neighbours(T)) for T in CLIFF_LENGTHS]
    return sorted({T for group in groups if max(group) <= config.block_size for T in group})


def cliffs(rows: list[dict]) -> dict[str, dict[int, float]]:
    """Map each engine to {T: its time over the time interpolated from the neighbours}, for prefills of one sequence.

    The interpolation is linear in T within each round, and the ratio is the median over the rounds. A single token is
    compared with two.
    """
    times: dict[str, dict[int, list[float | None]]] = {}
    for row in rows:
        if (row["phase"], row["status"], row["B"]) == ("prefill", "timed", 1):
            times.setdefault(row["label"], {})[row["T"]] = medians_by_round(row)
    found = {label: {T: _over_neighbours(T, by_length) for T in CLIFF_LENGTHS} for label, by_length in times.items()}
    known = {label: {T: ratio for T, ratio in ratios.items() if ratio} for label, ratios in found.items()}
    return {label: ratios for label, ratios in known.items() if ratios}


def _over_neighbours(T: int, times: dict[int, list[float | None]]) -> float | None:
    """Return the median ratio over the rounds that have all times; None if there is none."""
    around = neighbours(T)
    if not {T, *around} <= times.keys():
        return None
    rounds = zip(times[T], *(times[each] for each in around), strict=True)
    ratios = [time / float(np.interp(T, around, known)) for time, *known in rounds if None not in (time, *known)]
    return median(ratios) if ratios else None
