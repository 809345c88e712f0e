"""The numpy kernels against the formulas of what they compute, in float64."""

import numpy as np
import pytest
import torch

from tvm_frontend.kernels.cpu import reference


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype("float32")


def dequantised(precision, x, w):
    """What x [M, K] and w [K, N] count as in a precision, in float64."""
    if precision == "bf16":
        return reference.to_bf16(x).astype("float64"), reference.to_bf16(w).astype("float64")
    if precision == "int8":
        (qx, x_scales), (qw, w_scales) = reference.quantize_rows(x), reference.quantize_columns(w)
        return qx * x_scales.astype("float64"), qw * w_scales.astype("float64")
    (qx, x_scales), (qw, w_scales) = (
        reference.quantize_rows(reference.groups_of(x)),
        reference.quantize_column_groups(w),
    )
    wide_x, wide_w = qx * x_scales.astype("float64"), (qw.astype("float64") - 8) * w_scales
    K, N = w.shape
    return wide_x.reshape(len(x), -1)[:, :K], wide_w.reshape(N, -1)[:, :K].T


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 64, 96), (300, 130, 31), (9, 700, 40)])
def test_the_five_loops_are_a_matrix_product(shape):
    M, K, N = shape
    x, w, bias, residual = normal(M, K), normal(K, N), normal(N), normal(M, N, seed=1)
    expected = np.maximum(x.astype("float64") @ w.astype("float64") + bias, 0) + residual
    found = reference.linear(x, w, bias, activation="relu", residual=residual)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 64, 96), (70, 130, 31)])
def test_quantised_products_are_those_of_the_dequantised_values(precision, shape):
    M, K, N = shape
    x, w = normal(M, K), normal(K, N)
    rounded_x, rounded_w = dequantised(precision, x, w)
    found = reference.linear(x, w, np.zeros(N), precision=precision)
    np.testing.assert_allclose(found, rounded_x @ rounded_w, atol=1e-11)
    # Half a step of the quantiser: bf16 has 8 bits, int8 127 steps up to the absmax, int4 8 of them.
    steps = {"bf16": (2.0**-8, 2.0**-8), "int8": (1 / 127, 1 / 127), "int4": (1 / 127, 1 / 4)}[precision]
    for given, rounded, step in zip((x, w), (rounded_x, rounded_w), steps, strict=True):
        assert np.abs(given - rounded).max() <= step * np.abs(given).max()


def test_bf16_takes_and_keeps_nan_infinity_and_denormals():
    bits = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000, 0x00010000, 0x80018000], np.uint32)
    found = reference.to_bf16(bits.view(np.float32)).view(np.uint32) >> 16
    assert [f"{value:04x}" for value in found] == ["7fc0", "ffc0", "7fc0", "7f80", "0001", "8002"]


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_activations_are_those_of_torch(name):
    x = np.linspace(-12, 12, 1001)
    approximate = {"gelu": "none", "gelu_tanh": "tanh"}[name]
    expected = torch.nn.functional.gelu(torch.from_numpy(x), approximate=approximate).numpy()
    np.testing.assert_allclose(reference.ACTIVATIONS[name](x), expected, rtol=1e-12, atol=1e-15)


def test_layer_norm_is_that_of_torch():
    x, gain, bias = normal(2, 5, 48), normal(48), normal(48, seed=1)
    wide = [torch.from_numpy(each.astype("float64")) for each in (x, gain, bias)]
    expected = torch.nn.functional.layer_norm(wide[0], (48,), *wide[1:], eps=1e-5).numpy()
    np.testing.assert_allclose(reference.layer_norm(x, gain, bias), expected, atol=1e-13)


def attention_of_torch(qkv, nh, scale):
    q, k, v = (torch.from_numpy(part.astype("float64")) for part in reference.heads_of(qkv, nh))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out.transpose(1, 2).reshape(qkv.shape[0], qkv.shape[1], -1).numpy()


def test_causal_attention_is_that_of_torch():
    qkv = normal(2, 17, 3 * 24)
    np.testing.assert_allclose(
        reference.causal_attention(qkv, 3, 0.35), attention_of_torch(qkv, 3, 0.35), rtol=0, atol=1e-13
    )


def test_attention_of_bf16_is_off_by_its_roundings():
    qkv = normal(1, 33, 3 * 16)
    found, exact = reference.causal_attention(qkv, 2, 0.35, bf16=True), attention_of_torch(qkv, 2, 0.35)
    # Scores up to 3 are off by 3 · 2 · 2⁻⁹ of q and k, weights and values by 2⁻⁹ of themselves each.
    assert 2.0**-16 < np.abs(found - exact).max() < 8 * 2.0**-9 * np.abs(qkv).max()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_cached_attention_is_causal_attention_of_what_the_cache_holds(precision):
    nh, hs, length = 2, 20, 30
    qkv = normal(2, 17, 3 * nh * hs)
    caches = [
        np.zeros_like(reference.store_rows(np.zeros((2, nh, length, hs), "float32"), precision)) for _ in range(2)
    ]
    chunks = [
        reference.cached_attention(qkv[:, first:last], np.full(2, first), *caches, hs**-0.5, precision=precision)
        for first, last in [(0, 9), (9, 10), (10, 17)]
    ]
    q, k, v = reference.heads_of(qkv, nh)
    held = [reference.load_rows(reference.store_rows(part, precision), hs, precision) for part in (k, v)]
    rounded = np.concatenate([part.swapaxes(1, 2).reshape(2, 17, nh * hs) for part in (q, *held)], -1)
    expected = reference.causal_attention(rounded, nh, hs**-0.5)
    np.testing.assert_allclose(np.concatenate(chunks, 1), expected, rtol=0, atol=1e-13)
    for given, kept in zip((k, v), held, strict=True):
        assert np.abs(given - kept).max() <= {"fp32": 0, "bf16": 2.0**-8, "int8": 1 / 127}[precision] * 4
