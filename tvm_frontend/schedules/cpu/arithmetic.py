"""How a linear layer multiplies: what a word of packed weights holds, and what one step adds up of it.

A word is one float32, two bfloat16 or four int8, so that a step takes one word of x and a register of words of the
weight, whatever the precision. TVM sees the narrow ones as int32: the instructions for them are called by name.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm.ir import Expr
from tvm.script import tirx as T

from tvm_frontend.target import CompileTarget

AT_ONCE = 16  # float32 of a row that become words together


@dataclass(frozen=True)
class Arithmetic:
    """One precision on one CPU.

    values: in a word. word, total: dtypes of words and of their sums. dot: (sums, a word of x, words of the weight) →
    sums, on registers. narrow: makes words of AT_ONCE float32 of x; None if words are float32. scaled: whether each row
    of x and each column of the weight has a scale. llvm: the functions that `dot` and `narrow` call.
    """

    precision: str
    values: int
    word: str
    total: str
    dot: Callable[[Expr, Expr, Expr], Expr]
    narrow: Callable[[Expr], Expr] | None
    scaled: bool
    llvm: str

    def words(self, K: int) -> int:
        """Words of a row of K values; a narrowed row is filled up with zeros."""
        return -(-K // AT_ONCE) * AT_ONCE // self.values if self.narrow else K

    def pack(self, weight: np.ndarray) -> np.ndarray:
        """Weight float32 [K, N] as words [words(K), N], consecutive k in a word, the first in its lowest bits."""
        if self.narrow is None:
            return weight
        K, N = weight.shape
        filled = np.zeros((self.words(K) * self.values, N), np.int8 if self.scaled else np.uint16)
        filled[:K] = _to_int8(weight) if self.scaled else _to_bf16(weight)
        by_word = filled.reshape(-1, self.values, N).swapaxes(1, 2)  # [words, N, values]
        return np.ascontiguousarray(by_word).view(np.int32)[..., 0]

    def table(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """What a finished sum needs, float32 [rows, N]: the bias; if scaled, also the scales of the columns.

        And a third row then, whose bits are int32: what to add because the bytes of x count from -128.
        """
        if not self.scaled:
            return bias[None]
        correction = -128 * _to_int8(weight).sum(0, dtype=np.int32)
        return np.stack([bias, _scales_of(weight), correction.view(np.float32)])

    @property
    def table_rows(self) -> int:
        """Of `table`."""
        return 3 if self.scaled else 1


def arithmetic_of(precision: str, target: CompileTarget) -> Arithmetic:
    """fp32, bf16 or int8, by the instructions that the target has for it, or else by those for float32 and int32."""
    wide, features = target.vector_bits == 512, target.features
    if precision == "fp32":
        return Arithmetic("fp32", 1, "float32", "float32", _add_product, None, False, "")
    if precision == "bf16":
        has = wide and "avx512bf16" in features
        dot = _calling("dot_bf16") if has else _dot_bf16
        llvm = _TO_BF16 + (_DOT_BF16 if has else "")
        return Arithmetic("bf16", 2, "int32", "float32", dot, _calling_on("int32x8", "to_bf16"), False, llvm)
    has = wide and "avx512vnni" in features
    dot = _calling("dot_int8") if has else _dot_int8
    llvm = _TO_INT8 + (_DOT_INT8 if has else "")
    return Arithmetic("int8", 4, "int32", "int32", dot, _calling_on("int32x4", "to_int8"), True, llvm)


def _scales_of(weight: np.ndarray) -> np.ndarray:
    """By which a column's int8 are multiplied: its largest |weight| is 127 of them."""
    return np.abs(weight).max(0) / np.float32(127)


def _to_int8(weight: np.ndarray) -> np.ndarray:
    scales = _scales_of(weight)
    return np.rint(weight / np.where(scales == 0, np.float32(1), scales)).astype(np.int8)


