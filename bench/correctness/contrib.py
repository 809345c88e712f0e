"""Operators of ONNX Runtime that ONNX does not define, for ONNX's reference evaluator.

Each computes in the type of its inputs. They are written from ONNX Runtime's documentation of its contrib operators.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from onnx.reference.op_run import OpRun

from gpt.cli import UserError

Array = np.ndarray
Product = Callable[[Array, Array, str], Array]  # of two matrices, or of many; the third is the name of the result
DOMAIN = "com.microsoft"
BYTE_STEPS = 255  # between the least and the largest of 8 bits


def erf(x: Array) -> Array:
    """Compute the error function in the precision of x."""
    return torch.erf(torch.from_numpy(np.ascontiguousarray(x))).numpy().reshape(x.shape)


def gelu(x: Array, *, tanh: bool = False) -> Array:
    """Compute GELU, exactly or by its approximation with tanh."""
    half, one = x.dtype.type(0.5), x.dtype.type(1)
    if tanh:
        return half * x * (one + np.tanh(x.dtype.type(np.sqrt(2 / np.pi)) * (x + x.dtype.type(0.044715) * x**3)))
    return half * x * (one + erf(x * x.dtype.type(np.sqrt(0.5))))


def sigmoid(x: Array) -> Array:
    """Compute 1/(1 + e⁻ˣ), without an overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def dynamically_quantized(x: Array) -> tuple[Array, Array, Array]:
    """Round x to uint8 between its least and its largest element, 0 included; give the scale and the zero point too."""
    low, high = min(x.min(), x.dtype.type(0)), max(x.max(), x.dtype.type(0))
    scale = np.asarray((high - low) / BYTE_STEPS if high > low else 1, x.dtype)
    zero = np.clip(np.rint(-low / scale), 0, BYTE_STEPS)
    return np.clip(np.rint(x / scale) + zero, 0, BYTE_STEPS).astype(np.uint8), scale, np.asarray(zero, np.uint8)


class Op(OpRun):
    """An operator of ONNX Runtime's, or one with products of matrices, which `product` computes."""

    product: ClassVar[Product] = staticmethod(lambda a, b, name: np.matmul(a, b))

    def product_of(self, a: Array, b: Array) -> Array:
        """Multiply two matrices, or many."""
        return type(self).product(a, b, self.onnx_node.output[0])

    def results(self, *values: Array | None) -> tuple[Any, ...]:
        """Return as many results as the node has; the evaluator takes None where a name is empty."""
        empty = np.zeros(0, np.float32)
        return tuple(empty if value is None else value for value in values[: len(self.onnx_node.output)])


class MicrosoftOp(Op):
    """An operator of the domain com.microsoft, which some of ONNX's own share a name with."""

    op_domain = DOMAIN
    op_schema = None  # or it would get the attributes of the other


class BiasGelu(MicrosoftOp):
    """gelu(x + bias)."""

    def _run(self, x: Array, bias: Array) -> tuple[Array]:
        return (gelu(x + bias),)


class FastGelu(MicrosoftOp):
    """gelu(x + bias) by tanh."""

    def _run(self, x: Array, bias: Array | None = None) -> tuple[Array]:
        return (gelu(x if bias is None else x + bias, tanh=True),)


class Gelu(MicrosoftOp):
    """gelu(x)."""

    def _run(self, x: Array) -> tuple[Array]:
        return (gelu(x),)


class QuickGelu(MicrosoftOp):
    """x · sigmoid(alpha · x)."""

    def _run(self, x: Array, alpha: float = 1.702) -> tuple[Array]:
        return (x * sigmoid(x.dtype.type(alpha) * x),)


class SimplifiedLayerNormalization(Op):
    """x by its root mean square. ONNX Runtime writes it in ONNX's own domain."""

    def _run(
        self, x: Array, scale: Array, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
    ) -> tuple[Array, ...]:
        axes = tuple(range(axis % x.ndim, x.ndim))
        inverse = 1 / np.sqrt((x**2).mean(axes, keepdims=True) + x.dtype.type(epsilon))
        return self.results(x * inverse * scale, inverse)


