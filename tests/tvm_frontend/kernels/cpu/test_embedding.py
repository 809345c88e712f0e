import numpy as np
import pytest

from tvm_frontend.kernels.cpu import reference
from tvm_frontend.kernels.cpu.embedding import embedding


@pytest.mark.parametrize("C", [1, 7, 20, 64])
def test_the_sum_of_both_rows_exactly(build, tile, C):
    V, block_size = 11, 40
    rng = np.random.default_rng(C)
    tokens, positions = (rng.normal(size=(rows, C)).astype("float32") for rows in (V, block_size))
    run = build(embedding(V, block_size, C, tile.lanes, behind=False))
    for B, T in [(1, 1), (3, 17), (2, block_size)]:
        ids = rng.integers(0, V, (B, T))
        np.testing.assert_array_equal(
            run(tokens, ids, positions, shape=(B, T, C)),
            reference.embedding(tokens, ids, positions),
            err_msg=f"{B} {T}",
        )


def test_positions_behind_those_of_each_sequence(build, tile):
    V, block_size, C = 11, 40, 20
    rng = np.random.default_rng(0)
    tokens, positions = (rng.normal(size=(rows, C)).astype("float32") for rows in (V, block_size))
    run = build(embedding(V, block_size, C, tile.lanes, behind=True))
    for pos, T in [([0], 1), ([3, 0, 23], 17), ([39, 7], 1)]:
        ids = rng.integers(0, V, (len(pos), T))
        expected = reference.embedding(tokens, ids, positions, np.array(pos))
        np.testing.assert_array_equal(run(tokens, ids, positions, np.array(pos), shape=expected.shape), expected)
