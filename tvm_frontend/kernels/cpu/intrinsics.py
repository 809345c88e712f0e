"""Dot products and conversions of packed elements: as LLVM intrinsics where the CPU has them, else in TIR.

TVM has no names for these instructions and its passes would rewrite bfloat16, so packed elements are int32 in TIR, and
an instruction is a call of a small LLVM function that `import_llvm` adds to the module. All of them are `alwaysinline`:
with the x operand broadcast from memory, each dot product becomes one instruction of the k loop.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T

Dot = Callable[[Expr, Expr, Expr], Expr]  # (acc vector, packed element of x, vector of packed elements of W) → acc
Convert = Callable[[Expr], Expr]  # vector of fp32 → vector of packed elements


@dataclass(frozen=True)
class Intrinsic:
    """One or more LLVM functions that `T.call_extern` calls by name; `ir` is their text."""

    name: str
    ir: str


def import_llvm(*intrinsics: Intrinsic) -> dict[str, str]:
    """Return the loop annotations that add these functions to the LLVM module, each once; {} for none."""
    text = "".join(intrinsic.ir for intrinsic in dict.fromkeys(intrinsics))
    return {"pragma_import_llvm": text} if text else {}


# Operations of which both forms have the same signature: Dot, or Convert.


def fma(acc: Expr, x: Expr, w: Expr) -> Expr:
    """acc + x * w in fp32; LLVM contracts it to one fused multiply-add."""
    return acc + _broadcast_like(x, w) * w


def dot_bf16(acc: Expr, x: Expr, w: Expr) -> Expr:
    """Add two products of bf16 in fp32, without AVX512-BF16: a bf16 is the upper half of an fp32."""

    def unpack(packed: Expr) -> tuple[Expr, Expr]:
        float32 = str(packed.ty.dtype).replace("int32", "float32")
        low = T.shift_left(packed, _broadcast_like(T.int32(16), w))
        high = T.bitwise_and(packed, _broadcast_like(T.int32(-65536), w))
        return T.reinterpret(float32, low), T.reinterpret(float32, high)

    (x_low, x_high), (w_low, w_high) = unpack(_broadcast_like(x, w)), unpack(w)
    return acc + x_low * w_low + x_high * w_high


def dot_int8(acc: Expr, x: Expr, w: Expr) -> Expr:
    """Add four products of uint8 x and int8 W in int32, without AVX512-VNNI."""
    return _dot_bytes(acc, _broadcast_like(x, w), w)


def dot_int4(acc: Expr, x: Expr, w: Expr) -> Expr:
    """Add four products of int8 x and W, 0 … 15 in a byte each, in int32, without AVX512-VNNI."""
    return _dot_bytes(acc, w, _broadcast_like(x, w))


def _dot_bytes(acc: Expr, unsigned: Expr, signed: Expr) -> Expr:
    for byte in range(4):
        shift = _broadcast_like(T.int32(8 * byte), acc)
        zero_extended = T.bitwise_and(T.shift_right(unsigned, shift), _broadcast_like(T.int32(255), acc))
        to_top, to_bottom = _broadcast_like(T.int32(24 - 8 * byte), acc), _broadcast_like(T.int32(24), acc)
        acc = acc + zero_extended * T.shift_right(T.shift_left(signed, to_top), to_bottom)
    return acc


def _broadcast_like(value: Expr, like: Expr) -> Expr:
    _, _, lanes = str(like.ty.dtype).partition("x")
    return T.broadcast(value, int(lanes or 1))


def call_dot(function: str) -> Dot:
    """Return a Dot that calls an LLVM function."""
    return lambda acc, x, w: T.call_extern(str(acc.ty.dtype), function, acc, x, w)


def to_bf16(x: Expr) -> Expr:
    """Convert 16 fp32 to bf16, two per int32, by `TO_BF16` or `TO_BF16_AVX512`."""
    return T.call_extern("int32x8", "to_bf16", x)


def pack_bf16_pairs(low: Expr, high: Expr) -> Expr:
    """Convert two vectors of 16 fp32 to bf16 and interleave them: low[i] | high[i] << 16, by `PACK_BF16_PAIRS`."""
    return T.call_extern("int32x16", "pair_bf16", low, high)


def to_signed(x: Expr) -> Expr:
    """Round 16 fp32 in -127 … 127 to int8, four per int32, by `TO_INT8`."""
    return T.call_extern("int32x4", "to_signed", x)


def to_unsigned(x: Expr) -> Expr:
    """Round as `to_signed` and add 128: uint8 1 … 255, as vpdpbusd reads its first operand, by `TO_INT8`."""
    return T.call_extern("int32x4", "to_unsigned", x)


# LLVM IR.


def _dot_instruction(name: str, acc: str, packed: str, instruction: str, first: str, second: str) -> Intrinsic:
    """A Dot of 16 lanes that is one AVX-512 instruction. first, second: its operands, of %xs and %ws."""
    return Intrinsic(
        name,
        f"""
