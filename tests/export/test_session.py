"""What a session refuses before anything runs, and that it works in place."""

import numpy as np
import pytest

from export.session import Session
from gpt.cli import UserError

ids = np.zeros((2, 3), np.int64)

BAD_IDS = {
    "one dimension": (ids[0], r"ids of shape \[3\]: must be \[B, T\] with T from 1 to 32"),
    "no token": (ids[:, :0], r"ids of shape \[2, 0\]"),
    "too many": (np.zeros((2, 33), np.int64), r"ids of shape \[2, 33\]: must be \[B, T\] with T from 1 to 32"),
    "floats": (ids.astype(np.float32), "ids of dtype float32: must be int64"),
    "int32": (ids.astype(np.int32), "ids of dtype int32: must be int64"),
    "too large an id": (ids + 211, r"token id 211: must be in 0 … 210"),
    "a negative id": (ids - 1, r"token id -1: must be in 0 … 210"),
}


@pytest.fixture(params=["exported", "cached", "past"])
def session(request) -> Session:
    return Session(request.getfixturevalue(request.param))


@pytest.mark.parametrize("bad", BAD_IDS)
def test_bad_ids_are_refused(session, bad):
    session.start(2)
    given, said = BAD_IDS[bad]
    with pytest.raises(UserError, match=said):
        session.step(given)
    assert session.step(ids).shape == (2, 3, 211)


@pytest.mark.parametrize("form", ["cached", "past"])
def test_tokens_beyond_the_cache_are_refused_and_nothing_is_written(form, request):
    session = Session(request.getfixturevalue(form))
    session.start(2)
    session.step(np.zeros((2, 30), np.int64))
    before = [value.numpy().copy() for value in session._cache.values()]
    with pytest.raises(UserError, match=r"3 tokens behind \[30, 30\] in the cache: they must fit in block_size=32"):
        session.step(ids)
    assert all(np.array_equal(*pair) for pair in zip(before, (v.numpy() for v in session._cache.values()), strict=True))
    assert session.step(ids[:, :2]).shape == (2, 2, 211)


def test_another_batch_than_the_caches_is_refused(cached):
    session = Session(cached)
    session.start(3)
    with pytest.raises(UserError, match=r"2 sequences of ids for a cache of 3: start\(2\) makes one"):
        session.step(ids)


def test_lengths_that_a_form_cannot_have_are_refused(cached, past):
    session = Session(past)
    session.start(2)
    session.step(ids)
    session.lengths = np.array([1, 3])
    with pytest.raises(UserError, match=r"sequences of \[1, 3\] tokens: a past has one length for all"):
        session.step(ids)
    session = Session(cached)
    session.lengths = np.array([-1])
    with pytest.raises(UserError, match=r"behind \[-1\] in the cache"):
        session.step(ids[:1])


def test_a_static_cache_is_written_in_place(cached):
    session = Session(cached)
    session.start(2)
    addresses = [array.ctypes.data for array in session._memory.values()]
    session.step(ids)
    assert [value.data_ptr() for value in session._cache.values()] == addresses
    written = session._memory["cache.0.key"]
    assert not (written[:, :, :3] == 9).any()
    assert (written[:, :, 3:] == 9).all()
