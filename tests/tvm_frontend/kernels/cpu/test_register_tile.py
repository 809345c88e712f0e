import pytest

from tvm_frontend.kernels.cpu.register_tile import Tile, pow2_divisor, tile_for
from tvm_frontend.target import resolve_target


@pytest.mark.parametrize(
    ("mcpu", "expected"),
    [("skylake-avx512", Tile(8, 2, 16)), ("haswell", Tile(6, 2, 8)), ("x86-64", Tile(6, 2, 4))],
)
def test_the_tile_fits_the_registers(mcpu, expected):
    tile = tile_for(resolve_target(mcpu=mcpu))
    assert tile == expected
    assert tile.mr * tile.nr_vectors + tile.nr_vectors + 1 <= (32 if tile.lanes == 16 else 16)


def test_the_divisor_is_the_largest_power_of_two_that_fits():
    cases = [(96, 16), (20, 8), (7, 16), (64, 6), (1, 8)]
    assert [pow2_divisor(*case) for case in cases] == [16, 4, 1, 4, 1]
