"""A file that others wrote runs with its own inputs and outputs, and over its cache, as ONNX Runtime runs it."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from gpt.cli import UserError
from tvm_frontend.artifact import load_compiled
from tvm_frontend.compile import compile_model, main
from tvm_frontend.frontends import run_file
from tvm_frontend.options import CompileOptions
from tvm_frontend.runtime import open_session
from tvm_frontend.runtime.graph_session import GraphSession

pytestmark = pytest.mark.slow

V, LONGEST, PAST, PRESENT = 37, 16, "past_key_values.0.key", "present.0.key"
ROUNDING = 1e-5  # of logits of up to some ten


@pytest.fixture(scope="module")
def theirs(foreign_file, tmp_path_factory) -> Path:
    return foreign_file(tmp_path_factory.mktemp("theirs") / "model.onnx")


@pytest.fixture(scope="module")
def session(theirs: Path) -> GraphSession:
    return open_session(compile_model(theirs), threads=2)


@pytest.fixture
def command(in_process):
    return partial(in_process, main)


def random_ids(B: int, T: int) -> np.ndarray:
    return np.random.default_rng([B, T]).integers(0, V, (B, T))


def inputs(session: GraphSession, B: int, T: int, P: int, **changes: np.ndarray) -> dict[str, np.ndarray]:
    past = np.random.default_rng(P).standard_normal((B, 1, P, 8), np.float32)
    return session.signature.feed(random_ids(B, T), {PAST: past}) | changes


@pytest.mark.parametrize(("B", "T", "P"), [(1, 1, 0), (2, 7, 0), (3, 1, 5), (2, 4, 12)])
def test_it_gives_what_the_file_gives(session, theirs, B, T, P):
    given = inputs(session, B, T, P)
    hidden = given["attention_mask"].copy()
    hidden[0, -1] = 0
    other_places = given | {"position_ids": given["position_ids"][:, ::-1].copy()}
    for each in (given, given | {"attention_mask": hidden}, other_places):
        found, expected = session.run(each), run_file(theirs, each)
        assert list(found) == ["logits", PRESENT]
        for name, array in found.items():
            np.testing.assert_allclose(array, expected[name], rtol=0, atol=ROUNDING)
            assert array.dtype == expected[name].dtype


def test_ids_alone_are_enough(session, theirs):
    ids = random_ids(2, 7)
    expected = run_file(theirs, session.signature.feed(ids))["logits"]
    np.testing.assert_allclose(session.prefill(ids), expected, rtol=0, atol=ROUNDING)


def test_tokens_follow_each_other_over_the_files_own_past(session, theirs):
    """Its attention is not causal, so its cache cannot be preallocated, and each token sees only what was before."""
    ids = random_ids(2, 5)
    given = session.signature.feed(ids[:, :3])
    expected = [run_file(theirs, given)]
    for at in (3, 4):
        given = session.signature.feed(ids[:, at : at + 1], {PAST: expected[-1][PRESENT]})
        expected.append(run_file(theirs, given))
    found = [session.fill(ids[:, :3]), session.decode(ids[:, 3:4], 3), session.decode(ids[:, 4:], 4)]
    for logits, results in zip(found, expected, strict=True):
        np.testing.assert_allclose(logits, results["logits"][:, -1], rtol=0, atol=ROUNDING)
    again = session.decode(ids[:, 3:4], 3)  # from fewer tokens than there are
    np.testing.assert_array_equal(again, found[1])


def test_clones_have_pasts_of_their_own(session):
    ids, other = random_ids(2, 5), session.clone()
    logits = session.fill(ids)
    other.fill(ids[:1])
    assert other.decode(ids[:1, :1], 5).shape == (1, V)
    np.testing.assert_array_equal(session.fill(ids), logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": random_ids(2, 3).astype("int32")}, "input input_ids of dtype int32: must be int64"),
        ({"input_ids": random_ids(2, 4)}, "t is 4 in input_ids"),
        ({"input_ids": random_ids(2, 3) + V}, r"must be in 0 … 36 \(vocab_size=37\)"),
        ({"attention_mask": np.ones((2, 4), np.int64)}, "there are 0 \\+ 3 tokens"),
        ({"position_ids": np.full((2, 3), LONGEST)}, "positions must be in 0 … 15"),
        ({"position_ids": np.full((2, 3), -1)}, "positions must be in 0 … 15"),
        ({PAST: np.ones((2, 1, 0, 9), np.float32)}, r"must be \[b, 1, past, 8\]"),
        ({PAST: np.ones((1, 1, 0, 8), np.float32)}, "b is 2 in input_ids"),
        ({"more": np.ones(1)}, "input more: not an input of the file; it takes input_ids, attention_mask"),
    ],
    ids=str,
)
def test_what_the_file_does_not_take_is_refused(session, changes, message):
    with pytest.raises(UserError, match=message):
        session.run(inputs(session, 2, 3, 0, **changes))


def test_what_is_missing_is_named(session):
    given = inputs(session, 2, 3, 0)
    del given["position_ids"]
    with pytest.raises(UserError, match="input position_ids: missing"):
        session.run(given)


def test_more_tokens_than_there_are_positions_are_refused(session):
    with pytest.raises(UserError, match="17 tokens: the model has positions for 16"):
        session.prefill(random_ids(1, LONGEST + 1))
    with pytest.raises(UserError, match="17 tokens: the model has positions for 16"):
        session.run(inputs(session, 1, 4, 13))


def test_types_and_shapes_are_the_files(foreign_file, tmp_path):
    theirs = foreign_file(tmp_path / "model.onnx", ("input_ids",), past=False, ids=TensorProto.INT32)
    options = CompileOptions(shapes={"input_ids": (2, 5)}, check=True)
    compiled = compile_model(theirs, options=options)
    assert compiled.signature.inputs[0].dims == (2, 5)
    session = open_session(compiled, threads=2)
    given = {"input_ids": random_ids(2, 5).astype(np.int32)}
    expected = run_file(theirs, given)["logits"]
    np.testing.assert_allclose(session.run(given)["logits"], expected, rtol=0, atol=ROUNDING)
    with pytest.raises(UserError, match=r"input_ids of shape \[2, 4\]: must be \[2, 5\]"):
        session.run({"input_ids": random_ids(2, 4).astype(np.int32)})


def test_the_command_compiles_checks_and_says_so(command, theirs, tmp_path):
    code, out, _ = command(theirs, "-o", tmp_path / "compiled")
    assert code == 0
    assert "checked at 2x11: differs from the file it was compiled from by at most" in out
    assert "its KV cache stays as it is in the file, copied in every step: its keys and values are read by" in out
    assert load_compiled(tmp_path / "compiled").form == "graph"
    assert command(theirs, "-o", tmp_path / "compiled", "--only-check")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "ids=1x2"], "--shapes ids: no input of the file, which has input_ids, attention_mask"),
        (["--shapes", "input_ids"], "--shapes input_ids: must be the name of an input and its sizes"),
        (["--shapes", "input_ids=1x2", "--frontend", "relax-onnx"], "--shapes: not with --frontend relax-onnx"),
    ],
    ids=str,
)
def test_bad_shapes_are_refused(command, theirs, tmp_path, arguments, message):
    code, _, err = command(theirs, "-o", tmp_path / "compiled", *arguments)
    assert (code, len(err.splitlines())) == (2, 1)
    assert message in err
    assert not (tmp_path / "compiled").exists()


def test_a_file_that_was_changed_is_not_the_one_that_was_compiled(command, theirs, foreign_file, tmp_path):
    other = foreign_file(tmp_path / "other.onnx", ("input_ids",))
    command(theirs, "-o", tmp_path / "compiled", "--no-check")
    code, _, err = command(other, "-o", tmp_path / "compiled", "--only-check")
    assert (code, "was compiled from another file" in err) == (2, True)
