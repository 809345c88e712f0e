"""What all tests share: those marked `relay` are skipped where that is absent, and `long` ones run if asked for."""

import pytest

from tvm_frontend.relay.environment import why_absent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs Relay where it is absent, and leave out what is long; `-m` with the marker's name selects it."""
    if "long" not in config.option.markexpr:
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    reason = why_absent()
    for item in items:
        if reason is not None and item.get_closest_marker("relay"):
            item.add_marker(pytest.mark.skip(reason=reason))
