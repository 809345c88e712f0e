import numpy as np
import pytest
import tvm

from tvm_frontend.kernels.cpu import reference
from tvm_frontend.kernels.cpu.cached_attention import cached_attention
from tvm_frontend.kernels.cpu.formats import gemm_format
from tvm_frontend.kernels.cpu.kv_layout import kv_layout


def check(kernel, layout, precision, shape, pos, T, scale):
    B, nh, length, hs = shape
    rng = np.random.default_rng([*shape, *pos, T])
    qkv = rng.normal(size=(B, T, 3 * nh * hs)).astype("float32")
    caches = []
    for _ in range(2):  # what no token has written must not be read: it is NaN
        cache = np.full((B, nh, length, layout.elements), np.nan, "float32").view(layout.dtype)
        for b in range(B):
            cache[b, :, : pos[b]] = reference.store_rows(rng.normal(size=(nh, pos[b], hs)).astype("float32"), precision)
        caches.append(cache)
    written = [cache.copy() for cache in caches]
    expected = reference.cached_attention(qkv, np.array(pos), *written, scale, precision=precision)
    tensors = [tvm.runtime.tensor(cache) for cache in caches]
    out = tvm.runtime.tensor(np.full((B, T, nh * hs), np.nan, "float32"))
    kernel(tvm.runtime.tensor(qkv), tvm.runtime.tensor(np.array(pos, "int64")), *tensors, out)
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=2.0**-24 * (60 + hs + length))
    for tensor, cache, before in zip(tensors, written, caches, strict=True):
        after = tensor.numpy()
        np.testing.assert_array_equal(*(reference.load_rows(each, hs, precision) for each in (after, cache)))
        for b in range(B):  # no other row has changed
            others = np.delete(np.arange(length), np.arange(pos[b], pos[b] + T))
            np.testing.assert_array_equal(after[b, :, others].view("int32"), before[b, :, others].view("int32"))


SHAPES = [(1, 32, 70), (3, 20, 41), (2, 8, 9), (2, 7, 40), (1, 64, 130)]
ROUNDED = [(3, 20, 41), (1, 64, 130)]


@pytest.fixture(
    scope="module",
    params=[*(("fp32", *shape) for shape in SHAPES), *((low, *shape) for low in ("bf16", "int8") for shape in ROUNDED)],
    ids=str,
)
def built(request, target, tile):
    precision, nh, hs, length = request.param
    layout = kv_layout(hs, gemm_format(precision, target), tile)
    kernel = cached_attention(nh, length, tile, layout, hs**-0.5).with_attr("global_symbol", "run")
    return tvm.compile(tvm.IRModule({"run": kernel}), target.to_tvm())["run"], layout, precision, nh, hs, length


@pytest.mark.slow
def test_one_token_after_any_number(built):
    kernel, layout, precision, nh, hs, length = built
    for filled in (0, 1, 3, 4, 7, length - 1):
        check(kernel, layout, precision, (1, nh, length, hs), [filled], 1, hs**-0.5)


def test_sequences_of_different_length(built):
    kernel, layout, precision, nh, hs, length = built
    check(kernel, layout, precision, (3, nh, length, hs), [0, length - 1, 5], 1, hs**-0.5)
    check(kernel, layout, precision, (3, nh, length, hs), [2, 0, length - 3], 3, hs**-0.5)
    check(kernel, layout, precision, (2, nh, length, hs), [1, length - 8], 8, hs**-0.5)


def test_chunks_of_any_length(built):
    kernel, layout, precision, nh, hs, length = built
    for T in (2, 4, 5, 8, min(33, length), length):
        for filled in {0, (length - T) // 2, length - T}:
            check(kernel, layout, precision, (1, nh, length, hs), [filled], T, hs**-0.5)
