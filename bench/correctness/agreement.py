"""Compares an engine's numbers with the reference's, by a tolerance for each precision that follows from rounding."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gpt.config import GPTConfig


@dataclass(frozen=True)
class Precision:
    """The number format of an engine's products, with the error that it allows.

    dtype: its name in results. unit_roundoff: half the gap between 1 and the next number, u. tolerance: of the logits,
    from u, M matmuls that follow one another, and K terms of the longest. reason: why that is the tolerance.
    """

    dtype: str
    unit_roundoff: float
    reason: str
    tolerance: Callable[[float, int, int], float]


# Tolerances by precision; `tolerance_of` computes the number for a model.
PRECISIONS = {
    "fp32": Precision(
        "float32",
        2.0**-24,
        "a dot product of K terms rounds off up to sqrt(K)·u (u: half the gap after 1), and M matmuls in a row add as "
        "a random walk: u·sqrt(M·K) of the largest logit. Some ten times what eager itself shows in float32, a "
        "fifth of what mistaking one GELU for the other does",
        lambda u, M, K: u * math.sqrt(M * K),
    ),
    "bf16": Precision(
        "bfloat16",
        2.0**-8,
        "weights and inputs of products keep 8 bits, and in some engines all that is between them does, while sums are "
        "wide: a matmul is off by some u (half the gap after 1) of its result's size, and M in a row add as a random "
        "walk, u·sqrt(M). Three times that of the largest logit is allowed: eager with all in bfloat16 takes half of "
        "it, on a trained model",
        lambda u, M, K: 3 * u * math.sqrt(M),
    ),
    "fp16": Precision(
        "float16",
        2.0**-11,
        "as bfloat16, with 11 bits in place of 8",
        lambda u, M, K: 3 * u * math.sqrt(M),
    ),
    "int8": Precision(
        "int8",
        1 / 254,
        "weights and activations are rounded to 256 steps between the extremes of their tensor, which lie some five "
        "times the typical number from zero: 1.6 % of a product's typical size. Layers are added to each other, so "
        "logits keep that share, and single positions of a trained model up to five times it: six times is allowed. A "
        "wrong mask or a lost weight matrix is found, not a wrong epsilon",
        lambda u, M, K: 0.096,
    ),
    "int4": Precision(
        "int4",
        1 / 14,
        "weights are rounded to 16 steps between the extremes of their group of up to 128, which lie some three times "
        "the typical weight from zero: 11 % of a product's typical size, of which three times is allowed. It says that "
        "this is the same model, not that it is as good",
        lambda u, M, K: 0.33,
    ),
}


@dataclass(frozen=True)
class Agreement:
    """A comparison of an engine's logits with the reference's in float64.

    max_abs_err: the largest |difference|. max_rel_err: the same over the reference's largest |logit|. top1_match: the
    share of positions whose largest logit is the same, ties and near ties included. tolerance: of max_rel_err.
    reason: why it does not agree, or None. The first three are None if shape, dtype or finiteness already failed.
    `compare_tokens` defines the errors of tokens, which have no logits.
    """

    max_abs_err: float | None
    max_rel_err: float | None
    top1_match: float | None
    agrees: bool
    tolerance: float
    reason: str | None


def tolerance_of(precision: str, config: GPTConfig) -> float:
    """Compute the largest max_rel_err that rounding in a precision explains, by the formula in PRECISIONS.

    M = 4·n_layer + 1 matmuls follow one another, the longest of K = 4·n_embd terms. u·sqrt(K) for one dot product:
    Higham & Mary, https://doi.org/10.1137/18M1226312, their λ being 1. A bigram copies its logits, which rounds them
    once at most: u.
    """
    allowed = PRECISIONS[precision]
    if config.model == "bigram":
        return allowed.unit_roundoff
    return allowed.tolerance(allowed.unit_roundoff, 4 * config.n_layer + 1, 4 * config.n_embd)


def compare_logits(reference: np.ndarray, logits: np.ndarray, tolerance: float) -> Agreement:
    """Compare logits, float32 [B, T, V], with the reference's, float64 [B, T, V]: shape, dtype, finite, values, top-1.

    A position's top-1 counts against the engine only where the reference's first two logits are further apart than
    two errors of the tolerance's size.
    """
    if reason := _reason_not_comparable(reference, logits):
        return Agreement(None, None, None, False, tolerance, reason)
    # One position at a time, as GPT-2's logits of 4 × 1024 tokens are 1.6 GB, which each step would copy.
    pairs = [(reference[at], logits[at]) for at in np.ndindex(reference.shape[:2])]
    largest = max(float(np.abs(right).max()) for right, _ in pairs)
    error = max(float(np.abs(right - found).max()) for right, found in pairs)
    relative = error / largest if largest else error
    differing = [right for right, found in pairs if right.argmax() != found.argmax()]
    flips = sum(margin_of(right) > 2 * tolerance * largest for right in differing)
    same = 1 - len(differing) / len(pairs)
    reason = None
    if relative > tolerance:
        reason = f"error {relative:.1e} of the largest |logit| is above the tolerance {tolerance:.1e}"
    elif flips:
        reason = f"the most likely token differs at {flips} of {len(pairs)} positions, beyond what rounding explains"
    return Agreement(error, relative, same, reason is None, tolerance, reason)


def compare_steps(reference: np.ndarray, steps: Sequence[np.ndarray], tolerance: float) -> Agreement:
    """Compare the logits of S steps, float32 [B, V] each, with the reference's, float64 [B, S, V]."""
    for number, logits in enumerate(steps):
        if reason := _reason_not_comparable(reference[:, number], logits):
            return Agreement(None, None, None, False, tolerance, f"step {number}: {reason}")
    return compare_logits(reference, np.stack(steps, axis=1), tolerance)


