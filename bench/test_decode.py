"""pytest bench/test_decode.py --benchmark-only

One token behind a KV cache, by each engine that has one, at each context.
"""

from collections.abc import Callable

import pytest

from bench.conftest import CLOCK

PHASE = "decode"


@pytest.mark.benchmark(timer=CLOCK)
def test_decode(race: Callable[[], None]) -> None:
    """Steps behind a prompt give the plain forward's logits at their positions; then one of them is timed."""
    race()
