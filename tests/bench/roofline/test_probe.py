"""The probes run and are not absurd."""

from collections.abc import Iterator

import pytest

from bench.harness.worker import Worker
from bench.roofline.probe import FACTORY


@pytest.fixture(scope="module")
def probe() -> Iterator[Worker]:
    with Worker(FACTORY, threads=1) as worker:
        worker.call("load", 1)
        yield worker


def test_the_peak_is_that_of_a_vector_unit(probe: Worker) -> None:
    """Scalar code would stay below 10 GFLOP/s; no core does more than 2 FMA of 16 lanes at 6 GHz (384 GFLOP/s)."""
    assert 5e9 < probe.call("peak_flops_per_s") < 4e11


def test_narrow_products_are_no_slower(probe: Worker) -> None:
    """Of a word of two or four products at most two or four times float32's, and a vector unit's at that."""
    wide = probe.call("peak_flops_per_s", "fp32")
    for precision, words in (("bf16", 2), ("int8", 4), ("int4", 4)):
        assert 0.7 * wide < probe.call("peak_flops_per_s", precision) < 4e11 * words


def test_a_small_working_set_is_really_read(probe: Worker) -> None:
    """Passes that the compiler had left out would show as more than two 64-byte loads a cycle at 6 GHz."""
    assert 1e9 < probe.call("read_bytes_per_s", 100_000) < 2 * 64 * 6e9


def test_asked_again_it_measures_the_same(probe: Worker) -> None:
    """By the kernel that was the fastest, from the memory that it has, whatever else was read from it."""
    for method, what in (("peak_flops_per_s", "int8"), ("read_bytes_per_s", 100_000)):
        first = probe.call(method, what)
        probe.call("read_bytes_per_s", 1_000_000)
        assert first / 3 < probe.call(method, what) < first * 3
