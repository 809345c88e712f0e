"""pytest bench/test_prefill.py --benchmark-only

Prefill of each engine at each shape. The check stands before the timing in the same test: --benchmark-only skips
tests that time nothing.
"""

from collections.abc import Callable

import pytest

from bench.conftest import CLOCK

PHASE = "prefill"


@pytest.mark.benchmark(timer=CLOCK)
def test_prefill(race: Callable[[], None]) -> None:
    """An engine gives the reference's logits at this shape and at odd ones; then its calls are timed."""
    race()
