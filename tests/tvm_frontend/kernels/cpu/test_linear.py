import re
from dataclasses import replace

import numpy as np
import pytest

from tvm_frontend.kernels.cpu import reference
from tvm_frontend.kernels.cpu.formats import gemm_format
from tvm_frontend.kernels.cpu.linear import L2_BLOCK_BYTES, MC, linear
from tvm_frontend.kernels.cpu.quantize_rows import quantize_rows
from tvm_frontend.kernels.cpu.register_tile import Tile

ROUNDING = 2.0**-24  # of a float32, relative


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype("float32")


@pytest.fixture(scope="session")
def fp32(target):
    return gemm_format("fp32", target)


def check(build, tile, fp32, shapes, K, N, activation, residual):
    """One kernel on several [B, T] against float64, within the bound of a sum of K products in any order."""
    w, bias = normal(K, N), normal(N)
    run = build(linear(K, N, tile, fp32, activation=activation, residual=residual))
    for B, T in shapes:
        x, addend = normal(B, T, K), normal(B, T, N, seed=1)
        found = run(
            x, fp32.pack(w, tile), fp32.epilogue_params(w, bias), *([addend] if residual else []), shape=(B, T, N)
        )
        x64, w64 = x.astype("float64"), w.astype("float64")
        expected = reference.linear(x, w, bias, activation=activation, residual=addend if residual else None)
        # Higham, Accuracy and Stability, section 3.1; GELU's slope is at most 1.13, its own error 2e-7 · max(1, |x|).
        sizes = np.abs(x64) @ np.abs(w64) + np.abs(bias)
        bound = 1.13 * (K + 2) * ROUNDING * sizes + 2e-7 * np.maximum(1, sizes) + ROUNDING * np.abs(expected)
        assert (np.abs(found - expected) <= bound).all(), (B, T, np.abs(found - expected).max())


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "residual"), [("gelu_tanh", False), ("gelu", True), ("relu", False)])
def test_every_epilogue(build, tile, fp32, activation, residual):
    check(build, tile, fp32, [(1, 1), (3, 17)], 20, 37, activation, residual)


@pytest.mark.slow
@pytest.mark.parametrize(("K", "N"), [(1, 1), (7, 5), (64, 96), (33, 65), (130, 31), (264, 31), (1283, 33)])
def test_any_width(build, tile, fp32, K, N):
    check(build, tile, fp32, [(1, 1), (3, 17)], K, N, None, True)


def test_any_number_of_rows_about_the_edges_of_a_task(build, tile, fp32):
    # A task takes up to 64 rows in tiles of 8 or 6.
    rows = [1, 2, 3, 4, 5, 6, 7, 8, 9, 59, 60, 61, 63, 64, 65, 119, 120, 121, 127, 128, 129, 200]
    check(build, tile, fp32, [(1, T) for T in rows] + [(3, 43), (4, 64)], 9, 2 * tile.nr + 3, None, False)


def test_rows_that_are_more_than_a_block(build, tile, fp32):
    K = L2_BLOCK_BYTES // (4 * 2 * MC)  # of which a block has two tasks
    check(build, tile, fp32, [(1, T) for T in (119, 128, 129, 300)], K, 2 * tile.nr + 3, None, True)


@pytest.mark.parametrize("T", [1, 17])
def test_long_sums_are_as_close_as_a_librarys(build, tile, fp32, T):
    K, N = 4100, 2 * tile.nr
    x, w = normal(1, T, K), normal(K, N)
    run = build(linear(K, N, tile, fp32, activation=None, residual=False))
    found = run(x, fp32.pack(w, tile), fp32.epilogue_params(w, np.zeros(N, "float32")), shape=(1, T, N))
    exact = x.astype("float64") @ w.astype("float64")
    ours, theirs = (np.sqrt(np.mean((each - exact) ** 2)) for each in (found, x @ w))
    assert ours < 2 * theirs


def test_packing_keeps_each_value_and_fills_up_with_zeros(fp32):
    weight = np.arange(1, 16, dtype="float32").reshape(3, 5)  # [K, N]
    packed = fp32.pack(weight, Tile(mr=6, nr_vectors=2, lanes=2))
    assert packed.shape == (2, 3, 4)
    assert packed.flags.c_contiguous
    np.testing.assert_array_equal(np.hstack(list(packed)), np.hstack([weight, np.zeros((3, 3))]))


def test_fp32_has_nothing_to_convert(fp32):
    with pytest.raises(ValueError, match="format fp32: stores rows as they are"):
        quantize_rows(16, fp32)


def test_a_nan_in_a_row_stays_in_that_row(build, tile, fp32):
    run = build(linear(8, 24, tile, fp32, activation="gelu_tanh", residual=False))
    x, w = normal(1, 20, 8), normal(8, 24)
    x[0, 19, 3] = np.nan
    found = run(x, fp32.pack(w, tile), fp32.epilogue_params(w, normal(24)), shape=(1, 20, 24))
    assert np.isnan(found[0, 19]).all()
    assert np.isfinite(found[0, :19]).all()


def inner_loops(assembly):
    """The blocks that end with a jump to their own beginning."""
    return [loop[0] for loop in re.finditer(r"^(\.LBB\w+):\n(?:(?!\.LBB).*\n)*?\s+j\w+\s+\1$", assembly, re.MULTILINE)]


@pytest.mark.parametrize("K", [64, 768])
def test_the_next_panel_is_fetched_and_sums_stay_in_registers(library_of, target, tile, K):
    """A fetch that the compiler takes for a write to memory would have them stored in each turn of the loop."""
    if tile.lanes == 4:
        pytest.skip("without a fused multiply-add, 16 registers do not hold the tile")
    kernel = linear(K, 4 * tile.nr, tile, gemm_format("fp32", target), activation=None, residual=False)
    assembly = library_of(kernel).mod.inspect_source("asm")
    loops = [loop for loop in inner_loops(assembly) if "prefetcht1" in loop]
    assert loops
    for loop in loops:
        stores = [line for line in loop.splitlines() if re.search(r"v?mov[au]ps\s+%[xyz]mm\d+, ", line)]
        assert not stores


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_a_task_asks_for_no_memory(library_of, tile, fp32, activation):
    """Each time would take as long as the products of a row of x with some hundred weights of each column."""
    small = replace(tile, mr=4)  # a tile of 1 KB is more than TVM puts on the stack
    kernel = linear(768, 4 * tile.nr, small, fp32, activation=activation, residual=True)
    assert "AllocWorkspace" not in library_of(kernel).mod.inspect_source("asm")
