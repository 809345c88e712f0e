"""Tests the benchmark of a KV cache where pytest-benchmark measures nothing."""

from types import SimpleNamespace

import pytest

from bench import test_generate as benchmarks
from bench.models.build import SEEDED
from gpt.checkpoint import seeded_checkpoint


def test_without_statistics_both_ways_are_compared_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "TOKENS", 3)
    drawn = []
    benchmark = SimpleNamespace(  # as with --benchmark-disable
        stats=None, extra_info={}, pedantic=lambda draw, arguments, rounds: drawn.append(draw(*arguments))
    )
    setup = SimpleNamespace(plan=SimpleNamespace(threads=1))
    benchmarks.test_cache(benchmark, seeded_checkpoint(SEEDED["tiny"]).build(), setup, cache=True)
    assert [len(tokens) for tokens in drawn] == [3]
    assert "ms_per_token" not in benchmark.extra_info
