import itertools
from threading import Thread

import numpy as np
import pytest

from gpt.cli import UserError
from gpt.config import GPTConfig
from tvm_frontend.compile import compile_model
from tvm_frontend.options import CompileOptions
from tvm_frontend.runtime import open_session

pytestmark = pytest.mark.slow  # its fixtures compile a model three times

TOLERANCE = 2e-5  # as in test_artifact
CONFIG = GPTConfig(block_size=70, vocab_size=211, n_layer=2, n_head=2, n_embd=40)
OTHERS = {
    "no bias, relu, a head of 7": GPTConfig(
        block_size=13, vocab_size=37, n_layer=1, n_head=3, n_embd=21, bias=False, activation="relu"
    ),
    "block_size 1": GPTConfig(block_size=1, vocab_size=5, n_layer=1, n_head=1, n_embd=8),
}


@pytest.fixture(scope="module")
def model(export):
    return export(CONFIG, "cached")


@pytest.fixture(scope="module", params=[3, 0])
def cached(model, request):
    return open_session(compile_model(model[1].path, options=CompileOptions(opt_level=request.param)), threads=2)


def ids_of(B, T, config=CONFIG):
    return np.random.default_rng([B, T]).integers(0, config.vocab_size, (B, T))


def close(found, expected):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_logits_that_nobody_holds_leave_their_memory_to_the_next(session):
    ids = ids_of(3, 17, session.model.config)
    assert len({session.prefill(ids).ctypes.data for _ in range(3)}) == 1


def test_logits_that_somebody_holds_stay(session):
    ids = ids_of(3, 17, session.model.config)
    held = session.prefill(ids)
    copy = held.copy()
    assert (session.prefill(ids[:, ::-1]) != copy).any()
    np.testing.assert_array_equal(held, copy)


@pytest.mark.parametrize("B", [1, 3])
def test_chunks_give_what_the_whole_gives(cached, model, eager, B):
    ids, at = ids_of(B, 70), 0
    expected = eager(model[0], ids)
    cached.begin(B)
    for T in (20, 1, 1, 7, 1, 33, 2, 5):
        close(cached.step(ids[:, at : at + T], np.full(B, at)), expected[:, at : at + T])
        at += T
    assert at == 70


def test_sequences_of_different_length_in_a_batch(cached, model, eager):
    ids, lengths = ids_of(3, 30), np.array([5, 11, 1])
    expected = eager(model[0], ids)
    cached.begin(3)
    logits = cached.step(ids[:, :11], np.zeros(3, int))  # the shorter prompts padded by what comes later
    rows = np.arange(3)
    close(logits[rows, lengths - 1], expected[rows, lengths - 1])
    for _ in range(5):
        close(cached.step(ids[rows, lengths][:, None], lengths)[:, 0], expected[rows, lengths])
        lengths = lengths + 1


