"""The kernels of this folder in plain numpy: the same loops and roundings, without vectors, threads and prefetches.

Roundings that a kernel states are done here as well: to bfloat16, to int8 and int4 with their scales in float32. All
else is computed in `dtype`, by default float64, so that a test can hold a kernel, whose sums are float32, to an error
bound. Axes: B sequences of T tokens, C = nh heads * hs elements; M = B * T rows of x [M, K] and W [K, N].
"""

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np

from tvm_frontend.kernels.cpu.packing import GROUP_SIZE

Array = np.ndarray
Float = type[np.floating]
MIN_ABSMAX = np.float32(1e-30)
MR, NR, MC, BLOCK, KC = 8, 32, 64, 128, 256  # of AVX-512; BLOCK: MC times the tasks per block, here two


# Conversions.


def to_bf16(x: Array) -> Array:
    """Round float32 to bfloat16 and return the values as float32; a NaN stays one of the same sign."""
    with np.errstate(invalid="ignore"):  # numpy warns of a signalling NaN, which becomes a quiet one
        return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def quantize_rows(x: Array) -> tuple[Array, Array]:
    """Quantise float32 [..., K] to int8 by absmax along the last axis; return them and float32 scales [..., 1].

    A NaN, which no integer is, makes its row's scale NaN.
    """
    absmax = np.maximum(np.abs(x).max(-1, keepdims=True), MIN_ABSMAX)
    with np.errstate(invalid="ignore"):
        q = np.rint(x * (np.float32(127) / absmax))
    return np.nan_to_num(q).astype(np.int8), absmax * np.float32(1 / 127)


def groups_of(x: Array) -> Array:
    """Split the last axis in groups, padded with zeros: [..., K] → [..., groups, GROUP_SIZE]."""
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % GROUP_SIZE)]
    return np.pad(x, padding).reshape(*x.shape[:-1], -1, GROUP_SIZE)


def quantize_columns(w: Array) -> tuple[Array, Array]:
    """Quantise a weight, float32 [K, N], to int8 by column; return it and float32 scales [N]."""
    scales = np.abs(w).max(0) / np.float32(127)
    return np.rint(w / np.where(scales == 0, np.float32(1), scales)).astype(np.int8), scales


def quantize_column_groups(w: Array) -> tuple[Array, Array]:
    """Quantise a weight, float32 [K, N], to 0 … 15 in groups of each column; q stands for (q - 8) * scale.

    Returns uint8 [N, groups, GROUP_SIZE] and float32 scales [N, groups, 1], which bfloat16 can hold. The element of
    largest magnitude of a group is q = 0.
    """
    groups = groups_of(np.ascontiguousarray(w.T))
    lowest, highest = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    scales = to_bf16(np.where(highest > -lowest, highest, lowest) / np.float32(-8))
    reciprocals = np.float32(1) / np.where(scales == 0, np.float32(1), scales)
    return np.clip(np.rint(groups * reciprocals) + 8, 0, 15).astype(np.uint8), scales


# Activations: `math`.


def exp2(x: Array, dtype: Float = np.float64) -> Array:
    """Return 2^x; x below -126 counts as -126."""
    return np.exp2(np.maximum(x.astype(dtype), -126))


def gelu_tanh(x: Array) -> Array:
    """Return GPT-2's GELU (https://arxiv.org/abs/1606.08415)."""
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def gelu_exact(x: Array) -> Array:
    """Return x · Φ(x), with Φ the standard normal CDF."""
    return x * np.vectorize(math.erfc, otypes=[x.dtype])(-x * math.sqrt(0.5)) / 2


ACTIVATIONS: dict[str | None, Callable[[Array], Array]] = {
    None: lambda x: x,
    "gelu_tanh": gelu_tanh,
    "gelu": gelu_exact,
    "relu": lambda x: np.maximum(x, 0),
}


# Linear layers: `linear`, `microkernel`, `quantize_rows`.


