import pytest

from tvm_frontend.kernels.cpu.register_tile import Tile, divisor, tile_for
from tvm_frontend.target import resolve_target


@pytest.mark.parametrize(
    ("mcpu", "expected"),
    [("skylake-avx512", Tile(8, 2, 16)), ("haswell", Tile(6, 2, 8)), ("x86-64", Tile(6, 2, 4))],
)
def test_the_tile_fits_the_registers(mcpu, expected):
    tile = tile_for(resolve_target(mcpu=mcpu))
    assert tile == expected
    assert tile.rows * tile.vectors + tile.vectors + 1 <= (32 if tile.lanes == 16 else 16)


def test_the_divisor_is_the_largest_power_of_two_that_fits():
    assert [divisor(96, 16), divisor(20, 8), divisor(7, 16), divisor(64, 6), divisor(1, 8)] == [16, 4, 1, 4, 1]
