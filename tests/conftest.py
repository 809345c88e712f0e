"""What all tests share: a test marked `relay` is skipped, with the reason, where Relay's environment is absent."""

import pytest

from tvm_frontend.relay.environment import why_absent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs Relay where it is absent; `-m relay` selects it, once the environment has been made."""
    reason = why_absent()
    for item in items:
        if reason is not None and item.get_closest_marker("relay"):
            item.add_marker(pytest.mark.skip(reason=reason))
