"""Odd lengths against what their neighbours say."""

import pytest

from bench.odd import ODD, cliffs, neighbours, sizes
from bench.prepare import SEEDED
from gpt.config import GPTConfig


def rows(**by_length: float) -> list[dict]:
    """Rows of one engine, T4 being the time at T=4."""
    return [
        {"label": "e", "phase": "prefill", "status": "timed", "B": 1, "T": int(name[1:]), "median_ms": time}
        for name, time in by_length.items()
    ]


def test_neighbours_are_the_multiples_of_16_around() -> None:
    assert [neighbours(T) for T in ODD] == [(2,), (16, 32), (48, 64), (64, 80), (240, 256), (256, 272)]


def test_what_fits_the_model_is_timed() -> None:
    assert sizes(GPTConfig()) == [1, 2, 16, 17, 32, 48, 63, 64, 65, 80, 240, 255, 256, 257, 272]
    assert sizes(SEEDED["demo"]) == [1, 2, 16, 17, 32, 48, 63, 64]
    assert sizes(SEEDED["tiny"]) == [1, 2]


def test_the_time_is_held_to_the_one_interpolated() -> None:
    found = cliffs(rows(T16=1.0, T17=2.0, T32=2.6, T1=1.0, T2=0.5))
    assert found == {"e": {1: 2.0, 17: pytest.approx(2.0 / 1.1)}}


def test_without_neighbours_nothing_is_said() -> None:
    assert cliffs(rows(T17=2.0, T32=1.0)) == {}
    assert cliffs([{"label": "e", "phase": "prefill", "status": "failed", "B": 1, "T": 1, "median_ms": None}]) == {}
