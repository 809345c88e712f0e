"""The ways in which engines round a model to fewer bits, so that each is held to what it ought to compute.

An engine in int8 or int4 rounds the weights before it runs, which is most of its error and is always the same: it is
compared with a model in float64 of the weights rounded alike. It also rounds activations while it runs; by how much
that may change the logits is measured on the same model. Both follow from the model's own weights and from what the
engine's documentation says, never from a file that the engine reads.

Arrays are float64, with the terms of a product along the last axis: weights [N, K], activations [..., K].
"""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

Array = np.ndarray
LARGEST_GROUP = 128  # weights that share a scale in NNCF's 4 bits


@dataclass(frozen=True)
class Rounding:
    """What an engine rounds, and how; None where it keeps float32.

    weights: those of a product [N, K], by (weights, width), width being the model's n_embd. head: those of the last
    product, if other than weights. tables: the embeddings of tokens and positions, [V, C] each. activations: what a
    product multiplies with its weights, [..., K]. cached: keys and values [B, nh, S, hs].
    """

    weights: Callable[[Array, int], Array]
    activations: Callable[[Array], Array]
    head: Callable[[Array, int], Array] | None = None
    tables: Callable[[Array, int], Array] | None = None
    cached: Callable[[Array], Array] | None = None


def by_row(x: Array, width: int = 0) -> Array:
    """Round each row to int8 by its absmax: a scale for each column of a weight, or each token's activations."""
    return _to_steps(x, np.abs(x).max(-1, keepdims=True), 127)


def by_matrix(x: Array, width: int = 0) -> Array:
    """Round to int8 by the absmax of the whole matrix."""
    return _to_steps(x, np.abs(x).max(), 127)


def by_row_with_offset(x: Array, width: int = 0) -> Array:
    """Round each row to 256 steps between its least and its largest element, of which 0 is one."""
    return _between(x, np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0))


def by_tensor_with_offset(x: Array) -> Array:
    """Round to 256 steps between the least and the largest element of all, of which 0 is one."""
    return _between(x, np.minimum(x.min(), 0), np.maximum(x.max(), 0))


def by_32(x: Array) -> Array:
    """Round each group of 32 elements of a row to int8 by its absmax."""
    groups = _groups(x, 32)
    return _ungrouped(_to_steps(groups, np.abs(groups).max(-1, keepdims=True), 127), x)


def int4_by_32(x: Array, width: int = 0) -> Array:
    """Round each group of 32 elements of a row to 16 steps, the scale being rounded to bfloat16."""
    groups = _groups(x, 32)
    scales = (_signed_absmax(groups) / -8).astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    return _ungrouped(_to_16_steps(groups, scales), x)


def int4_by_group(x: Array, width: int) -> Array:
    """Round each group of a row to 16 steps; a group has as many elements, up to 128, as a power of 2 divides width."""
    size = LARGEST_GROUP
    while width % size:
        size //= 2
    groups = _groups(x, size)
    return _ungrouped(_to_16_steps(groups, _signed_absmax(groups) / -8), x)


def _to_steps(x: Array, absmax: Array, steps: int) -> Array:
    scale = np.where(absmax == 0, 1, absmax / steps)
    return np.rint(x / scale) * scale


def _between(x: Array, lowest: Array, highest: Array) -> Array:
    scale = np.where(highest == lowest, 1, (highest - lowest) / 255)
    zero_point = np.rint(-lowest / scale)
    return (np.clip(np.rint(x / scale) + zero_point, 0, 255) - zero_point) * scale


def _to_16_steps(groups: Array, scales: Array) -> Array:
    return np.clip(np.rint(groups / np.where(scales == 0, 1, scales)), -8, 7) * scales


def _signed_absmax(groups: Array) -> Array:
    """Return the element of largest magnitude of each group, [..., 1]: it becomes -8, of which there is no opposite."""
    lowest, highest = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    return np.where(highest > -lowest, highest, lowest)


def _groups(x: Array, size: int) -> Array:
    """Split rows in groups, padded with zeros: [..., K] to [..., groups, size]."""
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)]
    return np.pad(x, padding).reshape(*x.shape[:-1], -1, size)


def _ungrouped(groups: Array, x: Array) -> Array:
    return groups.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