class SkipLayerNormalization(MicrosoftOp):
    """LayerNorm of a sum, which is the fourth result."""

    def _run(
        self,
        x: Array,
        skip: Array,
        gamma: Array,
        beta: Array | None = None,
        bias: Array | None = None,
        epsilon: float = 1e-12,
    ) -> tuple[Array, ...]:
        total = x + skip if bias is None else x + skip + bias
        mean = total.mean(-1, keepdims=True)
        inverse = 1 / np.sqrt(((total - mean) ** 2).mean(-1, keepdims=True) + x.dtype.type(epsilon))
        y = (total - mean) * inverse * gamma
        return self.results(y if beta is None else y + beta, mean, inverse, total)


class SkipSimplifiedLayerNormalization(MicrosoftOp):
    """A sum, which is the fourth result, by its root mean square."""

    def _run(
        self, x: Array, skip: Array, gamma: Array, bias: Array | None = None, epsilon: float = 1e-5
    ) -> tuple[Array, ...]:
        total = x + skip if bias is None else x + skip + bias
        inverse = 1 / np.sqrt((total**2).mean(-1, keepdims=True) + x.dtype.type(epsilon))
        return self.results(total * inverse * gamma, np.zeros_like(inverse), inverse, total)


class FusedMatMul(MicrosoftOp):
    """A product of matrices that may be transposed, times alpha."""

    def _run(
        self,
        a: Array,
        b: Array,
        alpha: float = 1.0,
        transA: int = 0,
        transB: int = 0,
        transBatchA: int = 0,
        transBatchB: int = 0,
    ) -> tuple[Array]:
        if transBatchA or transBatchB:
            raise UserError("no float64 reference: FusedMatMul that transposes batches is not known here")
        a, b = (x.swapaxes(-1, -2) if turned else x for x, turned in ((a, transA), (b, transB)))
        return (self.product_of(a, b) * a.dtype.type(alpha),)


