"""Logits are compared, on arrays made to fail in one way each."""

import re

import numpy as np
import pytest

from bench.correctness.agreement import (
    FACTORS,
    Errors,
    compare_logits,
    compare_tokens,
    errors_of,
    measure_allowed,
    odd_shapes,
    random_ids,
)
from bench.correctness.reference import allowed_of
from bench.models.build import SEEDED
from gpt.checkpoint import seeded_checkpoint
from gpt.config import GPTConfig


def allowed_share(share: float) -> Errors:
    """Allow errors of a share of 4, the largest logit of `reference`."""
    return Errors(4 * share, 4 * share, 4 * share)


@pytest.fixture
def reference() -> np.ndarray:
    """Logits [1, 2, 3] whose largest is 4; the first position is nearly a tie."""
    return np.array([[[1.0, 1.000001, 0.0], [4.0, -2.0, 0.5]]])


def test_equal_logits_agree(reference: np.ndarray) -> None:
    agreement = compare_logits(reference, reference.astype("float32"), allowed_share(1e-6))
    assert agreement.agrees
    assert agreement.top1_match == 1
    assert agreement.reason is None


def test_errors_are_measured_over_the_largest_logit(reference: np.ndarray) -> None:
    logits = reference.astype("float32")
    logits[0, 1, 2] += 0.25
    agreement = compare_logits(reference, logits, allowed_share(0.1))
    assert agreement.max_abs_err == pytest.approx(0.25)
    assert agreement.max_rel_err == pytest.approx(0.25 / 4)
    assert agreement.agrees


def test_an_error_above_the_tolerance_disagrees(reference: np.ndarray) -> None:
    logits = reference.astype("float32")
    logits[0, 1, 2] += 0.25
    agreement = compare_logits(reference, logits, allowed_share(0.01))
    assert not agreement.agrees
    assert "above the tolerance 1.0e-02" in agreement.reason


def test_a_shape_comes_before_everything(reference: np.ndarray) -> None:
    agreement = compare_logits(reference, np.full((1, 1, 3), np.nan, "float64"), allowed_share(1))
    assert agreement.reason == "shape [1, 1, 3] instead of [1, 2, 3]"
    assert agreement.max_abs_err is None


def test_a_dtype_comes_before_values(reference: np.ndarray) -> None:
    agreement = compare_logits(reference, reference, allowed_share(1))
    assert agreement.reason == "dtype float64 instead of float32"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_disagrees(reference: np.ndarray, bad: float) -> None:
    logits = reference.astype("float32")
    logits[0, 0, 0] = bad
    assert compare_logits(reference, logits, allowed_share(1)).reason == "1 of 6 logits are not finite"


def test_a_near_tie_may_flip(reference: np.ndarray) -> None:
    logits = reference.astype("float32")
    logits[0, 0, :2] = logits[0, 0, 1::-1]
    agreement = compare_logits(reference, logits, allowed_share(1e-5))
    assert agreement.top1_match == 0.5
    assert agreement.agrees


def test_a_decided_position_may_not_flip() -> None:
    reference = np.array([[[1.0, 0.0, -9.0]]])
    agreement = compare_logits(reference, np.array([[[0.0, 1.0, -9.0]]], "float32"), allowed_share(0.05))
    assert not agreement.agrees


def test_all_zero_logits_have_an_absolute_error() -> None:
    zeros = np.zeros((1, 1, 2))
    assert compare_logits(zeros, np.full((1, 1, 2), 0.5, "float32"), allowed_share(0.1)).max_rel_err == 0.5


def test_the_likeliest_tokens_agree(reference: np.ndarray) -> None:
    agreement = compare_tokens(reference, reference.argmax(-1), allowed_share(1e-6))
    assert (agreement.agrees, agreement.max_rel_err, agreement.top1_match) == (True, 0, 1)


def test_a_token_of_a_near_tie_agrees(reference: np.ndarray) -> None:
    agreement = compare_tokens(reference, np.array([[0, 0]]), allowed_share(1e-5))
    assert agreement.agrees
    assert agreement.top1_match == 0.5
    assert 0 < agreement.max_abs_err < 2e-6