def test_fill_and_decode(cached, model, eager):
    ids = ids_of(2, 20)
    expected = eager(model[0], ids)
    close(cached.fill(ids[:, :17]), expected[:, 16])
    for _ in range(2):  # the same context again is the same step again
        close(cached.decode(ids[:, 17:18], 17), expected[:, 17])
    close(cached.decode(ids[:, 18:19], 18), expected[:, 18])
    close(cached.fill(ids[:1, :1]), expected[:1, 0])


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("T", [1, 17, 70])
def test_the_last_rows_alone_are_those_of_all(session, checkpoint, eager, B, T):
    ids, rows = ids_of(B, T), np.arange(B)
    expected = eager(checkpoint, ids)
    close(session.last(ids), expected[:, -1])
    lengths = np.array([T, 1, (T + 1) // 2])[:B]
    close(session.last(ids, lengths), expected[rows, lengths - 1])
    np.testing.assert_allclose(session.last(ids), session.prefill(ids)[:, -1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("T", [1, 17])
def test_prompts_of_different_length_are_filled_and_continued(cached, model, eager, T):
    ids, lengths, rows = ids_of(3, 20), np.array([T, 1, (T + 1) // 2]), np.arange(3)
    expected = eager(model[0], ids)
    close(cached.fill(ids[:, :T], lengths), expected[rows, lengths - 1])
    for _ in range(3):
        close(cached.decode(ids[rows, lengths][:, None], lengths), expected[rows, lengths])
        lengths = lengths + 1


def test_the_artifact_says_which_functions_it_has(cached, session):
    split = ["body", "forward", "head"]
    assert session.model.entry_points == split
    assert cached.model.entry_points == (split if cached.model.opt_level == 3 else ["forward"])


@pytest.mark.parametrize("lengths", [[1], [0, 3], [1, 10], [1.0, 2.0], 3])
def test_lengths_that_are_none_are_refused(cached, session, lengths):
    for call in (cached.fill, session.last):
        with pytest.raises(UserError, match=r"lengths=.*: must be 2 whole numbers from 1 to 9"):
            call(ids_of(2, 9), lengths)


@pytest.mark.parametrize("name", OTHERS)
def test_other_models(export, eager, name):
    config = OTHERS[name]
    checkpoint, exported = export(config, "cached")
    session = open_session(compile_model(exported.path), threads=2)
    ids = ids_of(2, config.block_size, config)
    expected = eager(checkpoint, ids)
    session.begin(2)
    for at in range(config.block_size):
        close(session.step(ids[:, at : at + 1], np.array([at, at]))[:, 0], expected[:, at])


def test_the_artifact_says_that_it_has_a_cache(model):
    compiled = compile_model(model[1].path)
    assert compiled.form == "cached"
    assert compiled.path.name == "tvm-llvm-O3-cache"


@pytest.mark.parametrize(
    ("ids", "pos", "said"),
    [
        (np.zeros((2, 1), int), [70, 0], "after 70 in the cache: must be .B, T. with T from 1 to 0"),
        (np.zeros((2, 8), int), [0, 63], r"\[2, 8\] after 63 in the cache: .* 1 to 7"),
        (np.zeros((2, 1), int), [-1, 0], "at least 0"),
        (np.zeros((2, 1), int), [0.0, 1.0], "whole numbers"),
        (np.zeros((3, 1), int), [0, 0, 0], "the cache is of B=2 sequences"),
        (np.zeros((2, 1), int), [0], "the cache is of B=2 sequences"),
        (np.full((2, 1), 211), [0, 0], "token id 211"),
        (np.zeros((2, 1), "float32"), [0, 0], "whole numbers"),
        (np.zeros(2, int), [0, 0], r"\[2\]: must be"),
    ],
)
def test_what_does_not_fit_the_cache_is_refused_before_anything_runs(cached, ids, pos, said):
    cached.fill(ids_of(2, 9))
    before = cached.decode(ids_of(2, 1), 9).copy()
    with pytest.raises(UserError, match=said):
        cached.step(ids, np.array(pos))
    np.testing.assert_array_equal(cached.decode(ids_of(2, 1), 9), before)


def test_a_cache_comes_first(model):
    session = open_session(compile_model(model[1].path), threads=2)
    with pytest.raises(UserError, match="no cache yet"):
        session.step(ids_of(1, 1), np.zeros(1, int))
    with pytest.raises(UserError, match="B=0"):
        session.begin(0)
    session.begin(1)
    with pytest.raises(UserError, match="context=-1"):
        session.decode(ids_of(1, 1), -1)
    with pytest.raises(UserError, match="the cache is of B=1 sequences"):
        session.decode(ids_of(2, 1), 0)


@pytest.mark.parametrize(("filled", "context"), [(None, 1), (None, 5), (9, 10), (9, np.array([9, 10]))])
def test_tokens_that_the_cache_does_not_hold_are_refused(cached, filled, context):
    cached.begin(2)
    if filled is not None:
        cached.fill(ids_of(2, filled))
    with pytest.raises(UserError, match=r"tokens before the new ones: the cache holds \[\d, \d\] of each sequence"):
        cached.decode(ids_of(2, 1), context)


def test_the_cache_holds_what_was_last_put_there(cached):
    """Going back crops it: what lies behind is of another text. Padding is no text either."""
    cached.fill(ids_of(2, 20))
    cached.step(ids_of(2, 3), np.array([7, 20]))
    cached.decode(ids_of(2, 1), np.array([10, 23]))
    for pos, holds in (([12, 24], "[11, 24]"), ([11, 25], "[11, 24]")):
        with pytest.raises(UserError) as caught:
            cached.step(ids_of(2, 1), np.array(pos))
        assert f"the cache holds {holds} of each sequence" in str(caught.value)
    cached.fill(ids_of(2, 9), [4, 9])
    with pytest.raises(UserError, match=r"the cache holds \[4, 9\]"):
        cached.decode(ids_of(2, 1), 9)
    cached.decode(ids_of(2, 1), 4)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda session: session.decode(ids_of(2, 3), 9), r"ids of shape \[2, 3\]: must be \[B, 1\]"),
        (lambda session: session.decode(ids_of(3, 1), 9), "the cache is of B=2 sequences"),
        (lambda session: session.decode(ids_of(2, 1), 2.5), "pos of shape"),
        (lambda session: session.decode(ids_of(2, 1), True), "pos of shape"),
        (lambda session: session.decode([[1], [1, 2]], 9), "ids: lists of different lengths are no array"),
        (lambda session: session.step(ids_of(2, 1), [[1], [1, 2]]), "pos: lists of different lengths"),
        (lambda session: session.fill(ids_of(2, 9), [[1], [1, 2]]), "lengths: lists of different lengths"),
        (lambda session: session.fill(ids_of(2, 71)), r"\[2, 71\]: must be \[B, T\] with T from 1 to 70"),
        (lambda session: session.begin(2.5), "B=2.5: must be a whole number"),
        (lambda session: session.begin(True), "B=True: must be a whole number"),
    ],
)
def test_arguments_of_another_kind_are_refused(cached, call, said):
    cached.fill(ids_of(2, 9))
    with pytest.raises(UserError, match=said) as caught:
        call(cached)
    assert "\n" not in str(caught.value)


def side_by_side(work, times):
    """Call work(i) so many times in each of four threads, and give all that they returned, by i."""
    found = [[] for _ in range(4)]

    def repeat(i):
        found[i] += [work(i) for _ in range(times)]

    threads = [Thread(target=repeat, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_threads_may_share_a_session_or_take_a_clone_each(session):
    """500 calls in each of four threads."""
    prompts = [ids_of(1 + i % 3, 5 + i, session.model.config) for i in range(4)]
    expected = [session.prefill(ids).copy() for ids in prompts]
    clones = [session.clone() for _ in range(4)]
    for sessions in ([session] * 4, clones):
        found = side_by_side(lambda i, sessions=sessions: (sessions[i].prefill(prompts[i]) == expected[i]).all(), 500)
        assert [len(each) for each in found] == [500] * 4
        assert all(itertools.chain.from_iterable(found))
    assert len({id(clone._weights) for clone in clones}) == 1


def test_each_clone_has_a_cache_of_its_own(cached):
    """The steps of one session may come from several threads; side by side, each text needs a cache."""
    prompts = [ids_of(1 + i % 3, 5 + i) for i in range(4)]

    def continued(session, ids):
        logits = [session.fill(ids)]
        return np.stack(logits + [session.decode(ids[:, :1], ids.shape[1] + i) for i in range(3)])

    expected = [continued(cached, ids) for ids in prompts]
    clones = [cached.clone() for _ in range(4)]
    with pytest.raises(UserError, match="no cache yet"):
        clones[0].decode(prompts[0][:, :1], 0)
    found = side_by_side(lambda i: (continued(clones[i], prompts[i]) == expected[i]).all(), 125)
    assert all(itertools.chain.from_iterable(found))
    cached.begin(1)
    steps = side_by_side(lambda i: cached.decode(prompts[0][:, :1], 0), 125)
    assert len({logits.tobytes() for logits in itertools.chain.from_iterable(steps)}) == 1


def test_the_last_position_alone(export, eager):
    checkpoint, exported = export(CONFIG, "forward", last=True)
    session = open_session(compile_model(exported.path), threads=2)
    for B, T in [(1, 1), (3, 17), (1, 70)]:
        close(session.prefill(ids_of(B, T)), eager(checkpoint, ids_of(B, T))[:, -1:])
        close(session.last(ids_of(B, T)), eager(checkpoint, ids_of(B, T))[:, -1])
    with pytest.raises(UserError, match="exported for the last position alone"):
        session.last(ids_of(1, 9), [3])


def test_a_past_becomes_a_preallocated_cache(export, eager):
    checkpoint, exported = export(CONFIG, "past")
    compiled = compile_model(exported.path, options=CompileOptions(check=True))
    assert compiled.kernels["cached_attention"] == CONFIG.n_layer
    session, ids = open_session(compiled, threads=2), ids_of(3, 20)
    expected = eager(checkpoint, ids)
    close(session.fill(ids[:, :17]), expected[:, 16])
    for B in (3, 1, 3):  # whole prompts, with what is in the cache left alone
        close(session.prefill(ids[:B]), expected[:B])
    for at in (17, 18, 19):
        close(session.decode(ids[:, at : at + 1], at), expected[:, at])


@pytest.mark.parametrize(("precision", "largest_error"), [("bf16", 0.05), ("int8", 0.1)])
def test_narrow_products_keep_the_likeliest_token(model, eager, precision, largest_error):
    """Rounding of 2⁻⁹ (bf16) or 1/254 of the largest of a row (int8) in each of ten products in a row, and of keys."""
    session = open_session(compile_model(model[1].path, options=CompileOptions(precision=precision)), threads=2)
    assert session.model.precision == precision
    assert session.model.path.name == f"tvm-llvm-O3-{precision}-cache"
    ids = ids_of(2, 30)
    expected = eager(model[0], ids)
    session.begin(2)
    words = {"bf16": 32 // 2, "int8": 32 // 4 + 1}[precision]  # of heads of 20, filled up to 32
    assert session.model.caches == 4 * [{"dtype": "int32", "shape": [2, 70, words]}]
    at = [0, 17, 18, 19, 30]
    found = [session.step(ids[:, one:two], np.full(2, one)) for one, two in itertools.pairwise(at)]
    found = np.concatenate(found, 1)
    error = np.abs(found - expected).max()
    assert TOLERANCE < error < largest_error * np.abs(expected).max()  # it is another precision, and no worse than so
    ordered = np.sort(expected, -1)
    clear = ordered[..., -1] - ordered[..., -2] > 2 * error
    assert (found.argmax(-1) == expected.argmax(-1))[clear].all()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"precision": "fp8"}, "precision 'fp8': must be one of fp32, bf16, int8"),
        ({"precision": "bf16", "opt_level": 0}, "'bf16': must be one of fp32 for target llvm and opt level 0"),
        ({"precision": "int8", "target": "cuda"}, "'int8': must be one of bf16, fp16, tf32, fp32 for target cuda"),
        ({"precision": "tf32"}, "'tf32': must be one of fp32, bf16, int8, int4 for target llvm"),
    ],
)
def test_a_precision_that_has_no_kernels_is_refused(model, how, said):
    with pytest.raises(UserError, match=said):
        compile_model(model[1].path, options=CompileOptions(**how))
