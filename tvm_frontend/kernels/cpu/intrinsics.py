"""What one step of a product computes, as functions in LLVM's language for CPUs that have an instruction for it.

For other CPUs, the same in TIR.
"""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T


def pair(low: Expr, high: Expr) -> Expr:
    """Words of two bfloat16 from two registers of float32, by a function in the `llvm` of bf16's instructions."""
    return T.call_extern("int32x16", "pair_bf16", low, high)


def to_signed(x: Expr) -> Expr:
    """AT_ONCE float32 of -127 … 127 as words of int8, by a function in the `llvm` of int8's and int4's arithmetic."""
    return T.call_extern("int32x4", "to_signed", x)


def add_product(sums: Expr, x: Expr, w: Expr) -> Expr:
    return sums + _spread(x, w) * w


def dot_bf16(sums: Expr, x: Expr, w: Expr) -> Expr:
    """Two products of float32: a bfloat16 is the upper half of one."""

    def halves(words: Expr) -> tuple[Expr, Expr]:
        float32 = str(words.ty.dtype).replace("int32", "float32")
        low = T.shift_left(words, _spread(T.int32(16), w))
        high = T.bitwise_and(words, _spread(T.int32(-65536), w))
        return T.reinterpret(float32, low), T.reinterpret(float32, high)

    (x_low, x_high), (w_low, w_high) = halves(_spread(x, w)), halves(w)
    return sums + x_low * w_low + x_high * w_high


def dot_int8(sums: Expr, x: Expr, w: Expr) -> Expr:
    return _dot_bytes(sums, _spread(x, w), w)


def dot_int4(sums: Expr, x: Expr, w: Expr) -> Expr:
    return _dot_bytes(sums, w, _spread(x, w))


def _dot_bytes(sums: Expr, unsigned: Expr, signed: Expr) -> Expr:
    """Four products of int32, of unsigned bytes and signed ones."""
    for byte in range(4):
        number = T.bitwise_and(T.shift_right(unsigned, _spread(T.int32(8 * byte), sums)), _spread(T.int32(255), sums))
        to_top, to_bottom = _spread(T.int32(24 - 8 * byte), sums), _spread(T.int32(24), sums)
        sums = sums + number * T.shift_right(T.shift_left(signed, to_top), to_bottom)
    return sums


def _spread(value: Expr, like: Expr) -> Expr:
    return T.broadcast(value, _lanes(like))


def _lanes(words: Expr) -> int:
    _, _, lanes = str(words.ty.dtype).partition("x")
    return int(lanes or 1)


def calling(function: str) -> Callable[[Expr, Expr, Expr], Expr]:
    return lambda sums, x, w: T.call_extern(str(sums.ty.dtype), function, sums, x, w)


def calling_on(result: str, function: str) -> Callable[[Expr], Expr]:
    return lambda x: T.call_extern(result, function, x)


# In LLVM's language, as TVM has no names for them. Always inlined, so that they are one instruction in the loop.


def _instruction(name: str, sums: str, narrow: str, instruction: str, first: str, second: str) -> str:
    """A function (sums, a word of x, words of the weight) of 16 lanes that is one instruction."""
    return f"""
declare <16 x {sums}> @llvm.x86.{instruction}.512(<16 x {sums}>, <{narrow}>, <{narrow}>)
define linkonce_odr hidden <16 x {sums}> @{name}(<16 x {sums}> %sums, i32 %x, <16 x i32> %w) alwaysinline {{
  %one = insertelement <16 x i32> poison, i32 %x, i32 0
  %all = shufflevector <16 x i32> %one, <16 x i32> poison, <16 x i32> zeroinitializer
  %xs = bitcast <16 x i32> %all to <{narrow}>
  %ws = bitcast <16 x i32> %w to <{narrow}>
  %r = call <16 x {sums}> @llvm.x86.{instruction}.512(<16 x {sums}> %sums, <{narrow}> {first}, <{narrow}> {second})
  ret <16 x {sums}> %r
}}
"""


DOT_BF16 = _instruction("dot_bf16", "float", "32 x bfloat", "avx512bf16.dpbf16ps", "%xs", "%ws")
# unsigned bytes first: those of x in int8, of the weight in int4
DOT_INT8 = _instruction("dot_int8", "i32", "64 x i8", "avx512.vpdpbusd", "%xs", "%ws")
DOT_INT4 = _instruction("dot_int4", "i32", "64 x i8", "avx512.vpdpbusd", "%ws", "%xs")
TO_BF16_INSTRUCTION = """
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)
define linkonce_odr hidden <8 x i32> @to_bf16(<16 x float> %x) alwaysinline {
  %narrow = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %x)
  %words = bitcast <16 x bfloat> %narrow to <8 x i32>
  ret <8 x i32> %words
}
"""
PAIR_BF16 = f"""
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
define linkonce_odr hidden <16 x i32> @pair_bf16(<16 x float> %low, <16 x float> %high) alwaysinline {{
  %both = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %high, <16 x float> %low)
  %pairs = shufflevector <32 x bfloat> %both, <32 x bfloat> poison, <32 x i32> <{
    ", ".join(f"i32 {i}, i32 {i + 16}" for i in range(16))
}>
  %words = bitcast <32 x bfloat> %pairs to <16 x i32>
  ret <16 x i32> %words
}}
"""
# Rounded to nearest, ties to even; NaN stays NaN. LLVM's own fptrunc is a call into a library on older CPUs.
TO_BF16 = """
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
# of x in -127 … 127. Added to 1.5 · 2^23, a float32 has its nearest whole number in its lowest bits.
TO_BYTES = """
define linkonce_odr hidden <4 x i32> @to_signed(<16 x float> %x) alwaysinline {
  %shifted = fadd <16 x float> %x, splat (float 12582912.0)
  %bits = bitcast <16 x float> %shifted to <16 x i32>
  %bytes = trunc <16 x i32> %bits to <16 x i8>
  %words = bitcast <16 x i8> %bytes to <4 x i32>
  ret <4 x i32> %words
}
define linkonce_odr hidden <4 x i32> @to_unsigned(<16 x float> %x) alwaysinline {
  %signed = call <4 x i32> @to_signed(<16 x float> %x)
  %unsigned = xor <4 x i32> %signed, splat (i32 -2139062144)
  ret <4 x i32> %unsigned
}
"""
