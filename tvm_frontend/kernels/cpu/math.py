"""exp and GELU as straight-line arithmetic, so that they vectorise: libm's would be called a lane at a time.

The polynomials are interpolated in double precision at Chebyshev nodes when a kernel is built. Error bounds, which
tests check against double precision: exp2 2e-7 relative, both GELUs 2e-7 · max(1, |x|) absolute, and 5e-5 · max(1, |x|)
for the variants whose result is rounded to bfloat16.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

LOG2_E = math.log2(math.e)
SATURATION = 4.25  # for |x| beyond it, GELU's factor Phi(x) is within 1e-5 of 0 or 1


def exp2(x: Expr) -> Expr:
    """Return 2^x for float32 x < 127.5; x below -126 counts as -126, and NaN stays NaN."""
    return _let(T.max(T.float32(-126), x), _exp2_in_range)  # in this order: max(NaN, -126) would be -126


def _exp2_in_range(x: Expr) -> Expr:
    n = T.nearbyint(x)
    mantissa = _polynomial(_exp2_coefficients(), x - n)  # 2^(x - n), with x - n in -1/2 … 1/2
    # 2^n as a float32: n in the exponent field, which begins at bit 23 and is biased by 127.
    return mantissa * T.reinterpret("float32", T.shift_left(T.Cast("int32", n) + 127, 23))


def gelu_tanh(x: Expr) -> Expr:
    """Return GPT-2's GELU, x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))), computed as x · sigmoid.

    Source: https://arxiv.org/abs/1606.08415.
    """
    factor = -2 * math.sqrt(2 / math.pi) * LOG2_E
    power = x * (T.float32(factor) + T.float32(factor * 0.044715) * x * x)
    return x / (T.float32(1) + exp2(T.min(power, T.float32(126))))


def gelu_exact(x: Expr) -> Expr:
    """Return x · Φ(x), with Φ the standard normal CDF (https://arxiv.org/abs/1606.08415)."""
    return _let(T.abs(x) * T.float32(math.sqrt(0.5)), lambda z: _gelu_of(x, z))


def _gelu_of(x: Expr, z: Expr) -> Expr:
    # erfc(z) = erfcx(z) exp(-z²); erfcx is smooth in t = 2 / (2 + z).
    tail = T.float32(0.5) * _let(T.float32(2) / (T.float32(2) + z), lambda t: _polynomial(_erfcx_coefficients(), t))
    return _let(
        tail * exp2(z * z * T.float32(-LOG2_E)),
        lambda upper: x * T.Select(x < T.float32(0), upper, T.float32(1) - upper),
    )


def gelu_tanh_to_bf16(x: Expr) -> Expr:
    """Return `gelu_tanh` for a result that is rounded to bfloat16: a polynomial, without exp or division."""
    return _polynomial_gelu(
        x, _gelu_coefficients(lambda z: 1 / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))))
    )


def gelu_exact_to_bf16(x: Expr) -> Expr:
    """Return `gelu_exact` for a result that is rounded to bfloat16: a polynomial, without exp or division."""
    return _polynomial_gelu(x, _gelu_coefficients(np.vectorize(lambda z: math.erfc(-z * math.sqrt(0.5)) / 2)))


def _polynomial_gelu(x: Expr, coefficients: Sequence[float]) -> Expr:
    clamped = T.max(T.float32(-SATURATION), T.min(T.float32(SATURATION), x))
    return _let(clamped, lambda z: x * (z * _polynomial(coefficients, z * z) + T.float32(0.5)))


def relu(x: Expr) -> Expr:
    """Return max(x, 0)."""
    return T.max(x, T.float32(0))


def _let(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """Return body(value) with the value bound to a variable, so that it is computed once however often it is used."""
    var = tvm.tirx.Var("t", "float32")
    return tvm.tirx.Let(var, value, body(var))


def _polynomial(coefficients: Sequence[float], x: Expr) -> Expr:
    """Evaluate a polynomial by Horner's rule; coefficients from the highest power down."""
    return _let(x, lambda x: _horner(coefficients, x))


def _horner(coefficients: Sequence[float], x: Expr) -> Expr:
    total = T.float32(coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + T.float32(coefficient)
    return total


@cache
def _exp2_coefficients() -> tuple[float, ...]:
    return _interpolate(np.exp2, -0.5, 0.5, degree=6)


@cache
def _erfcx_coefficients() -> tuple[float, ...]:
    # Interpolate up to z = 6, where the tail is 1e-17: beyond it, only the factor exp(-z²) matters.
    return _interpolate(lambda t: np.array([math.erfc(z) * math.exp(z * z) for z in 2 / t - 2]), 0.25, 1.0, degree=10)


def _gelu_coefficients(factor: Callable[[np.ndarray], np.ndarray]) -> tuple[float, ...]:
    """Interpolate p in factor(z) = 1/2 + z · p(z²) for |z| ≤ SATURATION, and make it exactly 0 or 1 at the ends."""
    *rest, last = _interpolate(lambda u: (factor(np.sqrt(u)) - 0.5) / np.sqrt(u), 1e-12, SATURATION**2, degree=8)
    return *rest, last + 0.5 / SATURATION - float(np.polyval([*rest, last], SATURATION**2))


def _interpolate(function: Callable, low: float, high: float, degree: int) -> tuple[float, ...]:
    series = np.polynomial.Chebyshev.interpolate(function, degree, domain=[low, high])
    power = series.convert(kind=np.polynomial.Polynomial, domain=[-1, 1], window=[-1, 1])
    return tuple(float(c) for c in power.coef[::-1])
