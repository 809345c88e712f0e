"""The weights' layout against the reference's quantisers, and the bits of bfloat16."""

import numpy as np
import pytest

from tvm_frontend.kernels.cpu import reference
from tvm_frontend.kernels.cpu.formats import gemm_format
from tvm_frontend.kernels.cpu.packing import to_bf16
from tvm_frontend.kernels.cpu.register_tile import Tile
from tvm_frontend.target import resolve_target

TILE = Tile(mr=6, nr_vectors=2, lanes=4)  # of SSE


def weight(K, N):
    return np.random.default_rng([K, N]).normal(size=(K, N)).astype("float32")


def packed(precision, w):
    return gemm_format(precision, resolve_target(mcpu="x86-64")).pack(w, TILE)


def columns_of(panels):
    """[panels, rows, NR, pack factor] as [rows · pack factor, panels · NR]: what the drawing in `packing` says."""
    _, rows, NR, pack_factor = panels.shape
    return panels.transpose(1, 3, 0, 2).reshape(rows * pack_factor, len(panels) * NR)


def as_expected(found, expected):
    np.testing.assert_array_equal(found[: len(expected), : expected.shape[1]], expected)
    assert not found[len(expected) :].any()
    assert not found[:, expected.shape[1] :].any()


@pytest.mark.parametrize(("K", "N"), [(1, 1), (64, 16), (33, 21)])
def test_elements_lie_as_the_drawing_says(K, N):
    w = weight(K, N)
    as_expected(columns_of(packed("fp32", w)[..., None]), w)
    bf16 = packed("bf16", w).view(np.uint16).reshape(-(-N // 8), -1, 8, 2)
    as_expected(columns_of(bf16).astype(np.uint32) << 16, reference.to_bf16(w).view(np.uint32))
    int8 = packed("int8", w).view(np.int8).reshape(-(-N // 8), -1, 8, 4)
    as_expected(columns_of(int8), reference.quantize_columns(w)[0])


@pytest.mark.parametrize(("K", "N"), [(1, 1), (64, 16), (33, 21)])
def test_groups_of_int4_lie_as_the_drawing_says(K, N):
    w, NR = weight(K, N), TILE.nr
    panels = packed("int4", w)  # [panels, groups, 4 NR + NR/2]
    q, scales = reference.quantize_column_groups(w)  # [N, groups, 32], [N, groups, 1]
    assert panels.shape == (-(-N // NR), q.shape[1], 4 * NR + NR // 2)
    for n in range(N):
        panel, column = divmod(n, NR)
        for g in range(q.shape[1]):
            for k in range(32):
                element = int(panels.view(np.uint32)[panel, g, k // 8 * NR + column])
                assert element >> (k % 4 * 8 + k // 4 % 2 * 4) & 15 == q[n, g, k]
            pair = int(panels.view(np.uint32)[panel, g, 4 * NR + column % (NR // 2)])
            bits = pair >> 16 if column >= NR // 2 else pair & 0xFFFF
            assert np.uint32(bits << 16).view(np.float32) == scales[n, g, 0]


@pytest.mark.filterwarnings("error")
def test_a_nan_stays_one_in_bfloat16():
    bits = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FC00000], np.uint32)
    found = to_bf16(bits.view(np.float32)).view(np.uint16)
    assert [f"{value:04x}" for value in found] == ["7fc0", "ffc0", "7fc0", "ffc0", "7fc0"]


def test_bfloat16_is_rounded_to_nearest_ties_to_even():
    upper = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = upper | lower
    numbers = bits[~np.isnan(bits.view(np.float32))]
    expected = numbers + 0x7FFF + (numbers >> 16 & 1) >> 16
    np.testing.assert_array_equal(to_bf16(numbers.view(np.float32)).view(np.uint16), expected)