declare <16 x {acc}> @llvm.x86.{instruction}.512(<16 x {acc}>, <{packed}>, <{packed}>)
define linkonce_odr hidden <16 x {acc}> @{name}(<16 x {acc}> %acc, i32 %x, <16 x i32> %w) alwaysinline {{
  %one = insertelement <16 x i32> poison, i32 %x, i32 0
  %all = shufflevector <16 x i32> %one, <16 x i32> poison, <16 x i32> zeroinitializer
  %xs = bitcast <16 x i32> %all to <{packed}>
  %ws = bitcast <16 x i32> %w to <{packed}>
  %r = call <16 x {acc}> @llvm.x86.{instruction}.512(<16 x {acc}> %acc, <{packed}> {first}, <{packed}> {second})
  ret <16 x {acc}> %r
}}
""",
    )


DOT_BF16 = _dot_instruction("dot_bf16", "float", "32 x bfloat", "avx512bf16.dpbf16ps", "%xs", "%ws")
# vpdpbusd multiplies unsigned bytes, its first operand, by signed ones: int8 has unsigned x, int4 unsigned W.
DOT_INT8 = _dot_instruction("dot_int8", "i32", "64 x i8", "avx512.vpdpbusd", "%xs", "%ws")
DOT_INT4 = _dot_instruction("dot_int4", "i32", "64 x i8", "avx512.vpdpbusd", "%ws", "%xs")

# vcvtneps2bf16 rounds to nearest even and keeps the sign of a NaN, but takes denormals for zeros of their sign.
TO_BF16_AVX512 = Intrinsic(
    "to_bf16",
    """
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)
define linkonce_odr hidden <8 x i32> @to_bf16(<16 x float> %x) alwaysinline {
  %bf16 = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %x)
  %packed = bitcast <16 x bfloat> %bf16 to <8 x i32>
  ret <8 x i32> %packed
}
""",
)
# Round to nearest even by integer addition, where a NaN's mantissa could overflow into the sign: so NaNs are selected
# apart, as 0x7fc0 whatever their sign (one constant). LLVM's own fptrunc would be a library call on older CPUs.
TO_BF16 = Intrinsic(
    "to_bf16",
    """
define linkonce_odr hidden <8 x i32> @to_bf16(<16 x float> %x) alwaysinline {
  %bits = bitcast <16 x float> %x to <16 x i32>
  %above = lshr <16 x i32> %bits, splat (i32 16)
  %odd = and <16 x i32> %above, splat (i32 1)
  %half = add <16 x i32> %odd, splat (i32 32767)
  %rounded = add <16 x i32> %bits, %half
  %upper = lshr <16 x i32> %rounded, splat (i32 16)
  %nan = fcmp uno <16 x float> %x, %x
  %whole = select <16 x i1> %nan, <16 x i32> splat (i32 32704), <16 x i32> %upper
  %bf16 = trunc <16 x i32> %whole to <16 x i16>
  %packed = bitcast <16 x i16> %bf16 to <8 x i32>
  ret <8 x i32> %packed
}
""",
)
PACK_BF16_PAIRS = Intrinsic(
    "pair_bf16",
    f"""
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
define linkonce_odr hidden <16 x i32> @pair_bf16(<16 x float> %low, <16 x float> %high) alwaysinline {{
  %both = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %high, <16 x float> %low)
  %pairs = shufflevector <32 x bfloat> %both, <32 x bfloat> poison, <32 x i32> <{
        ", ".join(f"i32 {i}, i32 {i + 16}" for i in range(16))
    }>
  %packed = bitcast <32 x bfloat> %pairs to <16 x i32>
  ret <16 x i32> %packed
}}
""",
)
# x in -127 … 127: added to 1.5 * 2^23, an fp32 is rounded to nearest even with the integer in its lowest bits.
TO_INT8 = Intrinsic(
    "to_signed, to_unsigned",
    """
define linkonce_odr hidden <4 x i32> @to_signed(<16 x float> %x) alwaysinline {
  %shifted = fadd <16 x float> %x, splat (float 12582912.0)
  %bits = bitcast <16 x float> %shifted to <16 x i32>
  %bytes = trunc <16 x i32> %bits to <16 x i8>
  %packed = bitcast <16 x i8> %bytes to <4 x i32>
  ret <4 x i32> %packed
}
define linkonce_odr hidden <4 x i32> @to_unsigned(<16 x float> %x) alwaysinline {
  %signed = call <4 x i32> @to_signed(<16 x float> %x)
  %unsigned = xor <4 x i32> %signed, splat (i32 -2139062144)
  ret <4 x i32> %unsigned
}
""",
)
# `inaccessiblemem: readwrite` keeps the asm alive without aliasing the program's memory: otherwise LLVM stores the
# accumulators in every iteration, or removes the prefetch.
PREFETCH = Intrinsic(
    "prefetch",
    """
define linkonce_odr hidden i32 @prefetch(ptr %p) alwaysinline {
  call void asm sideeffect "prefetcht1 ($0)", "r"(ptr %p) nounwind willreturn memory(inaccessiblemem: readwrite)
  ret i32 0
}
""",
)


@T.macro
def prefetch(element):
    """Prefetch the cache line of a buffer's element into L2 (prefetcht1)."""
    T.evaluate(T.call_extern("int32", "prefetch", T.address_of(element)))
