"""Executors for the cases of `bench.gpu.cases`: the emulator of a GPU's threads and, where there is one, the GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.gpu.cases import ERROR, NO_GPU, PLACES, Case, EmulatedExecutor, Executor, GpuExecutor
from bench.gpu.emulator import EmulatedLauncher
from tvm_frontend.cuda_toolchain import gpu_arch


@pytest.fixture
def emulated() -> EmulatedLauncher:
    return EmulatedLauncher()


@pytest.fixture(params=PLACES.values())
def executor(request: pytest.FixtureRequest, tmp_path: Path) -> Executor:
    if request.param == PLACES["cpu"]:
        return EmulatedExecutor(tmp_path)
    if gpu_arch() is None:
        pytest.skip(NO_GPU)
    return GpuExecutor(tmp_path)


@pytest.fixture
def check(executor: Executor, record_property: Callable[[str, object], None]) -> Callable[[Case], None]:
    """Run a case, whose error must be within its tolerance; the largest, in tolerances, is recorded."""

    def check_case(case: Case) -> None:
        share = case.check(executor)
        if share is not None:
            record_property(ERROR, share)
            assert share <= 1

    return check_case


@pytest.hookimpl(tryfirst=True)  # before -m selects by the mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder slow: each compiles C++ for the emulator of a GPU."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.slow)
