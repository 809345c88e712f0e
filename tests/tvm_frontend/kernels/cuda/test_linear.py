from collections.abc import Callable

import numpy as np
import pytest
import tvm

from bench.gpu.cases import Case, EmulatedExecutor, cases_of
from bench.gpu.emulator import EmulatedLauncher
from tvm_frontend.kernels import kernels_for
from tvm_frontend.kernels.cuda import CudaKernels
from tvm_frontend.kernels.cuda.linear import LARGE, SMALL
from tvm_frontend.target import resolve_target


@pytest.mark.parametrize("case", cases_of("linear::any_number_of_rows"), ids=str)
def test_any_number_of_rows(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", cases_of("linear::activations_in_the_epilogue"), ids=str)
def test_activations_in_the_epilogue(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", cases_of("linear::residual_and_odd_widths"), ids=str)
def test_residual_and_odd_widths(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", cases_of("linear::the_large_tile"), ids=str)
def test_the_large_tile(check: Callable[[Case], None], case: Case) -> None:
    check(case)


class TileTeller(EmulatedLauncher):
    """Its kernels do not compute: they write their tile's number of rows to the result."""

    def load(self, folder):
        tiles = {f"Tile<{tile.block_m}, {tile.block_n},": tile.block_m for tile in (LARGE, SMALL)}
        for symbol, body in self.entries.items():
            (size,) = (size for name, size in tiles.items() if name in body)
            self.entries[symbol] = body.partition("{")[0] + f"{{ *static_cast<float*>(a4) = {size}; return 0; }}"
        super().load(folder)


@pytest.mark.parametrize(("arch", "multiprocessors"), [("sm_80", 108), ("sm_86", 84), ("sm_90", 132)])
def test_the_large_tile_is_taken_when_it_fills_the_arch_that_is_compiled_for(tmp_path, arch, multiprocessors) -> None:
    kernels = kernels_for(resolve_target("cuda", arch=arch), "tf32")
    kernels.launcher, executor = TileTeller(), EmulatedExecutor(tmp_path)
    executor.launcher = kernels.launcher
    kernel = kernels.linear(4, LARGE.block_n, activation=None, residual=False)
    _, run = executor.build(kernel)
    for blocks, tile in ((multiprocessors - 1, SMALL), (multiprocessors, LARGE)):
        rows = blocks * LARGE.block_m
        arrays = (np.zeros(shape, np.float32) for shape in ((1, rows, 4), (LARGE.block_n, 4), (LARGE.block_n,)))
        out = tvm.runtime.empty((1, rows, LARGE.block_n), "float32")
        run(*map(tvm.runtime.tensor, arrays), out)
        assert out.numpy()[0, 0, 0] == tile.block_m


def test_rows_that_cannot_be_read_16_bytes_at_a_time_are_left_to_tvm() -> None:
    assert CudaKernels("bf16").linear(36, 64, activation=None, residual=False) is None
    assert CudaKernels("tf32").linear(36, 64, activation=None, residual=False) is not None
