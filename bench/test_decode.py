"""pytest bench/test_decode.py --benchmark-only

Benchmark one token over a KV cache, for each engine that has one and each context.
"""

from collections.abc import Callable

import pytest

from bench.conftest import CLOCK

PHASE = "decode"


@pytest.mark.benchmark(timer=CLOCK)
def test_decode(race: Callable[[], None]) -> None:
    """Compare the logits of steps after a prompt with the reference's at their positions; then time one of them."""
    race()
