import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_frontend.passes.fuse_embedding import fuse_embedding

B, T = tvm.tirx.Var("B", "int64"), tvm.tirx.Var("T", "int64")
V, BLOCK_SIZE, C = 11, 9, 20
IDS = {"ids": ((B, T), "int64")}
TABLES = {
    "tokens": np.random.default_rng(0).normal(size=(V, C)).astype("float32"),
    "positions": np.random.default_rng(1).normal(size=(BLOCK_SIZE, C)).astype("float32"),
}


def embedding(start=0, stop=T, step=1, positions_first=False):
    def body(emit, ids, tokens, positions):
        places = emit(op.arange(*(relax.prim_value(value) for value in (start, stop, step)), dtype="int64"))
        rows = [emit(op.take(tokens, ids, axis=0)), emit(op.take(positions, places, axis=0))]
        return op.add(*(rows[::-1] if positions_first else rows))

    return body


@pytest.mark.parametrize("positions_first", [False, True])
def test_it_becomes_one_kernel_of_the_same_meaning(graph_of, calls, kernels, rewritten, positions_first):
    before = graph_of(embedding(positions_first=positions_first), IDS, TABLES)
    assert calls(before) == {"relax.arange": 1, "relax.take": 2, "relax.add": 1}
    after = fuse_embedding(before, kernels)
    assert calls(after) == {"embedding": 1}
    rewritten(before, after, [np.random.default_rng(2).integers(0, V, (3, 7))])


def embedding_behind(axis=1, pos_first=True):
    """Positions counted from pos [B] on."""

    def body(emit, ids, pos, tokens, positions):
        counted = emit(op.arange(relax.prim_value(0), relax.prim_value(T), relax.prim_value(1), dtype="int64"))
        terms = [emit(op.expand_dims(pos, axis)), counted]
        places = emit(op.add(*(terms if pos_first else terms[::-1])))
        return op.add(emit(op.take(tokens, ids, axis=0)), emit(op.take(positions, places, axis=0)))

    return body


POS = {"pos": ((B,), "int64")}


@pytest.mark.parametrize("pos_first", [False, True])
def test_positions_behind_a_cache_are_in_the_kernel(graph_of, calls, kernels, rewritten, pos_first):
    before = graph_of(embedding_behind(pos_first=pos_first), IDS | POS, TABLES)
    after = fuse_embedding(before, kernels)
    assert calls(after) == {"embedding": 1}
    rewritten(before, after, [np.random.default_rng(2).integers(0, V, (3, 4)), np.array([0, 5, 2])])


def computed_ids(emit, ids, tokens, positions):
    """Ids that no session checks, as they are twice what is given."""
    return embedding()(emit, emit(op.add(ids, ids)), tokens, positions)


LEFT_ALONE = {
    "ids that are computed": (computed_ids, IDS, TABLES),
    "positions along the batch": (embedding_behind(axis=0), {"ids": ((T, T), "int64"), "pos": ((T,), "int64")}, TABLES),
    "positions that begin later": (embedding(start=1, stop=T + 1), IDS, TABLES),
    "every other position": (embedding(stop=2 * T, step=2), IDS, TABLES),
    "one position for all": (embedding(stop=1), IDS, TABLES),
    "one token for all positions": (embedding(), {"ids": ((T, 1), "int64")}, TABLES),
    "a table that is computed": (
        embedding(),
        IDS | {"tokens": ((V, C), "float32")},
        {"positions": TABLES["positions"]},
    ),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_other_sums_of_rows_stay(graph_of, calls, kernels, case):
    before = graph_of(*LEFT_ALONE[case])
    assert calls(fuse_embedding(before, kernels)) == calls(before)
