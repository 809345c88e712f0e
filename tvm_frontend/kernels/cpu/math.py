"""exp and GELU as straight-line arithmetic, so that they vectorise: libm's would be called a lane at a time.

The polynomials are interpolated in double precision at Chebyshev nodes when a kernel is built. Bounds, held by tests
against double precision: exp2 2e-7 relative, both GELUs 2e-7 · max(1, |x|) absolute, and 5e-5 · max(1, |x|) where
the result is rounded to bfloat16.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

LOG2_E = math.log2(math.e)
FLAT = 4.25  # beyond it, either way, GELU's factor is 0 or 1 but for 1e-5


def exp2(x: Expr) -> Expr:
    """2^x for float32 x; x below -126 counts as -126, NaN stays NaN, and x must stay below 127.5."""
    return _let(T.max(T.float32(-126), x), _exp2_in_range)  # in this order: max(NaN, -126) would be -126


def _exp2_in_range(x: Expr) -> Expr:
    whole = T.nearbyint(x)
    fraction = _polynomial(_exp2_coefficients(), x - whole)
    # 2^n as a float32: n in the exponent's bits, which begin at bit 23 and are biased by 127.
    return fraction * T.reinterpret("float32", T.shift_left(T.Cast("int32", whole) + 127, 23))


def gelu_tanh(x: Expr) -> Expr:
    """x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))), GPT-2's (https://arxiv.org/abs/1606.08415), as x · sigmoid."""
    factor = -2 * math.sqrt(2 / math.pi) * LOG2_E
    power = x * (T.float32(factor) + T.float32(factor * 0.044715) * x * x)
    return x / (T.float32(1) + exp2(T.min(power, T.float32(126))))


def gelu_exact(x: Expr) -> Expr:
    """x · Φ(x), with Φ the normal distribution (https://arxiv.org/abs/1606.08415)."""
    return _let(T.abs(x) * T.float32(math.sqrt(0.5)), lambda z: _gelu_of(x, z))


def _gelu_of(x: Expr, z: Expr) -> Expr:
    # erfc(z) = erfcx(z) exp(-z²); erfcx is smooth in t = 2 / (2 + z).
    tail = T.float32(0.5) * _let(T.float32(2) / (T.float32(2) + z), lambda t: _polynomial(_erfcx_coefficients(), t))
    return _let(
        tail * exp2(z * z * T.float32(-LOG2_E)),
        lambda beyond: x * T.Select(x < T.float32(0), beyond, T.float32(1) - beyond),
    )


def gelu_tanh_to_bf16(x: Expr) -> Expr:
    """`gelu_tanh` for a result that is rounded to bfloat16: no exp and no quotient."""
    return _short_gelu(
        x, _short_coefficients(lambda z: 1 / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))))
    )


def gelu_exact_to_bf16(x: Expr) -> Expr:
    """The same of `gelu_exact`."""
    return _short_gelu(x, _short_coefficients(np.vectorize(lambda z: math.erfc(-z * math.sqrt(0.5)) / 2)))


def _short_gelu(x: Expr, coefficients: Sequence[float]) -> Expr:
    near = T.max(T.float32(-FLAT), T.min(T.float32(FLAT), x))
    return _let(near, lambda z: x * (z * _polynomial(coefficients, z * z) + T.float32(0.5)))


def relu(x: Expr) -> Expr:
    """max(x, 0)."""
    return T.max(x, T.float32(0))


def _let(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """body(value) with the value computed once, however often the body uses it."""
    var = tvm.tirx.Var("t", "float32")
    return tvm.tirx.Let(var, value, body(var))


def _polynomial(coefficients: Sequence[float], x: Expr) -> Expr:
    """Horner's rule; coefficients from the highest power down."""
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
    # Up to z = 6, where the tail is 1e-17: beyond it, only the factor exp(-z²) matters.
    return _interpolate(lambda t: np.array([math.erfc(z) * math.exp(z * z) for z in 2 / t - 2]), 0.25, 1.0, degree=10)


def _short_coefficients(factor: Callable[[np.ndarray], np.ndarray]) -> tuple[float, ...]:
    """Of p in factor(z) = 1/2 + z · p(z²) for |z| ≤ FLAT, where it is 0 or 1 at the ends."""
    *rest, last = _interpolate(lambda u: (factor(np.sqrt(u)) - 0.5) / np.sqrt(u), 1e-12, FLAT**2, degree=8)
    return *rest, last + 0.5 / FLAT - float(np.polyval([*rest, last], FLAT**2))


def _interpolate(function: Callable, low: float, high: float, degree: int) -> tuple[float, ...]:
    series = np.polynomial.Chebyshev.interpolate(function, degree, domain=[low, high])
    power = series.convert(kind=np.polynomial.Polynomial, domain=[-1, 1], window=[-1, 1])
    return tuple(float(c) for c in power.coef[::-1])
