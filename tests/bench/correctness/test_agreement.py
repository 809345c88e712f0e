"""Logits are compared, on arrays made to fail in one way each."""

import re

import numpy as np
import pytest
import torch

import gpt.attention
from bench.correctness.agreement import compare_logits, compare_tokens, odd_shapes, random_ids, tolerance_of
from bench.models.build import SEEDED
from gpt.checkpoint import seeded_checkpoint
from gpt.config import GPTConfig


@pytest.fixture
def reference() -> np.ndarray:
    """Logits [1, 2, 3] whose largest is 4; the first position is nearly a tie."""
    return np.array([[[1.0, 1.000001, 0.0], [4.0, -2.0, 0.5]]])


def test_equal_logits_agree(reference: np.ndarray) -> None:
    agreement = compare_logits(reference, reference.astype("float32"), tolerance=1e-6)
    assert agreement.agrees
    assert agreement.top1_match == 1
    assert agreement.reason is None


def test_errors_are_measured_over_the_largest_logit(reference: np.ndarray) -> None:
    logits = reference.astype("float32")
    logits[0, 1, 2] += 0.25
    agreement = compare_logits(reference, logits, tolerance=0.1)
    assert agreement.max_abs_err == pytest.approx(0.25)
    assert agreement.max_rel_err == pytest.approx(0.25 / 4)
    assert agreement.agrees


def test_an_error_above_the_tolerance_disagrees(reference: np.ndarray) -> None:
    logits = reference.astype("float32")
    logits[0, 1, 2] += 0.25
    agreement = compare_logits(reference, logits, tolerance=0.01)
    assert not agreement.agrees
    assert "above the tolerance 1.0e-02" in agreement.reason


def test_a_shape_comes_before_everything(reference: np.ndarray) -> None:
    agreement = compare_logits(reference, np.full((1, 1, 3), np.nan, "float64"), tolerance=1)
    assert agreement.reason == "shape [1, 1, 3] instead of [1, 2, 3]"
    assert agreement.max_abs_err is None


def test_a_dtype_comes_before_values(reference: np.ndarray) -> None:
    agreement = compare_logits(reference, reference, tolerance=1)
    assert agreement.reason == "dtype float64 instead of float32"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_disagrees(reference: np.ndarray, bad: float) -> None:
    logits = reference.astype("float32")
    logits[0, 0, 0] = bad
    assert compare_logits(reference, logits, tolerance=1).reason == "1 of 6 logits are not finite"


def test_a_near_tie_may_flip(reference: np.ndarray) -> None:
    logits = reference.astype("float32")
    logits[0, 0, :2] = logits[0, 0, 1::-1]
    agreement = compare_logits(reference, logits, tolerance=1e-5)
    assert agreement.top1_match == 0.5
    assert agreement.agrees


def test_a_decided_position_may_not_flip() -> None:
    reference = np.array([[[1.0, 0.0, -9.0]]])
    agreement = compare_logits(reference, np.array([[[0.0, 1.0, -9.0]]], "float32"), tolerance=0.05)
    assert not agreement.agrees


def test_all_zero_logits_have_an_absolute_error() -> None:
    zeros = np.zeros((1, 1, 2))
    assert compare_logits(zeros, np.full((1, 1, 2), 0.5, "float32"), tolerance=0.1).max_rel_err == 0.5


def test_the_likeliest_tokens_agree(reference: np.ndarray) -> None:
    agreement = compare_tokens(reference, reference.argmax(-1), tolerance=1e-6)
    assert (agreement.agrees, agreement.max_rel_err, agreement.top1_match) == (True, 0, 1)


def test_a_token_of_a_near_tie_agrees(reference: np.ndarray) -> None:
    agreement = compare_tokens(reference, np.array([[0, 0]]), tolerance=1e-5)
    assert agreement.agrees
    assert agreement.top1_match == 0.5
    assert 0 < agreement.max_abs_err < 2e-6


def test_another_token_disagrees(reference: np.ndarray) -> None:
    agreement = compare_tokens(reference, np.array([[1, 2]]), tolerance=1e-5)
    assert agreement.reason == "1 of 2 tokens differ from the likeliest beyond what rounding explains"
    assert agreement.max_rel_err == pytest.approx(3.5 / 4)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (np.array([[1]]), r"tokens int64 \[1, 1\] instead of int64 \[1, 2\]"),
        (np.array([[1, 0]], np.int32), "tokens int32"),
        (np.array([[1, 3]]), "not in the vocabulary"),
        (np.array([[-1, 0]]), "not in the vocabulary"),
    ],
)
def test_tokens_that_cannot_be_disagree(reference: np.ndarray, tokens: np.ndarray, says: str) -> None:
    agreement = compare_tokens(reference, tokens, tolerance=1)
    assert not agreement.agrees
    assert re.search(says, agreement.reason)


def test_the_tolerance_grows_with_depth_and_width() -> None:
    demo, gpt2 = tolerance_of("fp32", SEEDED["demo"]), tolerance_of("fp32", SEEDED["gpt2"])
    assert demo == pytest.approx(2**-24 * (17 * 512) ** 0.5)
    assert demo < gpt2 < 1e-4


@pytest.mark.parametrize("mistake", ["a later token is seen", "a weight matrix is lost"])
def test_fewer_bits_do_not_excuse_a_mistake(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = seeded_checkpoint(SEEDED["demo"])
    ids = torch.from_numpy(random_ids(checkpoint.config, 1, 64, seed=0))
    wrong = checkpoint.build(attention="explicit")
    with torch.inference_mode():
        right = checkpoint.build(attention="explicit").double()(ids).numpy()
        if mistake == "a weight matrix is lost":
            wrong.state_dict()["transformer.h.0.attn.c_proj.weight"].zero_()
        else:
            monkeypatch.setattr(gpt.attention, "_later", lambda scores: torch.full_like(scores, -torch.inf).triu(2))
        agreement = compare_logits(right, wrong(ids).numpy(), tolerance_of("int8", checkpoint.config))
    assert "above the tolerance 9.6e-02" in agreement.reason


def test_odd_shapes_suit_the_model() -> None:
    assert odd_shapes(GPTConfig(block_size=64)) == [(1, 1), (3, 17), (1, 64)]
    assert odd_shapes(GPTConfig(block_size=1)) == [(1, 1), (3, 1)]


def test_random_ids_repeat_with_their_seed(config: GPTConfig) -> None:
    ids = random_ids(config, 3, 5, seed=1)
    assert ids.shape == (3, 5)
    assert ids.dtype == np.int64
    assert 0 <= ids.min() <= ids.max() < config.vocab_size
    assert (ids == random_ids(config, 3, 5, seed=1)).all()
    assert (ids != random_ids(config, 3, 5, seed=2)).any()