def test_another_token_disagrees(reference: np.ndarray) -> None:
    agreement = compare_tokens(reference, np.array([[1, 2]]), allowed_share(1e-5))
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
    agreement = compare_tokens(reference, tokens, allowed_share(1))
    assert not agreement.agrees
    assert re.search(says, agreement.reason)


def test_a_wrong_position_is_found_among_many_that_are_right() -> None:
    """Each of its logits is within what is allowed of a single one, but not all of them together."""
    reference = np.random.default_rng(0).standard_normal((1, 64, 50))
    logits = reference.astype(np.float32)
    logits[0, 63] += 0.5
    agreement = compare_logits(reference, logits, Errors(rms=1, position=0.4, worst=1))
    assert agreement.reason == "the rms error of a position, 5.0e-01, is above the 4.0e-01 allowed"
    assert agreement.share_of_allowed == pytest.approx(0.5 / 0.4)


def test_a_small_error_everywhere_is_found_where_there_are_positions_enough() -> None:
    reference = np.random.default_rng(0).standard_normal((2, 8, 50))
    logits, allowed = (reference + 0.1).astype(np.float32), Errors(rms=0.05, position=1, worst=1)
    assert "rms error of all 16 positions" in compare_logits(reference, logits, allowed).reason
    assert compare_logits(reference[:, :7], logits[:, :7], allowed).agrees


def test_errors_are_as_defined() -> None:
    right, found = np.zeros((2, 2)), np.array([[3.0, 4.0], [0.0, 0.0]])
    errors = errors_of(zip(right, found, strict=True))
    assert (errors.rms, errors.position, errors.worst) == (pytest.approx(2.5), pytest.approx(12.5**0.5), 4)


@pytest.mark.parametrize(("precision", "least", "most"), [("fp32", 1e-8, 1e-6), ("bf16", 1e-3, 1e-1)])
def test_what_is_allowed_is_a_multiple_of_eagers_errors(precision: str, least: float, most: float) -> None:
    allowed = allowed_of(seeded_checkpoint(SEEDED["demo"]), precision)
    assert least < allowed.rms < allowed.position < allowed.worst < most * 10


def test_the_last_rounding_of_a_logit_is_always_allowed() -> None:
    """A model whose every operation is exact, as a bigram's, may still be rounded to float32 once."""
    config, logits = GPTConfig.bigram(vocab_size=3, block_size=8), np.full((1, 1, 3), 5.0)
    allowed = measure_allowed(lambda ids: logits, lambda ids: logits, config, seed=0)
    assert allowed == Errors(*(factor * 5 * 2.0**-24 for factor in (FACTORS.rms, FACTORS.position, FACTORS.worst)))


def test_a_model_whose_logits_are_all_zero_agrees_with_itself() -> None:
    config, zeros = GPTConfig.bigram(vocab_size=3, block_size=8), np.zeros((1, 1, 3))
    allowed = measure_allowed(lambda ids: zeros, lambda ids: zeros, config, seed=0)
    agreement = compare_logits(zeros, zeros.astype("float32"), allowed)
    assert (agreement.agrees, agreement.share_of_allowed) == (True, 0)


def test_odd_shapes_suit_the_model() -> None:
    assert odd_shapes(GPTConfig(block_size=64)) == [(1, 1), (2, 3), (3, 17), (1, 64)]
    assert odd_shapes(GPTConfig(block_size=1)) == [(1, 1), (2, 1), (3, 1)]


def test_random_ids_repeat_with_their_seed(config: GPTConfig) -> None:
    ids = random_ids(config, 3, 5, seed=1)
    assert ids.shape == (3, 5)
    assert ids.dtype == np.int64
    assert 0 <= ids.min() <= ids.max() < config.vocab_size
    assert (ids == random_ids(config, 3, 5, seed=1)).all()
    assert (ids != random_ids(config, 3, 5, seed=2)).any()
