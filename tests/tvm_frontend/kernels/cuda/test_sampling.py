import numpy as np
import pytest
import tvm

from tvm_frontend.kernels.cuda import CudaKernels
from tvm_frontend.passes.rewrite import with_root

LENGTH = 9


@pytest.fixture
def choose(launcher, build):
    """Compile for V; then choose from logits [B, V] behind pos: ids [B, 1], pos and text as they then are."""

    def compile_for(V):
        device, function = build(with_root(CudaKernels("bf16", launcher).choose(V)))

        def run(logits, pos, top_k=1, temperature=1.0, seed=0):
            B = len(logits)
            given = logits[:, None].astype(np.float32), np.array([top_k, temperature, seed], np.float64)
            written = np.full((B, 1), -1), pos.copy(), np.full((B, LENGTH), -1)
            tensors = [tvm.runtime.tensor(array, device) for array in (*given, *written)]
            function(*tensors)
            return [tensor.numpy() for tensor in tensors[2:]]

        return run

    return compile_for


@pytest.mark.parametrize("V", [1, 65, 511, 2000])
@pytest.mark.parametrize("B", [1, 3])
def test_the_likeliest_is_written_where_it_belongs(choose, V, B):
    rng = np.random.default_rng()
    logits = rng.normal(size=(B, V)) * 10
    pos = rng.integers(0, LENGTH - 1, B)
    ids, after, text = choose(V)(logits, pos)
    np.testing.assert_array_equal(ids[:, 0], logits.astype(np.float32).argmax(-1))
    np.testing.assert_array_equal(after, pos + 1)
    expected = np.full((B, LENGTH), -1)
    expected[np.arange(B), pos + 1] = ids[:, 0]
    np.testing.assert_array_equal(text, expected)


def test_of_equal_logits_the_first_is_taken(choose):
    logits = np.zeros((2, 700))
    logits[0, [13, 600]] = 1
    ids, _, _ = choose(700)(logits, np.zeros(2, np.int64))
    assert ids[:, 0].tolist() == [13, 0]


def test_behind_the_last_place_nothing_is_written(choose):
    _, after, text = choose(65)(np.zeros((1, 65)), np.array([LENGTH - 1]))
    assert after.tolist() == [LENGTH]
    assert (text == -1).all()


@pytest.mark.parametrize("top_k", [2, 5, 40])
def test_draws_follow_the_softmax_of_the_likeliest(choose, top_k):
    """Of 4,000 sequences with the same logits, negative ones among them: within 5 standard deviations each."""
    V, B, temperature = 40, 4000, 1.7
    logits = np.random.default_rng().normal(size=V).astype(np.float32) * 3
    ids, _, _ = choose(V)(np.tile(logits, (B, 1)), np.zeros(B, np.int64), top_k, temperature, seed=5)
    kept = np.sort(logits)[-top_k:].astype(np.float64)
    chances = np.where(logits >= kept[0], np.exp((logits.astype(np.float64) - kept[-1]) / temperature), 0)
    chances /= chances.sum()
    found = np.bincount(ids[:, 0], minlength=V) / B
    assert (found[chances == 0] == 0).all()
    assert (np.abs(found - chances) <= 5 * np.sqrt(chances * (1 - chances) / B) + 1 / B).all()


def test_draws_differ_by_seed_place_and_sequence(choose):
    draw = choose(211)
    logits = np.zeros((30, 211))
    first, *_ = draw(logits, np.zeros(30, np.int64), 211, 1.0, 1)
    again, *_ = draw(logits, np.zeros(30, np.int64), 211, 1.0, 1)
    np.testing.assert_array_equal(first, again)
    other_seed, *_ = draw(logits, np.zeros(30, np.int64), 211, 1.0, 2)
    other_place, *_ = draw(logits, np.ones(30, np.int64), 211, 1.0, 1)
    assert len({tuple(each[:, 0]) for each in (first, other_seed, other_place)}) == 3
    assert len(set(first[:, 0])) > 20


def test_at_temperature_0_the_likeliest_is_taken(choose):
    logits = np.random.default_rng().normal(size=(4, 65))
    ids, _, _ = choose(65)(logits, np.zeros(4, np.int64), 65, 0.0)
    np.testing.assert_array_equal(ids[:, 0], logits.astype(np.float32).argmax(-1))
