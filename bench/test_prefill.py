"""pytest bench/test_prefill.py --benchmark-only

Benchmark the prefill of each engine at each shape. The check is in the same test as the timing, as --benchmark-only
skips tests that time nothing.
"""

from collections.abc import Callable

import pytest

from bench.conftest import CLOCK

PHASE = "prefill"


@pytest.mark.benchmark(timer=CLOCK)
def test_prefill(race: Callable[[], None]) -> None:
    """Compare an engine's logits with the reference's at this shape and at odd ones; then time its calls."""
    race()
