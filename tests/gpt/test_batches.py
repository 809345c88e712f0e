from itertools import pairwise

import numpy as np
import pytest
import torch

from gpt.batches import Batches, Tokens
from gpt.cli import UserError

HUNDRED = Tokens([np.arange(100, dtype=np.uint16)])


def drawn(batches):
    """The inputs of a whole batch of a rank."""
    return torch.cat([inputs for inputs, _ in batches.draw()])


@pytest.mark.parametrize("cuts", [[], [50], [1, 2, 99], [33, 33, 34]])
def test_tokens_in_several_arrays_read_as_one(cuts):
    whole = np.arange(100, dtype=np.uint16)
    tokens = Tokens(np.split(whole, cuts))
    assert len(tokens) == 100
    for start, count in [(0, 100), (31, 5), (99, 1), (0, 1), (100, 0)]:
        found = tokens.read(start, count)
        assert found.dtype == np.int64
        assert np.array_equal(found, whole[start : start + count])


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (99, 2), (101, 0), (5, -1)])
def test_tokens_that_are_not_there_are_an_error(start, count):
    with pytest.raises(IndexError):
        HUNDRED.read(start, count)


def test_targets_are_the_inputs_one_later():
    ((inputs, targets),) = Batches(HUNDRED, block_size=8, batch_size=4).draw()
    assert inputs.shape == targets.shape == (4, 8)
    assert inputs.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)


def test_random_batches_reach_both_ends():
    ((inputs, targets),) = Batches(Tokens([np.arange(6)]), block_size=4, batch_size=64).draw()
    assert int(inputs.min()) == 0
    assert int(targets.max()) == 5


def test_random_batches_depend_on_seed_and_position_alone():
    first, again, other = (Batches(HUNDRED, 8, 4, seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(0)
    batches = [drawn(first), drawn(first)]
    torch.manual_seed(7)
    assert torch.equal(batches[0], drawn(again))
    assert torch.equal(batches[1], drawn(again))
    assert not torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], drawn(other))


def test_sequential_batches_walk_and_wrap_around():
    walk = Batches(Tokens([np.arange(13)]), block_size=4, batch_size=2, order="sequential")
    assert drawn(walk).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert drawn(walk).tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]


def test_one_batch_is_always_the_same():
    one = Batches(HUNDRED, 8, 4, order="one")
    assert torch.equal(drawn(one), drawn(one))
    assert torch.equal(drawn(one), drawn(Batches(HUNDRED, 8, 4, order="random")))


@pytest.mark.parametrize("order", ["random", "sequential"])
def test_a_position_is_all_it_takes_to_go_on(order):
    first = Batches(HUNDRED, 8, 6, order=order)
    for _ in range(5):
        drawn(first)
    second = Batches(HUNDRED, 8, 6, order=order, position=first.position)
    assert torch.equal(drawn(first), drawn(second))


@pytest.mark.parametrize("order", ["random", "sequential"])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_out_the_batch_that_one_would_draw(order, world):
    alone = Batches(HUNDRED, 3, 8, order=order)
    ranks = [Batches(HUNDRED, 3, 8, order=order, rank=rank, world=world) for rank in range(world)]
    for _ in range(3):
        assert torch.equal(torch.cat([drawn(rank) for rank in ranks]), drawn(alone))


def test_the_walk_gives_no_block_to_two_ranks():
    ranks = [Batches(HUNDRED, 3, 8, order="sequential", rank=rank, world=4) for rank in range(4)]
    blocks = [int(row[0]) for _ in range(4) for rank in ranks for row in drawn(rank)]  # 32 of the 33 blocks
    assert len(set(blocks)) == 32


def test_micro_batches_are_the_batch_in_pieces():
    whole, pieces = Batches(HUNDRED, 8, 6), Batches(HUNDRED, 8, 6, micro_batch_size=2)
    found = [inputs for inputs, _ in pieces.draw()]
    assert [len(inputs) for inputs in found] == [2, 2, 2]
    assert pieces.micro_steps == 3
    assert torch.equal(torch.cat(found), drawn(whole))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 5, "world": 2}, "batch_size=5: must be a multiple of the 2 ranks"),
        ({"batch_size": 8, "world": 2, "micro_batch_size": 3}, "micro_batch_size=3: must divide .* which is 4"),
        ({"block_size": 100}, "100 tokens: must be more than block_size=100"),
        ({"order": "shuffled"}, "order='shuffled': must be one of random, sequential, one"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        Batches(HUNDRED, **{"block_size": 8, "batch_size": 4} | settings)


def test_positions_differ_by_whole_batches():
    batches = Batches(HUNDRED, 8, 6)
    positions = [batches.position for _ in range(4) if [*batches.draw()]]
    assert [later - earlier for earlier, later in pairwise(positions)] == [6, 6, 6]
