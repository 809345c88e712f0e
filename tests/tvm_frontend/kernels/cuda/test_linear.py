import math
from collections.abc import Callable
from importlib import import_module

import ml_dtypes
import numpy as np
import pytest

from tvm_frontend.kernels.cuda import CudaKernels

ACTIVATIONS = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}
DTYPES = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "tf32": np.float32}
UNIT = {"bf16": 2.0**-8, "fp16": 2.0**-11, "tf32": 2.0**-11}  # unit roundoff
# Rows: one, few, an odd number that no tile divides, more than a tile; K and N: GPT-like, odd, a vocabulary.
ROWS = (1, 2, 7, 17, 65, 130)


def check(
    run: Callable, launcher, within: Callable, precision: str, rows: tuple[int, int], K: int, N: int, **form: object
) -> None:
    """One linear layer on fresh numbers against float64, from inputs rounded as the kernel is given them."""
    kernels = CudaKernels(precision, launcher)
    rng = np.random.default_rng()
    B, T = rows
    x = rng.normal(size=(B, T, K)).astype(np.float32).astype(DTYPES[precision])
    weight = (rng.normal(size=(K, N)) / math.sqrt(K)).astype(np.float32)
    bias, addend = rng.normal(size=N).astype(np.float32), rng.normal(size=(B, T, N)).astype(np.float32)
    kernel = kernels.linear(K, N, **form)
    out_dtype = kernels.dtype if form["narrow"] else "float32"
    arguments = [x, kernels.pack_weight(weight), kernels.table(weight, bias), *([addend] if form["residual"] else [])]
    found = run(kernel, *arguments, shape=(B, T, N), dtype=out_dtype)

    rounded = weight.astype(DTYPES[precision]).astype(np.float64)
    expected = ACTIVATIONS[form["activation"]](x.astype(np.float64) @ rounded + bias)
    expected += addend if form["residual"] else 0
    of_result = UNIT[precision] if form["narrow"] else 0.0
    of_inputs = 2 * UNIT[precision] if precision == "tf32" else 0.0  # it rounds both itself
    size = np.abs(x.astype(np.float64)) @ np.abs(rounded) + np.abs(bias) + 1
    assert within(found, expected, of_result * np.abs(expected) + (of_inputs + K * 2.0**-24) * size)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_any_number_of_rows(run: Callable, launcher, within: Callable, precision: str, rows: int) -> None:
    check(run, launcher, within, precision, (1, rows), 72, 100, activation=None, residual=False, narrow=False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("precision", DTYPES)
def test_activations_in_the_epilogue(
    run: Callable, launcher, within: Callable, precision: str, activation: str | None
) -> None:
    check(run, launcher, within, precision, (3, 17), 64, 96, activation=activation, residual=False, narrow=True)


@pytest.mark.parametrize("rows", [(1, 1), (3, 1), (3, 17)])
@pytest.mark.parametrize("precision", DTYPES)
def test_residual_and_odd_widths(
    run: Callable, launcher, within: Callable, precision: str, rows: tuple[int, int]
) -> None:
    check(run, launcher, within, precision, rows, 40, 65, activation=None, residual=True, narrow=False)


@pytest.mark.parametrize("precision", DTYPES)
def test_the_large_tile(
    run: Callable, launcher, within: Callable, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("tvm_frontend.kernels.cuda.linear"), "MULTIPROCESSORS", 1)
    check(run, launcher, within, precision, (1, 131), 168, 257, activation="gelu_tanh", residual=False, narrow=True)


def test_rows_that_cannot_be_read_16_bytes_at_a_time_are_left_to_tvm() -> None:
    assert CudaKernels("bf16").linear(36, 64, activation=None, residual=False) is None
    assert CudaKernels("tf32").linear(36, 64, activation=None, residual=False) is not None
