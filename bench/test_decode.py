"""pytest bench/test_decode.py --benchmark-only

Times one decode step over a KV cache for each engine that has one, at each context.
"""

from collections.abc import Callable

import pytest

from bench.conftest import CLOCK

PHASE = "decode"


@pytest.mark.benchmark(timer=CLOCK)
def test_decode(race: Callable[[], None]) -> None:
    """Decode steps must match the logits of the full forward pass at their positions; then one of them is timed."""
    race()