def _to_bf16(weight: np.ndarray) -> np.ndarray:
    """The upper half of each float32, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(weight).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _add_product(sums: Expr, x: Expr, w: Expr) -> Expr:
    return sums + _spread(x, w) * w


def _dot_bf16(sums: Expr, x: Expr, w: Expr) -> Expr:
    """Two products of float32: a bfloat16 is the upper half of one."""

    def halves(words: Expr) -> tuple[Expr, Expr]:
        float32 = str(words.ty.dtype).replace("int32", "float32")
        low = T.shift_left(words, _spread(T.int32(16), w))
        high = T.bitwise_and(words, _spread(T.int32(-65536), w))
        return T.reinterpret(float32, low), T.reinterpret(float32, high)

    (x_low, x_high), (w_low, w_high) = halves(_spread(x, w)), halves(w)
    return sums + x_low * w_low + x_high * w_high


def _dot_int8(sums: Expr, x: Expr, w: Expr) -> Expr:
    """Four products of int32: the bytes of x are unsigned, those of the weight signed."""
    spread = _spread(x, w)
    for byte in range(4):
        unsigned = T.bitwise_and(T.shift_right(spread, _spread(T.int32(8 * byte), w)), _spread(T.int32(255), w))
        to_top, to_bottom = _spread(T.int32(24 - 8 * byte), w), _spread(T.int32(24), w)
        sums = sums + unsigned * T.shift_right(T.shift_left(w, to_top), to_bottom)
    return sums


def _spread(value: Expr, like: Expr) -> Expr:
    return T.broadcast(value, _lanes(like))


def _lanes(words: Expr) -> int:
    _, _, lanes = str(words.ty.dtype).partition("x")
    return int(lanes or 1)


def _calling(function: str) -> Callable[[Expr, Expr, Expr], Expr]:
    return lambda sums, x, w: T.call_extern(str(sums.ty.dtype), function, sums, x, w)


def _calling_on(result: str, function: str) -> Callable[[Expr], Expr]:
    return lambda x: T.call_extern(result, function, x)


# In LLVM's language, as TVM has no names for them. Always inlined, so that they are one instruction in the loop.


def _instruction(name: str, sums: str, narrow: str, instruction: str) -> str:
    """A function (sums, a word of x, words of the weight) of 16 lanes that is one instruction."""
    return f"""
declare <16 x {sums}> @llvm.x86.{instruction}.512(<16 x {sums}>, <{narrow}>, <{narrow}>)
define linkonce_odr hidden <16 x {sums}> @{name}(<16 x {sums}> %sums, i32 %x, <16 x i32> %w) alwaysinline {{
  %one = insertelement <16 x i32> poison, i32 %x, i32 0
  %all = shufflevector <16 x i32> %one, <16 x i32> poison, <16 x i32> zeroinitializer
  %xs = bitcast <16 x i32> %all to <{narrow}>
  %ws = bitcast <16 x i32> %w to <{narrow}>
  %r = call <16 x {sums}> @llvm.x86.{instruction}.512(<16 x {sums}> %sums, <{narrow}> %xs, <{narrow}> %ws)
  ret <16 x {sums}> %r
}}
"""


_DOT_BF16 = _instruction("dot_bf16", "float", "32 x bfloat", "avx512bf16.dpbf16ps")
_DOT_INT8 = _instruction("dot_int8", "i32", "64 x i8", "avx512.vpdpbusd")
# Rounded to nearest, ties to even; NaN stays NaN. LLVM's own fptrunc is a call into a library on older CPUs.
_TO_BF16 = """
define linkonce_odr hidden <8 x i32> @to_bf16(<16 x float> %x) alwaysinline {
  %bits = bitcast <16 x float> %x to <16 x i32>
  %above = lshr <16 x i32> %bits, splat (i32 16)
  %odd = and <16 x i32> %above, splat (i32 1)
  %half = add <16 x i32> %odd, splat (i32 32767)
  %rounded = add <16 x i32> %bits, %half
  %upper = lshr <16 x i32> %rounded, splat (i32 16)
  %nan = fcmp uno <16 x float> %x, %x
  %whole = select <16 x i1> %nan, <16 x i32> splat (i32 32704), <16 x i32> %upper
  %narrow = trunc <16 x i32> %whole to <16 x i16>
  %words = bitcast <16 x i16> %narrow to <8 x i32>
  ret <8 x i32> %words
}
"""
# of x in -127 … 127; as unsigned bytes that count from -128
_TO_INT8 = """
declare <16 x float> @llvm.rint.v16f32(<16 x float>)
declare <16 x i8> @llvm.fptosi.sat.v16i8.v16f32(<16 x float>)
define linkonce_odr hidden <4 x i32> @to_int8(<16 x float> %x) alwaysinline {
  %whole = call <16 x float> @llvm.rint.v16f32(<16 x float> %x)
  %signed = call <16 x i8> @llvm.fptosi.sat.v16i8.v16f32(<16 x float> %whole)
  %words = bitcast <16 x i8> %signed to <4 x i32>
  %unsigned = xor <4 x i32> %words, splat (i32 -2139062144)
  ret <4 x i32> %unsigned
}
"""
