"""Compares odd lengths with the time interpolated from their neighbours."""

from dataclasses import replace

import pytest

from bench.models.build import SEEDED
from bench.report.cliffs import CLIFF_LENGTHS, cliffs, neighbours, sizes
from gpt.config import GPTConfig


def row(T: int, *rounds_ms: float | None) -> dict:
    """Build a row of one engine at a length, with at most one call in each round."""
    samples = [ms for ms in rounds_ms if ms is not None]
    counts = [int(ms is not None) for ms in rounds_ms]
    names = {"label": "e", "phase": "prefill", "status": "timed", "B": 1, "T": T}
    return names | {"samples_ms": samples, "samples_by_round": counts}


def test_neighbours_are_the_multiples_of_16_around() -> None:
    assert [neighbours(T) for T in CLIFF_LENGTHS] == [(2,), (16, 32), (48, 64), (64, 80), (240, 256), (256, 272)]


def test_what_fits_the_model_is_timed() -> None:
    assert sizes(GPTConfig()) == [1, 2, 16, 17, 32, 48, 63, 64, 65, 80, 240, 255, 256, 257, 272]
    assert sizes(SEEDED["demo"]) == [1, 2, 16, 17, 32, 48, 63, 64]
    assert sizes(replace(SEEDED["tiny"], block_size=16)) == [1, 2]


def test_the_time_is_held_to_the_one_interpolated() -> None:
    found = cliffs([row(16, 1.0), row(17, 2.0), row(32, 2.6), row(1, 1.0), row(2, 0.5)])
    assert found == {"e": {1: 2.0, 17: pytest.approx(2.0 / 1.1)}}


def test_a_round_is_compared_with_itself() -> None:
    """The machine runs at half its speed in the second round, and one length has no sample in the fourth."""
    found = cliffs([row(2, 1.0, 2.0, 1.0, 3.0), row(1, 0.5, 1.0, 0.9, None)])
    assert found == {"e": {1: 0.5}}


def test_without_neighbours_nothing_is_said() -> None:
    assert cliffs([row(17, 2.0), row(32, 1.0)]) == {}
    assert cliffs([row(1, None, 1.0), row(2, 1.0, None)]) == {}
    assert cliffs([row(1) | {"status": "failed"}, row(2, 1.0)]) == {}