def linear(
    x: Array,
    w: Array,
    bias: Array,
    *,
    precision: str = "fp32",
    activation: str | None = None,
    residual: Array | None = None,
    dtype: Float = np.float64,
) -> Array:
    """Return activation(x · W + bias) [+ residual], x [..., K], in the five loops of `linear`."""
    microkernel = MICROKERNELS[precision](x.reshape(-1, x.shape[-1]), w, dtype)
    M, N = math.prod(x.shape[:-1]), w.shape[1]
    out = np.empty((M, N), dtype)
    for block in range(0, M, BLOCK):  # 5: the x block stays in L2
        for panel in range(0, N, NR):  # 4: so does a packed panel
            for task in range(block, min(block + BLOCK, M), MC):  # 3: the unit of parallel work
                for tile in range(task, min(task + MC, M), MR):  # 2: MR rows of x
                    rows, columns = slice(tile, min(tile + MR, M)), slice(panel, min(panel + NR, N))
                    out[rows, columns] = microkernel(rows, columns)  # 1: k, accumulators in registers
    out = ACTIVATIONS[activation](out + bias).reshape(*x.shape[:-1], N)
    return out if residual is None else out + residual


Microkernel = Callable[[slice, slice], Array]


def _fp32(x: Array, w: Array, dtype: Float) -> Microkernel:
    """In blocks of KC products per accumulator: the sum of a block is flushed into a second one."""
    x, w = x.astype(dtype), w.astype(dtype)

    def microkernel(rows: slice, columns: slice) -> Array:
        acc = np.zeros((len(x[rows]), w[:, columns].shape[1]), dtype)
        for k in range(0, len(w), KC):
            acc = acc + x[rows, k : k + KC] @ w[k : k + KC, columns]
        return acc

    return microkernel


def _bf16(x: Array, w: Array, dtype: Float) -> Microkernel:
    """Products of bf16, pairs of which are added at once."""
    x, w = to_bf16(x).astype(dtype), to_bf16(w).astype(dtype)
    return lambda rows, columns: x[rows] @ w[:, columns]


def _int8(x: Array, w: Array, dtype: Float) -> Microkernel:
    """Sums in int32 over all of K, of unsigned x with the zero point 128, then corrected and dequantised."""
    (qx, x_scales), (qw, w_scales) = quantize_rows(x), quantize_columns(w)
    qx, qw = qx.astype(np.int32), qw.astype(np.int32)
    corrections = -128 * qw.sum(0)

    def microkernel(rows: slice, columns: slice) -> Array:
        acc = (qx[rows] + 128) @ qw[:, columns] + corrections[columns]
        return acc.astype(dtype) * (x_scales[rows].astype(dtype) * w_scales[columns])

    return microkernel


def _int4(x: Array, w: Array, dtype: Float) -> Microkernel:
    """Sums in int32 within a group, corrected for W's zero point 8, then dequantised and added in float32."""
    (qx, x_scales), (qw, w_scales) = quantize_rows(groups_of(x)), quantize_column_groups(w)
    qx, qw = qx.astype(np.int32), qw.astype(np.int32)
    corrections = -8 * qx.sum(-1)  # [M, groups]

    def microkernel(rows: slice, columns: slice) -> Array:
        acc = np.zeros((len(qx[rows]), len(qw[columns])), dtype)
        for g in range(qx.shape[1]):
            group_acc = corrections[rows, g, None] + qx[rows, g] @ qw[columns, g].T
            acc = acc + group_acc.astype(dtype) * (w_scales[columns, g, 0].astype(dtype) * x_scales[rows, g])
        return acc

    return microkernel


MICROKERNELS: dict[str, Callable[[Array, Array, Float], Microkernel]] = {
    "fp32": _fp32,
    "bf16": _bf16,
    "int8": _int8,
    "int4": _int4,
}


# LayerNorm and embedding.


def layer_norm(x: Array, gain: Array, bias: Array, epsilon: float = 1e-5, dtype: Float = np.float64) -> Array:
    """Return LayerNorm over the last axis, with the variance about the mean in a second pass."""
    x = x.astype(dtype)
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) * (1 / np.sqrt(variance + epsilon)) * gain + bias


def embedding(tokens: Array, ids: Array, positions: Array, pos: Array | None = None) -> Array:
    """Return tokens[ids] + positions, float32 [B, T, C]; pos [B]: of the first token of each sequence, else 0."""
    first = np.zeros(len(ids), np.int64) if pos is None else pos
    return tokens[ids] + positions[first[:, None] + np.arange(ids.shape[1])]


# Attention.


