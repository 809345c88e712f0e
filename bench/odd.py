"""Prompts of odd lengths: does one take longer than its neighbours say, as where a kernel falls off its fast path."""

import numpy as np

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

    From the medians, linear in T; of a single token, over the time of two.
    """
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        if (row["phase"], row["status"], row["B"]) == ("prefill", "timed", 1):
            times.setdefault(row["label"], {})[row["T"]] = row["median_ms"]
    found = {
        label: {
            T: by_length[T] / float(np.interp(T, around, [by_length[each] for each in around]))
            for T in ODD
            if {T, *(around := neighbours(T))} <= by_length.keys()
        }
        for label, by_length in times.items()
    }
    return {label: ratios for label, ratios in found.items() if ratios}
