import numpy as np
import pytest
import tvm

from tvm_frontend.kernels.cpu.cached_attention import cached_attention
from tvm_frontend.kernels.cpu.formats import arithmetic_of
from tvm_frontend.kernels.cpu.kv_layout import cache_rows


def attend(qkv, pos, keys, values, scale):
    """In float64: the output [B, T, C], and the caches [B, nh, length, hs] with the new rows."""
    B, T, width = qkv.shape
    _, nh, length, hs = keys.shape
    q, k, v = (part.reshape(B, T, nh, hs).swapaxes(1, 2) for part in np.split(qkv.astype("float64"), 3, -1))
    keys, values = keys.astype("float64"), values.astype("float64")
    for b in range(B):
        keys[b, :, pos[b] : pos[b] + T] = k[b]
        values[b, :, pos[b] : pos[b] + T] = v[b]
    last = pos[:, None] + np.arange(T)  # [B, T]
    seen = np.arange(length) <= last[:, None, :, None]  # [B, 1, T, length]
    scores = np.where(seen, scale * q @ np.nan_to_num(keys).swapaxes(2, 3), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ np.nan_to_num(values)
    return mixed.swapaxes(1, 2).reshape(B, T, width // 3), keys, values


def values_of(cache, hs):
    """What rows of a cache stand for, float32 [B, nh, length, hs]: int8 with a scale, bfloat16 or float32."""
    if cache.dtype == np.float32:
        return cache
    words, full = cache.shape[-1], -(-hs // 16) * 16
    if words == full // 2:
        return (cache.view(np.uint16).astype(np.uint32) << 16).view(np.float32)[..., :hs]
    assert words == full // 4 + 1
    scales = np.ascontiguousarray(cache[..., -1:]).view(np.float32)
    return np.ascontiguousarray(cache[..., :-1]).view(np.int8)[..., :hs] * scales


def rounded(rows, words):
    """float32 [..., hs] as rows of so many words of a cache that is not float32."""
    hs = rows.shape[-1]
    full = np.zeros((*rows.shape[:-1], -(-hs // 16) * 16), np.float32)
    full[..., :hs] = rows
    if words == full.shape[-1] // 2:
        bits = full.view(np.uint32)
        return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16).view(np.int32)
    largest = np.abs(full).max(-1, keepdims=True)
    scales = largest * np.float32(1 / 127)
    whole = np.rint(full * (np.float32(127) / largest)).astype(np.int8)
    return np.concatenate([whole.view(np.int32), scales.view(np.int32)], -1)


def check(kernel, rows, shape, pos, T, scale):
    B, nh, length, hs = shape
    rng = np.random.default_rng([*shape, *pos, T])
    qkv = rng.normal(size=(B, T, 3 * nh * hs)).astype("float32")
    narrow = rows.dtype != "float32"
    caches = []
    for _ in range(2):  # what no token has written must not be read: it is NaN
        cache = np.full((B, nh, length, rows.words), np.nan, "float32").view(rows.dtype)
        for b in range(B):
            values = rng.normal(size=(nh, pos[b], hs)).astype("float32")
            cache[b, :, : pos[b]] = rounded(values, rows.words) if narrow else values
        caches.append(cache)
    new = [part.reshape(B, T, nh, hs).swapaxes(1, 2) for part in np.split(qkv, 3, -1)[1:]]
    if narrow:
        new = [values_of(rounded(part, rows.words), hs) for part in new]
    seen_qkv = np.concatenate(
        [qkv[..., : nh * hs], *(part.swapaxes(1, 2).reshape(B, T, nh * hs) for part in new)], axis=-1
    )
    expected, *written = attend(seen_qkv, np.array(pos), *(values_of(cache, hs) for cache in caches), scale)
    tensors = [tvm.runtime.tensor(cache) for cache in caches]
    out = tvm.runtime.tensor(np.full((B, T, nh * hs), np.nan, "float32"))
    kernel(tvm.runtime.tensor(qkv), tvm.runtime.tensor(np.array(pos, "int64")), *tensors, out)
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=2.0**-24 * (60 + hs + length))
    for tensor, cache, before in zip(tensors, written, caches, strict=True):
        after = tensor.numpy()
        np.testing.assert_array_equal(values_of(after, hs), cache.astype("float32"))
        for b in range(B):  # no other row has changed
            others = np.delete(np.arange(length), np.arange(pos[b], pos[b] + T))
            np.testing.assert_array_equal(after[b, :, others].view("int32"), before[b, :, others].view("int32"))


SHAPES = [(1, 32, 70), (3, 20, 41), (2, 8, 9), (2, 7, 40), (1, 64, 130)]
NARROW = [(3, 20, 41), (1, 64, 130)]


@pytest.fixture(
    scope="module",
    params=[*(("fp32", *shape) for shape in SHAPES), *((low, *shape) for low in ("bf16", "int8") for shape in NARROW)],
    ids=str,
)
def built(request, target, tile):
    precision, nh, hs, length = request.param
    rows = cache_rows(hs, arithmetic_of(precision, target), tile)
    kernel = cached_attention(nh, length, tile, rows, hs**-0.5).with_attr("global_symbol", "run")
    return tvm.compile(tvm.IRModule({"run": kernel}), target.to_tvm())["run"], rows, nh, hs, length


@pytest.mark.slow
def test_one_token_after_any_number(built):
    kernel, rows, nh, hs, length = built
    for filled in (0, 1, 3, 4, 7, length - 1):
        check(kernel, rows, (1, nh, length, hs), [filled], 1, hs**-0.5)


def test_sequences_of_different_length(built):
    kernel, rows, nh, hs, length = built
    check(kernel, rows, (3, nh, length, hs), [0, length - 1, 5], 1, hs**-0.5)
    check(kernel, rows, (3, nh, length, hs), [2, 0, length - 3], 3, hs**-0.5)
    check(kernel, rows, (2, nh, length, hs), [1, length - 8], 8, hs**-0.5)


def test_chunks_of_any_length(built):
    kernel, rows, nh, hs, length = built
    for T in (2, 4, 5, 8, min(33, length), length):
        for filled in {0, (length - T) // 2, length - T}:
            check(kernel, rows, (1, nh, length, hs), [filled], T, hs**-0.5)
