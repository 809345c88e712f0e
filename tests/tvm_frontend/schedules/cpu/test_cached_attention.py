import numpy as np
import pytest
import tvm

from tvm_frontend.schedules.cpu.cached_attention import cached_attention


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


def check(kernel, shape, pos, T, scale):
    B, nh, length, hs = shape
    rng = np.random.default_rng([*shape, *pos, T])
    qkv = rng.normal(size=(B, T, 3 * nh * hs)).astype("float32")
    caches = [np.full(shape, np.nan, "float32") for _ in range(2)]  # what no token has written must not be read
    for cache in caches:
        for b in range(B):
            cache[b, :, : pos[b]] = rng.normal(size=(nh, pos[b], hs))
    expected, *written = attend(qkv, np.array(pos), *caches, scale)
    tensors = [tvm.runtime.tensor(cache) for cache in caches]
    out = tvm.runtime.tensor(np.full((B, T, nh * hs), np.nan, "float32"))
    kernel(tvm.runtime.tensor(qkv), tvm.runtime.tensor(np.array(pos, "int64")), *tensors, out)
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=2.0**-24 * (60 + hs + length))
    for tensor, cache in zip(tensors, written, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), cache.astype("float32"))


@pytest.fixture(scope="module", params=[(1, 32, 70), (3, 20, 41), (2, 8, 9), (2, 7, 40), (1, 64, 130)])
def built(request, target, tile):
    nh, hs, length = request.param
    kernel = cached_attention(nh, hs, length, tile, hs**-0.5).with_attr("global_symbol", "run")
    return tvm.compile(tvm.IRModule({"run": kernel}), target.to_tvm())["run"], nh, hs, length


def test_one_token_after_any_number(built):
    kernel, nh, hs, length = built
    for filled in (0, 1, 3, 4, 7, length - 1):
        check(kernel, (1, nh, length, hs), [filled], 1, hs**-0.5)


def test_sequences_of_different_length(built):
    kernel, nh, hs, length = built
    check(kernel, (3, nh, length, hs), [0, length - 1, 5], 1, hs**-0.5)
    check(kernel, (3, nh, length, hs), [2, 0, length - 3], 3, hs**-0.5)
    check(kernel, (2, nh, length, hs), [1, length - 8], 8, hs**-0.5)


def test_chunks_of_any_length(built):
    kernel, nh, hs, length = built
    for T in (2, 4, 5, 8, min(33, length), length):
        for filled in {0, (length - T) // 2, length - T}:
            check(kernel, (1, nh, length, hs), [filled], T, hs**-0.5)