def compare_tokens(reference: np.ndarray, tokens: np.ndarray, tolerance: float) -> Agreement:
    """Compare tokens chosen greedily, int64 [B, T], with the reference's logits at their places, float64 [B, T, V].

    A token agrees if no other's logit is larger than its own by more than two errors of the tolerance's size. The
    errors are by how much the likeliest's logit is larger: 0 where the tokens are the same.
    """
    tolerance *= 2
    if tokens.shape != reference.shape[:2] or tokens.dtype != np.int64:
        wrong_form = f"tokens {tokens.dtype} {list(tokens.shape)} instead of int64 {list(reference.shape[:2])}"
        return Agreement(None, None, None, False, tolerance, wrong_form)
    if tokens.min() < 0 or tokens.max() >= reference.shape[2]:
        return Agreement(None, None, None, False, tolerance, "a token that is not in the vocabulary")
    largest = float(np.abs(reference).max()) or 1.0
    behind = reference.max(-1) - np.take_along_axis(reference, tokens[..., None], -1)[..., 0]  # [B, T]
    error, wrong = float(behind.max()), int((behind > tolerance * largest).sum())
    reason = (
        f"{wrong} of {tokens.size} tokens differ from the likeliest beyond what rounding explains" if wrong else None
    )
    same = float((reference.argmax(-1) == tokens).mean())
    return Agreement(error, error / largest, same, not wrong, tolerance, reason)


def margin_of(reference: np.ndarray) -> np.ndarray:
    """Subtract the second largest logit from the largest: [B, T, V] to [B, T]; infinite if V is 1."""
    if reference.shape[-1] < 2:
        return np.full(reference.shape[:-1], np.inf)
    top = np.partition(reference, -2, axis=-1)[..., -2:]  # [B, T, 2]
    return top[..., 1] - top[..., 0]


def odd_shapes(config: GPTConfig) -> list[tuple[int, int]]:
    """List the (B, T) at which every engine is checked whatever is timed: one token, no round number, the longest."""
    return list(dict.fromkeys([(1, 1), (3, min(17, config.block_size)), (1, config.block_size)]))


def random_ids(config: GPTConfig, B: int, T: int, seed: int) -> np.ndarray:
    """Draw random ids, int64 [B, T], which depend on the seed and the shape alone."""
    return np.random.default_rng([seed, B, T]).integers(0, config.vocab_size, (B, T))


def _reason_not_comparable(reference: np.ndarray, logits: np.ndarray) -> str | None:
    if logits.shape != reference.shape:
        return f"shape {list(logits.shape)} instead of {list(reference.shape)}"
    if logits.dtype != np.float32:
        return f"dtype {logits.dtype} instead of float32"
    if not np.isfinite(logits.sum(dtype=np.float64)):
        bad = int((~np.isfinite(logits)).sum())
        return f"{bad} of {logits.size} logits are not finite"
    return None
