from collections.abc import Callable

import numpy as np
import pytest

from tvm_frontend.kernels.cuda import CudaKernels


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize(("B", "T", "C"), [(1, 1, 64), (3, 17, 100), (1, 6, 768), (1, 2, 33)])
def test_layer_norm(run: Callable, launcher, within: Callable, B: int, T: int, C: int, narrow: bool) -> None:
    """Also of rows far from 0, where the square of the mean leaves nothing of the variance in float32."""
    rng = np.random.default_rng()
    x = (rng.normal(size=(B, T, C)) + rng.choice([0, 1000], size=(B, T, 1))).astype(np.float32)
    gain, bias = rng.normal(size=(2, C)).astype(np.float32)
    kernel = CudaKernels("bf16", launcher).layer_norm(C, 1e-5, narrow=narrow)
    found = run(kernel, x, gain, bias, shape=(B, T, C), dtype="bfloat16" if narrow else "float32")
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * gain + bias
    of_x = 2.0**-22 * np.abs(wide).max(-1, keepdims=True) * np.abs(gain)
    assert within(found, expected, (2.0**-8 if narrow else 2.0**-20) * (np.abs(expected) + 1) + of_x)


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize(("B", "T", "C"), [(1, 1, 64), (3, 17, 200)])
def test_embedding(run: Callable, launcher, B: int, T: int, C: int, behind: bool) -> None:
    rng = np.random.default_rng()
    tokens, positions = (rng.normal(size=(rows, C)).astype(np.float32) for rows in (31, 40))
    ids, pos = rng.integers(0, 31, (B, T)), rng.integers(0, 40 - T, B)
    kernel = CudaKernels("bf16", launcher).embedding(31, 40, C, behind=behind)
    found = run(kernel, tokens, ids, positions, *([pos] if behind else []), shape=(B, T, C))
    first = pos[:, None] if behind else 0
    np.testing.assert_array_equal(found, tokens[ids] + positions[first + np.arange(T)])


def test_rows_beyond_the_registers_are_left_to_tvm() -> None:
    assert CudaKernels("bf16").layer_norm(8192, 1e-5) is None
