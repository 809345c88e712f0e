import numpy as np
import pytest
from tvm.script import tirx as T

from tvm_frontend.kernels.cpu import reference
from tvm_frontend.kernels.cpu.math import (
    exp2,
    gelu_exact,
    gelu_exact_to_bf16,
    gelu_tanh,
    gelu_tanh_to_bf16,
)

N = 1 << 18


@pytest.fixture
def apply(build):
    """f(function, x): a function of float32 on the vector units, on N values."""

    def run(function, x):
        @T.prim_func(s_tir=True, private=True)
        def kernel(x: T.Buffer((N,), "float32"), out: T.Buffer((N,), "float32")):
            T.func_attr({"tirx.noalias": True})
            for i in range(N // 16):
                for lane in T.vectorized(16):
                    out[i * 16 + lane] = function(x[i * 16 + lane])

        return build(kernel)(np.resize(x, N), shape=(N,))[: len(x)]

    return run


def dense():
    """±100, denser in ±6, and down to the smallest normal number on both sides of zero."""
    tiny = np.geomspace(2e-38, 1, N // 8)
    return np.concatenate([np.linspace(-100, 100, N // 4), np.linspace(-6, 6, N // 2), tiny, -tiny]).astype("float32")


def test_exp2_is_as_close_as_it_says(apply):
    x = np.concatenate([np.linspace(-126, 127.49, N // 2), np.linspace(-1.5, 1.5, N // 2)]).astype("float32")
    expected = reference.exp2(x)
    assert (np.abs(apply(exp2, x) - expected) / expected).max() < 2e-7


def test_exp2_of_special_values(apply):
    found = apply(exp2, np.float32([0.0, -0.0, 1, -126, -127, -1e30, -np.inf, np.nan]))
    smallest = 2.0**-126
    np.testing.assert_array_equal(found, np.float32([1, 1, 2, smallest, smallest, smallest, smallest, np.nan]))


@pytest.mark.parametrize(
    ("gelu", "bound"), [(gelu_tanh, 2e-7), (gelu_exact, 2e-7), (gelu_tanh_to_bf16, 5e-5), (gelu_exact_to_bf16, 5e-5)]
)
def test_gelu_is_as_close_as_it_says(apply, gelu, bound):
    x = dense()
    wide = x.astype("float64")
    expected = reference.ACTIVATIONS["gelu_tanh" if gelu in (gelu_tanh, gelu_tanh_to_bf16) else "gelu"](wide)
    assert (np.abs(apply(gelu, x) - expected) / np.maximum(1, np.abs(wide))).max() < bound


@pytest.mark.parametrize("gelu", [gelu_tanh_to_bf16, gelu_exact_to_bf16])
def test_gelu_for_bfloat16_far_from_zero_and_at_it(apply, gelu):
    x = np.float32([0.0, -0.0, 100, 1e18, np.inf, np.nan])
    np.testing.assert_allclose(apply(gelu, x), x, rtol=2e-6)
    x = np.float32([-4.3, -100, -1e18])
    assert (np.abs(apply(gelu, x)) < 2e-6 * np.abs(x)).all()


@pytest.mark.parametrize("gelu", [gelu_tanh, gelu_exact])
def test_gelu_of_tiny_values_is_half_of_them(apply, gelu):
    x = np.geomspace(2e-38, 1e-8, 1000).astype("float32")
    np.testing.assert_allclose(apply(gelu, x), x / 2, rtol=1e-6)
    np.testing.assert_allclose(apply(gelu, -x), -x / 2, rtol=1e-6)


@pytest.mark.parametrize("gelu", [gelu_tanh, gelu_exact])
def test_gelu_of_special_values(apply, gelu):
    found = apply(gelu, np.float32([0.0, -0.0, 1e4, -1e4, 1e18, -1e18, np.inf, np.nan]))
    np.testing.assert_allclose(found, np.float32([0, 0, 1e4, 0, 1e18, 0, np.inf, np.nan]), atol=1e-15)