def heads_of(qkv: Array, nh: int) -> tuple[Array, Array, Array]:
    """Split qkv [B, T, 3 C] in q, k and v, [B, nh, T, hs] each."""
    B, T, width = qkv.shape
    q, k, v = (part.reshape(B, T, nh, width // 3 // nh).swapaxes(1, 2) for part in np.split(qkv, 3, -1))
    return q, k, v


def attend_query(q: Array, keys: Array, values: Array, scale: float, bf16: bool, dtype: Float) -> Array:
    """Return softmax(scale · q · keys) · values of one query [hs] over the keys that it sees, [count, hs].

    As the kernels do it: q is scaled once, for exp2; the weights are not normalised, the result is divided by their
    sum. bf16: q, keys, values and weights are rounded for the products; row_sum is of the weights before rounding.
    """
    product_of = to_bf16 if bf16 else lambda x: x
    q = product_of(q * np.float32(scale * math.log2(math.e)) if bf16 else q.astype(dtype) * scale * math.log2(math.e))
    scores = product_of(keys).astype(dtype) @ q.astype(dtype)
    row_max = scores.max()
    p = exp2(scores - row_max, dtype)
    row_sum = p.sum()
    out_acc = product_of(p).astype(dtype) @ product_of(values).astype(dtype)
    return out_acc / row_sum


def causal_attention(qkv: Array, nh: int, scale: float, *, bf16: bool = False, dtype: Float = np.float64) -> Array:
    """Return attention [B, T, C] from qkv, float32 [B, T, 3 C]; bf16: products of bfloat16."""
    B, T, width = qkv.shape
    q, k, v = heads_of(qkv, nh)
    out = np.empty(q.shape, dtype)  # [B, nh, T, hs]
    for b in range(B):
        for h in range(nh):
            for t in range(T):
                out[b, h, t] = attend_query(q[b, h, t], k[b, h, : t + 1], v[b, h, : t + 1], scale, bf16, dtype)
    return out.swapaxes(1, 2).reshape(B, T, width // 3)


def store_rows(rows: Array, precision: str) -> Array:
    """Return rows of keys or values, float32 [..., hs], as a cache of fp32, bf16 or int8 keeps them (`kv_layout`)."""
    if precision == "fp32":
        return rows
    padding = [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % 16)]
    padded = np.pad(rows, padding)
    if precision == "bf16":
        return np.ascontiguousarray(to_bf16(padded).view(np.uint16)[..., 1::2]).view(np.int32)
    q, scales = quantize_rows(padded)
    return np.concatenate([q.view(np.int32), scales.view(np.int32)], -1)


def load_rows(cache: Array, hs: int, precision: str) -> Array:
    """Return the values of the rows of a cache, float32 [..., hs]."""
    if precision == "fp32":
        return cache
    if precision == "bf16":
        return (cache.view(np.uint16).astype(np.uint32) << 16).view(np.float32)[..., :hs]
    scales = np.ascontiguousarray(cache[..., -1:]).view(np.float32)
    return np.ascontiguousarray(cache[..., :-1]).view(np.int8)[..., :hs] * scales


def cached_attention(
    qkv: Array,
    pos: Array,
    keys: Array,
    values: Array,
    scale: float,
    *,
    precision: str = "fp32",
    dtype: Float = np.float64,
) -> Array:
    """Append this step's k and v to the caches, in place, and return attention [B, T, C] over all that they hold.

    keys, values: [B, nh, length, elements], rows as `store_rows` gives them. pos [B]: the rows filled before. The
    products are of what the cache holds: rounded keys and values, also those of this step.
    """
    (B, T, width), nh = qkv.shape, keys.shape[1]
    q, k, v = heads_of(qkv, nh)
    out = np.empty(q.shape, dtype)  # [B, nh, T, hs]
    for b in range(B):
        keys[b, :, pos[b] : pos[b] + T] = store_rows(k[b], precision)
        values[b, :, pos[b] : pos[b] + T] = store_rows(v[b], precision)
        for h in range(nh):
            for t in range(T):
                seen_keys, seen_values = (
                    load_rows(cache[b, h, : pos[b] + t + 1], q.shape[-1], precision) for cache in (keys, values)
                )
                out[b, h, t] = attend_query(q[b, h, t], seen_keys, seen_values, scale, False, dtype)
    return out.swapaxes(1, 2).reshape(B, T, width // 3)
