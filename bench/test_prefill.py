"""pytest bench/test_prefill.py --benchmark-only

Times the prefill of each engine at each shape. Each test checks the logits before it times, because --benchmark-only
skips tests that time nothing.
"""

from collections.abc import Callable

import pytest

from bench.conftest import CLOCK

PHASE = "prefill"


@pytest.mark.benchmark(timer=CLOCK)
def test_prefill(race: Callable[[], None]) -> None:
    """An engine must match the reference's logits at this shape and at odd shapes; then its calls are timed."""
    race()