class MatMulNBits(MicrosoftOp):
    """A product with weights of few bits, which have a scale, and maybe a zero point, for each block of a column."""

    def _run(
        self,
        a: Array,
        packed: Array,
        scales: Array,
        zero_points: Array | None = None,
        g_idx: Array | None = None,
        bias: Array | None = None,
        K: int = 0,
        N: int = 0,
        bits: int = 4,
        block_size: int = 32,
        accuracy_level: int = 0,
        weight_prepacked: int = 0,
    ) -> tuple[Array]:
        if (g_idx is not None and g_idx.size) or weight_prepacked:
            raise UserError("no float64 reference: MatMulNBits with g_idx or packed anew is not known here")
        blocks = -(-K // block_size)
        numbers = _unpacked(packed.reshape(N, blocks, -1), bits, block_size)  # [N, blocks, block_size]
        zeros: Array = np.full((N, blocks), 2 ** (bits - 1), np.float64)
        if zero_points is not None and zero_points.size:
            if zero_points.dtype == np.uint8:
                zeros = _unpacked(zero_points.reshape(N, -1), bits, blocks)
            else:
                zeros = zero_points.reshape(N, blocks)
        weights = (numbers - zeros[..., None]) * scales.reshape(N, blocks, 1).astype(np.float64)
        weights = weights.reshape(N, -1)[:, :K].T.astype(a.dtype)  # [K, N]
        y = self.product_of(a, weights)
        return (y if bias is None else y + bias,)


class DynamicQuantizeMatMul(MicrosoftOp):
    """A product with weights of 8 bits, of what is rounded to 8 bits for it."""

    def _run(
        self, a: Array, b: Array, b_scale: Array, b_zero: Array | None = None, bias: Array | None = None
    ) -> tuple[Array]:
        rounded, scale, zero = dynamically_quantized(a)
        y = _of_whole_numbers(rounded, b, zero, b_zero).astype(a.dtype) * scale * b_scale
        return (y if bias is None else y + bias,)


class MatMulIntegerToFloat(MicrosoftOp):
    """A product of whole numbers, times the scales of both."""

    def _run(
        self,
        a: Array,
        b: Array,
        a_scale: Array,
        b_scale: Array,
        a_zero: Array | None = None,
        b_zero: Array | None = None,
        bias: Array | None = None,
    ) -> tuple[Array]:
        y = _of_whole_numbers(a, b, a_zero, b_zero).astype(a_scale.dtype) * a_scale * b_scale
        return (y if bias is None else y + bias,)


class RotaryEmbedding(MicrosoftOp):
    """Turns pairs of a head's numbers by an angle that grows with the position."""

    def _run(
        self,
        x: Array,
        positions: Array,
        cos: Array,
        sin: Array,
        interleaved: int = 0,
        num_heads: int = 0,
        rotary_embedding_dim: int = 0,
        scale: float = 1.0,
        is_packed_batching: int = 0,
    ) -> tuple[Array]:
        flat = x.ndim == 3
        size = cos.shape[1] * 2 if not num_heads else x.shape[-1] // num_heads if flat else x.shape[-1]
        heads = _heads(x, x.shape[-1] // size) if flat else x  # [B, nh, T, hs]
        B, T = heads.shape[0], heads.shape[2]
        if positions.size == 1:
            positions = np.broadcast_to(positions.reshape(-1)[0] + np.arange(T), (B, T))
        turned = _turned(heads, positions.reshape(B, T), cos, sin, interleaved)
        return (_joined(turned) if flat else turned,)


class Attention(MicrosoftOp):
    """Attention with the product before it: x [B, T, C] by weights [C, 3C]."""

    def _run(
        self,
        x: Array,
        weights: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        past: Array | None = None,
        attention_bias: Array | None = None,
        past_length: Array | None = None,
        num_heads: int = 1,
        unidirectional: int = 0,
        qkv_hidden_sizes: list[int] | None = None,
        scale: float = 0.0,
        mask_filter_value: float = -10000.0,
        do_rotary: int = 0,
        past_present_share_buffer: int = 0,
        rotary_embedding_dim: int = 0,
    ) -> tuple[Any, ...]:
        if do_rotary or past_present_share_buffer:
            raise UserError("no float64 reference: Attention with rotary positions or a shared past is not known here")
        y = self.product_of(x, weights)
        y = y if bias is None else y + bias
        sizes = qkv_hidden_sizes or [y.shape[-1] // 3] * 3
        q, k, v = (_heads(part, num_heads) for part in np.split(y, np.cumsum(sizes)[:2], -1))
        if past is not None and past.size:
            k, v = np.concatenate([past[0], k], 2), np.concatenate([past[1], v], 2)
        added = _padding(mask, q, k, mask_filter_value)
        added = added if attention_bias is None else added + attention_bias
        out = _attend(q, k, v, added + (_causal(q, k) if unidirectional else 0), scale)
        return self.results(_joined(out), np.stack([k, v]) if len(self.onnx_node.output) > 1 else None)


class MultiHeadAttention(MicrosoftOp):
    """Attention over queries [B, T, C], keys and values [B, S, C] or [B, nh, S, hs], or all of them packed."""

    def _run(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        bias: Array | None = None,
        mask: Array | None = None,
        attention_bias: Array | None = None,
        past_key: Array | None = None,
        past_value: Array | None = None,
        past_length: Array | None = None,
        cache_indirection: Array | None = None,
        num_heads: int = 1,
        scale: float = 0.0,
        mask_filter_value: float = -10000.0,
        unidirectional: int = 0,
    ) -> tuple[Any, ...]:
        if past_length is not None or cache_indirection is not None:
            raise UserError("no float64 reference: MultiHeadAttention over a shared past is not known here")
        if query.ndim == 5:  # [B, T, nh, 3, hs]
            q, k, v = (query[:, :, :, part].transpose(0, 2, 1, 3) for part in range(3))
        elif key is not None and key.ndim == 5:  # [B, S, nh, 2, hs]
            q = _heads(query, num_heads)
            k, v = (key[:, :, :, part].transpose(0, 2, 1, 3) for part in range(2))
        else:
            if key is None or value is None:
                raise UserError("no float64 reference: MultiHeadAttention without keys is not known here")
            q, k, v = (x if x.ndim == 4 else _heads(x, num_heads) for x in (query, key, value))
        if bias is not None:
            sizes = np.cumsum([x.shape[1] * x.shape[3] for x in (q, k, v)])[:2]
            q, k, v = (
                x + part.reshape(1, x.shape[1], 1, x.shape[3])
                for x, part in zip((q, k, v), np.split(bias, sizes), strict=True)
            )
        if past_key is not None and past_value is not None:
            k, v = np.concatenate([past_key, k], 2), np.concatenate([past_value, v], 2)
        added = _padding(mask, q, k, mask_filter_value)
        added = added if attention_bias is None else added + attention_bias
        out = _attend(q, k, v, added + (_causal(q, k) if unidirectional else 0), scale)
        return self.results(_joined(out), k, v)


class GroupQueryAttention(MicrosoftOp):
    """Causal attention of which several heads share keys and values, each sequence of a length of its own."""

    def _run(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        past_key: Array | None = None,
        past_value: Array | None = None,
        last: Array | None = None,
        total: Array | None = None,
        cos: Array | None = None,
        sin: Array | None = None,
        positions: Array | None = None,
        attention_bias: Array | None = None,
        head_sink: Array | None = None,
        *others: Array | None,
        num_heads: int = 1,
        kv_num_heads: int = 1,
        scale: float = 0.0,
        softcap: float = 0.0,
        local_window_size: int = -1,
        do_rotary: int = 0,
        rotary_interleaved: int = 0,
        smooth_softmax: int = 0,
        **unknown: Any,
    ) -> tuple[Any, ...]:
        if head_sink is not None or smooth_softmax or last is None or any(other is not None for other in others):
            raise UserError("no float64 reference: GroupQueryAttention of this kind is not known here")
        B, T = query.shape[:2]
        if key is None or value is None:  # all are in the query
            size = query.shape[2] // (num_heads + 2 * kv_num_heads)
            query, key, value = np.split(query, [num_heads * size, (num_heads + kv_num_heads) * size], 2)
        q, k, v = _heads(query, num_heads), _heads(key, kv_num_heads), _heads(value, kv_num_heads)
        lengths = last.reshape(-1).astype(np.int64) + 1  # of each sequence, with its past
        longest = int(total.reshape(-1)[0]) if total is not None else int(lengths.max())
        before = np.zeros(B, np.int64) if longest == T else lengths - T
        if do_rotary and cos is not None and sin is not None:
            at = before[:, None] + np.arange(T) if positions is None else positions.reshape(B, T)
            at = np.clip(at, 0, len(cos) - 1)
            q, k = (_turned(x, at, cos, sin, rotary_interleaved) for x in (q, k))
        rows = max(longest, 0 if past_key is None else past_key.shape[2])
        keys, values = (np.zeros((B, kv_num_heads, rows, x.shape[3]), x.dtype) for x in (k, v))
        out = np.zeros((B, num_heads, T, v.shape[3]), v.dtype)
        for b in range(B):
            start, end = before[b], before[b] + T
            for kept, past, new in ((keys, past_key, k), (values, past_value, v)):
                if past is not None:
                    kept[b, :, :start] = past[b, :, :start]
                kept[b, :, start:end] = new[b]
            my_keys, my_values = (
                np.repeat(kept[b : b + 1, :, :end], num_heads // kv_num_heads, axis=1) for kept in (keys, values)
            )
            added = _causal(q[b : b + 1], my_keys, local_window_size)
            if attention_bias is not None:
                added = added + attention_bias[b if len(attention_bias) > 1 else 0][None, :, :, :end]
            out[b] = _attend(q[b : b + 1], my_keys, my_values, added, scale, softcap)[0]
        return self.results(_joined(out), keys, values)


CONTRIB: tuple[type[Op], ...] = (
    BiasGelu,
    FastGelu,
    Gelu,
    QuickGelu,
    SimplifiedLayerNormalization,
    type("SimplifiedLayerNormalization", (SimplifiedLayerNormalization,), {"op_domain": DOMAIN, "op_schema": None}),
    SkipLayerNormalization,
    SkipSimplifiedLayerNormalization,
    FusedMatMul,
    MatMulNBits,
    DynamicQuantizeMatMul,
    MatMulIntegerToFloat,
    RotaryEmbedding,
    Attention,
    MultiHeadAttention,
    GroupQueryAttention,
)


def _heads(x: Array, heads: int) -> Array:
    """Split [B, T, C] in heads [B, nh, T, hs]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def _joined(x: Array) -> Array:
    """Join heads [B, nh, T, hs] to [B, T, C]."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def _attend(q: Array, k: Array, v: Array, added: Array, scale: float, softcap: float = 0.0) -> Array:
    """Compute attention over heads [B, nh, T, hs], with something added to the scores [B, nh, T, S]."""
    scores = q @ k.swapaxes(-1, -2) * q.dtype.type(scale or 1 / np.sqrt(q.shape[-1]))
    if softcap:
        scores = np.tanh(scores / q.dtype.type(softcap)) * q.dtype.type(softcap)
    scores = scores + added.astype(scores.dtype)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def _causal(q: Array, k: Array, window: int = -1) -> Array:
    """Give what hides keys after each query [1, 1, T, S], and those that `window` tokens or more are before it."""
    T, S = q.shape[2], k.shape[2]
    behind = np.arange(S - T, S)[:, None] - np.arange(S)  # how far a key is before a query
    hidden = (behind < 0) | (behind >= window if window > 0 else False)
    return np.where(hidden, -np.inf, 0.0)[None, None]


def _padding(mask: Array | None, q: Array, k: Array, hidden: float) -> Array:
    """Give what hides padding [B, 1, T or 1, S], of a mask [B, S] or [B, T, S], or of the lengths of sequences [B]."""
    B, T, S = len(q), q.shape[2], k.shape[2]
    if mask is None or not mask.size:
        return np.zeros((1, 1, 1, 1))
    if mask.shape == (B,):
        mask = np.arange(S) < mask[:, None]
    if mask.shape not in ((B, S), (B, T, S)):
        raise UserError(f"no float64 reference: a mask of shape {list(mask.shape)} of attention is not known here")
    return np.where(mask.reshape(B, 1, -1, S) > 0, 0.0, hidden)


def _turned(x: Array, positions: Array, cos: Array, sin: Array, interleaved: int) -> Array:
    """Turn the first numbers of heads [B, nh, T, hs] by the angles of positions [B, T]; tables are [M, half]."""
    half = cos.shape[1]
    c, s = cos[positions][:, None], sin[positions][:, None]  # [B, 1, T, half]
    first, rest = x[..., : 2 * half], x[..., 2 * half :]
    left, right = (first[..., 0::2], first[..., 1::2]) if interleaved else (first[..., :half], first[..., half:])
    turned = left * c - right * s, right * c + left * s
    joined = np.stack(turned, -1).reshape(first.shape) if interleaved else np.concatenate(turned, -1)
    return np.concatenate([joined, rest], -1)


def _unpacked(packed: Array, bits: int, count: int) -> Array:
    """Unpack numbers of 2, 4 or 8 bits along the last axis, the lowest bits first, as float64."""
    parts = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(*packed.shape[:-1], -1)[..., :count].astype(np.float64)


def _of_whole_numbers(a: Array, b: Array, a_zero: Array | None, b_zero: Array | None) -> Array:
    """Multiply matrices of whole numbers, less their zero points, exactly."""
    wide = [x.astype(np.float64) for x in (a, b)]
    for side, zero in enumerate((a_zero, b_zero)):
        if zero is not None:
            wide[side] = wide[side] - zero.astype(np.float64)
    return wide[0] @ wide[1]
