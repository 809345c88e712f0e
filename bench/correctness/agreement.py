"""Compares an engine's numbers with the reference's. What is allowed is a multiple of eager's own rounding errors."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.models.shape import Model, fitted


@dataclass(frozen=True)
class Precision:
    """The number format of an engine's products.

    dtype: its name in results, which is torch's for floating point. judge: what an engine is compared with, and whose
    errors are the measure of what is allowed.
    """

    dtype: str
    judge: str


PRECISIONS = {
    "fp32": Precision("float32", "the model in float64; the measure is eager PyTorch in float32"),
    "bf16": Precision("bfloat16", "the model in float64; the measure is eager PyTorch, all of it in bfloat16"),
    "fp16": Precision("float16", "the model in float64; the measure is eager PyTorch, all of it in float16"),
    "int8": Precision(
        "int8",
        "the model in float64 with its weights rounded as the engine rounds them; the measure is the same model with "
        "activations rounded too",
    ),
    "int4": Precision(
        "int4",
        "the model in float64 with its weights rounded as the engine rounds them; the measure is the same model with "
        "activations rounded too, which are of 8 bits",
    ),
}


@dataclass(frozen=True)
class Errors:
    """Errors of logits, in their own unit.

    rms: over all of them. position: the largest rms of a position, over its V logits. worst: of a single one.
    """

    rms: float
    position: float
    worst: float


# An engine may be off by this many times what eager itself is. Engines add in other orders, and now and then a position
# is several times as sensitive as others. Faults show in one or another: a wrong mask in single positions, a wrong
# weight in all of them.
FACTORS = Errors(rms=3, position=6, worst=6)
UNIT_ROUNDOFF = 2.0**-24  # of float32: half the gap between 1 and the next number
ENOUGH = 16  # positions for an rms over them to be held to that of many
CALIBRATION_TOKENS = 384  # about so many show what eager's errors are
CALIBRATION_T = 128  # the longest of its sequences


@dataclass(frozen=True)
class Agreement:
    """A comparison of an engine's logits with the reference's in float64.

    max_abs_err: the largest |difference|. max_rel_err: the same over the reference's largest |logit|. top1_match: the
    share of positions whose largest logit is the same, ties and near ties included. tolerance: of max_rel_err.
    share_of_allowed: the largest of the errors of `Errors`, each over what is allowed of it. reason: why it does not
    agree, or None. All numbers but the tolerance are None if shape, dtype or finiteness already failed.
    `compare_tokens` defines the errors of tokens, which have no logits.
    """

    max_abs_err: float | None
    max_rel_err: float | None
    top1_match: float | None
    agrees: bool
    tolerance: float
    reason: str | None
    share_of_allowed: float | None = None


def measure_allowed(
    judge: Callable[[np.ndarray], np.ndarray],
    eager: Callable[[np.ndarray], np.ndarray],
    config: Model,
    seed: int,
) -> Errors:
    """Return the errors that an engine is allowed: FACTORS times those of `eager` against `judge`, on fresh random ids.

    Both give logits [1, T, V] of ids int64 [1, T]: judge in float64, eager as the precision of the engine computes. At
    least the last rounding of a logit to float32 is allowed.
    """
    rows = [row[None] for B, T in calibration_shapes(config) for row in random_ids(config, B, T, seed + 1)]
    largest, found = 0.0, []
    for ids in rows:
        right = judge(ids)
        largest = max(largest, float(np.abs(right).max()))
        found.append(errors_of(zip(right[0], eager(ids)[0], strict=True)))
    rms = math.sqrt(float(np.average([each.rms**2 for each in found], weights=[ids.size for ids in rows])))
    least = UNIT_ROUNDOFF * (largest or 1.0)
    return Errors(
        FACTORS.rms * max(rms, least),
        FACTORS.position * max(least, *(each.position for each in found)),
        FACTORS.worst * max(least, *(each.worst for each in found)),
    )


def errors_of(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Errors:
    """Measure the errors over positions, each a pair of right and found logits [V], one at a time to save memory."""
    squares, worst = [], 0.0
    for right, found in pairs:
        error = found - right
        squares.append(float(np.mean(error**2)))
        worst = max(worst, float(np.abs(error).max()))
    return Errors(math.sqrt(float(np.mean(squares))), math.sqrt(max(squares)), worst)


def calibration_shapes(config: Model) -> list[tuple[int, int]]:
    """List the (B, T) at which eager's errors are measured: short ones of `odd_shapes`, and one of many positions."""
    T = min(CALIBRATION_T, config.block_size)
    shapes = [shape for shape in odd_shapes(config) if shape[1] < T] + [(max(2, -(-CALIBRATION_TOKENS // T)), T)]
    return fitted(config, shapes)


def compare_logits(reference: np.ndarray, logits: np.ndarray, allowed: Errors) -> Agreement:
    """Compare logits, float32 [B, T, V], with the reference's, float64 [B, T, V]: shape, dtype, finite, values, top-1.

    allowed: by `measure_allowed`. A position's top-1 counts against the engine only where the reference's first two
    logits are further apart than two errors of the allowed size.
    """
    # One position at a time, as GPT-2's logits of 4 × 1024 tokens are 1.6 GB, which each step would copy.
    largest = max(float(np.abs(reference[at]).max()) for at in np.ndindex(reference.shape[:2])) or 1.0
    tolerance = allowed.worst / largest
    if reason := _reason_not_comparable(reference, logits):
        return Agreement(None, None, None, False, tolerance, reason)
    pairs = [(reference[at], logits[at]) for at in np.ndindex(reference.shape[:2])]
    errors = errors_of(pairs)
    differing = [right for right, found in pairs if right.argmax() != found.argmax()]
    flips = sum(margin_of(right) > 2 * allowed.worst for right in differing)
    shares = {
        f"error {errors.worst / largest:.1e} of the largest |logit| is above the tolerance {tolerance:.1e}": (
            errors.worst / allowed.worst
        ),
        f"the rms error of a position, {errors.position:.1e}, is above the {allowed.position:.1e} allowed": (
            errors.position / allowed.position
        ),
    }
    if len(pairs) >= ENOUGH:
        words = f"the rms error of all {len(pairs)} positions, {errors.rms:.1e}, is above the {allowed.rms:.1e} allowed"
        shares[words] = errors.rms / allowed.rms
    reason = next((words for words, share in shares.items() if share > 1), None)
    if flips and not reason:
        reason = f"the most likely token differs at {flips} of {len(pairs)} positions, beyond what rounding explains"
    same = 1 - len(differing) / len(pairs)
    share = max(shares.values())
    return Agreement(errors.worst, errors.worst / largest, same, reason is None, tolerance, reason, share)


def compare_steps(reference: np.ndarray, steps: Sequence[np.ndarray], allowed: Errors) -> Agreement:
    """Compare the logits of S steps, float32 [B, V] each, with the reference's, float64 [B, S, V]."""
    for number, logits in enumerate(steps):
        if reason := _reason_not_comparable(reference[:, number], logits):
            tolerance = allowed.worst / (float(np.abs(reference).max()) or 1.0)
            return Agreement(None, None, None, False, tolerance, f"step {number}: {reason}")
    return compare_logits(reference, np.stack(steps, axis=1), allowed)


def compare_tokens(reference: np.ndarray, tokens: np.ndarray, allowed: Errors) -> Agreement:
    """Compare tokens chosen greedily, int64 [B, T], with the reference's logits at their places, float64 [B, T, V].

    A token agrees if no other's logit is larger than its own by more than two errors of the allowed size. The errors
    are by how much the likeliest's logit is larger: 0 where the tokens are the same.
    """
    largest = float(np.abs(reference).max()) or 1.0
    tolerance = 2 * allowed.worst / largest
    if tokens.shape != reference.shape[:2] or tokens.dtype != np.int64:
        wrong_form = f"tokens {tokens.dtype} {list(tokens.shape)} instead of int64 {list(reference.shape[:2])}"
        return Agreement(None, None, None, False, tolerance, wrong_form)
    if tokens.min() < 0 or tokens.max() >= reference.shape[2]:
        return Agreement(None, None, None, False, tolerance, "a token that is not in the vocabulary")
    behind = reference.max(-1) - np.take_along_axis(reference, tokens[..., None], -1)[..., 0]  # [B, T]
    error, wrong = float(behind.max()), int((behind > 2 * allowed.worst).sum())
    reason = (
        f"{wrong} of {tokens.size} tokens differ from the likeliest beyond what rounding explains" if wrong else None
    )
    same = float((reference.argmax(-1) == tokens).mean())
    share = error / (2 * allowed.worst)
    return Agreement(error, error / largest, same, not wrong, tolerance, reason, share)


def margin_of(reference: np.ndarray) -> np.ndarray:
    """Subtract the second largest logit from the largest: [B, T, V] to [B, T]; infinite if V is 1."""
    if reference.shape[-1] < 2:
        return np.full(reference.shape[:-1], np.inf)
    top = np.partition(reference, -2, axis=-1)[..., -2:]  # [B, T, 2]
    return top[..., 1] - top[..., 0]


def odd_shapes(config: Model) -> list[tuple[int, int]]:
    """List the (B, T) at which every engine is checked whatever is timed: one token, few, no round number, the longest.

    A mistake about a single key shows best where there are few.
    """
    T = config.block_size
    return fitted(config, [(1, 1), (2, min(3, T)), (3, min(17, T)), (1, T)])


def random_ids(config: Model, B: int, T: int, seed: int) -> np.ndarray:
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
