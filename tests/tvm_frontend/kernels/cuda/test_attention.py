from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from tvm_frontend.kernels.cuda import CudaKernels

DTYPES = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16}
UNIT = {"bf16": 2.0**-8, "fp16": 2.0**-11}


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, pos: int = 0) -> np.ndarray:
    """Of one head in float64: q [T, hs] behind pos tokens, k and v [pos + T, hs]."""
    scores = q @ k.T * scale
    scores[np.arange(len(k)) > pos + np.arange(len(q))[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def heads(qkv: np.ndarray, nh: int) -> np.ndarray:
    """qkv [B, T, 3C] → [3, B, nh, T, hs]."""
    B, T, width = qkv.shape
    return qkv.reshape(B, T, 3, nh, width // 3 // nh).transpose(2, 0, 3, 1, 4)


def tolerance(v: np.ndarray, unit: float) -> float:
    """Weights and result are rounded to the precision; sums of weights that add up to 1 are in float32."""
    return 2.5 * unit * float(np.abs(v).max())


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "nh", "hs"), [(1, 1, 2, 64), (3, 17, 2, 32), (1, 130, 1, 64), (2, 64, 1, 128), (1, 70, 3, 48)]
)
def test_causal_attention(
    run: Callable, launcher, within: Callable, precision: str, B: int, T: int, nh: int, hs: int
) -> None:
    C = nh * hs
    qkv = np.random.default_rng().normal(size=(B, T, 3 * C)).astype(np.float32).astype(DTYPES[precision])
    kernel = CudaKernels(precision, launcher).causal_attention(nh, hs, hs**-0.5)
    found = run(kernel, qkv, shape=(B, T, C), dtype=str(qkv.dtype))
    q, k, v = heads(qkv.astype(np.float64), nh)
    expected = np.stack([[attention(q[b, h], k[b, h], v[b, h], hs**-0.5) for h in range(nh)] for b in range(B)])
    assert within(found, expected.transpose(0, 2, 1, 3).reshape(B, T, C), tolerance(v, UNIT[precision]))


@pytest.mark.parametrize("T", [1, 2, 17, 70])
@pytest.mark.parametrize(("precision", "nh", "hs"), [("bf16", 2, 64), ("fp16", 1, 80), ("bf16", 1, 128)])
def test_over_a_cache(
    run_in_place: Callable, launcher, within: Callable, precision: str, nh: int, hs: int, T: int
) -> None:
    """Sequences of different length; what lies beyond each is NaN, and only the new rows are written."""
    C, length, rng = nh * hs, 300, np.random.default_rng()
    pos = np.array([0, 127, 210])
    B = len(pos)
    dtype = DTYPES[precision]
    qkv = rng.normal(size=(B, T, 3 * C)).astype(np.float32).astype(dtype)
    caches = [rng.normal(size=(B, nh, length, hs)).astype(np.float32).astype(dtype) for _ in range(2)]
    for cache in caches:
        for b in range(B):
            cache[b, :, pos[b] :] = np.nan
    kernel = CudaKernels(precision, launcher).cached_attention(nh, hs, length, hs**-0.5)
    given = [cache.view(np.uint16) for cache in caches]
    found, *after = run_in_place(kernel, [qkv, pos], given, shape=(B, T, C), dtype=str(qkv.dtype))
    q, k, v = heads(qkv, nh)
    for cache, new, got in zip(caches, (k, v), after, strict=True):
        for b in range(B):
            cache[b, :, pos[b] : pos[b] + T] = new[b]
        np.testing.assert_array_equal(got, cache.view(np.uint16))
    keys, values = (cache.astype(np.float64) for cache in caches)
    for b in range(B):
        end = pos[b] + T
        expected = [
            attention(q[b, h].astype(np.float64), keys[b, h, :end], values[b, h, :end], hs**-0.5, int(pos[b]))
            for h in range(nh)
        ]
        expected = np.stack(expected).transpose(1, 0, 2).reshape(T, C)
        assert within(found[b], expected, tolerance(values[b, :, :end], UNIT[precision]))


def test_heads_that_tiles_do_not_divide_are_left_to_tvm() -> None:
    kernels = CudaKernels("bf16")
    assert kernels.causal_attention(2, 20, 0.2) is None
    assert kernels.causal_attention(2, 256, 0.1) is None
    assert kernels.cached_attention(2, 20, 64, 0.2) is None
    assert CudaKernels("tf32").causal_attention(2, 64, 0.1) is None
