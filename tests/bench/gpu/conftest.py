"""Fixtures of the tests of `bench.gpu`: the tiny seeded model's checkpoint, on a CPU in a GPU's place."""

from pathlib import Path

import pytest

from bench.gpu.device import DeviceArtifacts
from bench.models.build import prepare


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> DeviceArtifacts:
    """Make the checkpoint alone; tests that need an engine's files make them beside it."""
    found = DeviceArtifacts(Path(tmp_path_factory.mktemp("gpu"), "seeded-tiny"), "cpu", "llvm")
    prepare(found, [])
    return found
