"""How a linear layer multiplies: what a word of packed weights holds, and what one step adds up of it.

A word is one float32, two bfloat16, four int8 or eight int4, so that a step takes a word of x and a register of words
of the weight, whatever the precision. TVM sees the narrow ones as int32: the instructions for them are called by name.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm.ir import Expr
from tvm.script import tirx as T

from tvm_frontend.schedules.cpu.tile import Tile
from tvm_frontend.target import CompileTarget

AT_ONCE = 16  # float32 of a row that become words together


GROUP = 32  # values of a column that share a scale in int4, and of a row that is multiplied by it


@dataclass(frozen=True)
class Arithmetic:
    """One precision on one CPU.

    values: of x in a word. word, total: dtypes of words and of their sums. dot: (sums, a word of x, words of the
    weight) → sums, on registers. narrow: makes words of AT_ONCE float32 of x; None if words are float32. scaled:
    whether x and the weight are whole numbers and have scales. grouped: whether each GROUP of values has its own, and
    not the whole row or column. llvm: the functions that `dot` and `narrow` call.
    """

    precision: str
    values: int
    word: str
    total: str
    dot: Callable[[Expr, Expr, Expr], Expr]
    narrow: Callable[[Expr], Expr] | None
    scaled: bool
    grouped: bool
    llvm: str

    def words(self, K: int) -> int:
        """Words of a row of K values of x; a narrowed row is filled up with zeros."""
        unit = GROUP if self.grouped else AT_ONCE
        return -(-K // unit) * unit // self.values if self.narrow else K

    def pack(self, weight: np.ndarray, tile: Tile) -> np.ndarray:
        """Weight float32 [K, N] as panels of words: what the inner loop reads, in order, with zeros at the end.

        [ceil(N / columns), words(K), columns] with consecutive k in a word, the first in its lowest bits. Grouped:
        [ceil(N / columns), groups, group_words(tile)], see `_pack_groups`.
        """
        if self.grouped:
            return _pack_groups(weight, tile)
        words = self._words_of(weight)
        (rows, N), columns = words.shape, tile.columns
        whole, rest = divmod(N, columns)
        packed = np.zeros((-(-N // columns), rows, columns), words.dtype)
        packed[:whole] = words[:, : whole * columns].reshape(rows, whole, columns).swapaxes(0, 1)
        packed[whole:, :, :rest] = words[:, whole * columns :]
        return packed

    def _words_of(self, weight: np.ndarray) -> np.ndarray:
        if self.narrow is None:
            return weight
        K, N = weight.shape
        filled = np.zeros((self.words(K) * self.values, N), np.int8 if self.scaled else np.uint16)
        filled[:K] = _to_int8(weight) if self.scaled else _to_bf16(weight)
        by_word = filled.reshape(-1, self.values, N).swapaxes(1, 2)  # [words, N, values]
        return np.ascontiguousarray(by_word).view(np.int32)[..., 0]

    def table(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """What a finished sum needs, float32 [rows, N]: the bias; in int8, also the scales of the columns.

        And a third row then, whose bits are int32: what to add because the bytes of x count from -128.
        """
        if self.table_rows == 1:
            return bias[None]
        correction = -128 * _to_int8(weight).sum(0, dtype=np.int32)
        return np.stack([bias, _scales_of(weight), correction.view(np.float32)])

    @property
    def table_rows(self) -> int:
        """Of `table`."""
        return 3 if self.scaled and not self.grouped else 1


def arithmetic_of(precision: str, target: CompileTarget) -> Arithmetic:
    """fp32, bf16, int8 or int4, by the instructions that the target has, or else by those for float32 and int32."""
    if precision == "fp32":
        return FP32
    if precision == "bf16":
        has = _has_bf16(target)
        dot = _calling("dot_bf16") if has else _dot_bf16
        llvm = _TO_BF16_INSTRUCTION + _PAIR_BF16 + _DOT_BF16 if has else _TO_BF16
        return Arithmetic("bf16", 2, "int32", "float32", dot, _calling_on("int32x8", "to_bf16"), False, False, llvm)
    has = target.vector_bits == 512 and "avx512vnni" in target.features
    if precision == "int8":
        dot, llvm = (_calling("dot_int8"), _DOT_INT8) if has else (_dot_int8, "")
        narrow = _calling_on("int32x4", "to_unsigned")
        return Arithmetic("int8", 4, "int32", "int32", dot, narrow, True, False, _TO_BYTES + llvm)
    dot, llvm = (_calling("dot_int4"), _DOT_INT4) if has else (_dot_int4, "")
    return Arithmetic("int4", 4, "int32", "float32", dot, to_signed, True, True, _TO_BYTES + llvm)


def arithmetic_of_attention(precision: str, target: CompileTarget) -> Arithmetic:
    """bf16 beside linear layers of bf16 or less, if the target has instructions for it; else fp32, then the faster."""
    return arithmetic_of("bf16", target) if precision != "fp32" and _has_bf16(target) else FP32


def row_of(width: int, narrow: Arithmetic | None) -> tuple[str, str, int]:
    """Of what passes between kernels, bfloat16 if narrowed: its dtype, that of a word, and how many words a row has."""
    return ("bfloat16", narrow.word, narrow.words(width)) if narrow else ("float32", "float32", width)


def pair(low: Expr, high: Expr) -> Expr:
    """Words of two bfloat16 from two registers of float32, by a function in the `llvm` of bf16's instructions."""
    return T.call_extern("int32x16", "pair_bf16", low, high)


def to_signed(x: Expr) -> Expr:
    """AT_ONCE float32 of -127 … 127 as words of int8, by a function in the `llvm` of int8's and int4's arithmetic."""
    return T.call_extern("int32x4", "to_signed", x)


def group_words(tile: Tile) -> int:
    """Words of one group of a panel in int4: GROUP values of each column, and two bfloat16 scales a word."""
    return GROUP // 8 * tile.columns + tile.columns // 2


def _has_bf16(target: CompileTarget) -> bool:
    return target.vector_bits == 512 and "avx512bf16" in target.features


def _pack_groups(weight: np.ndarray, tile: Tile) -> np.ndarray:
    """Weight float32 [K, N] as [panels, groups, group_words]: whole numbers of 4 bits and their scales.

    A number stands for (number - 8) · scale. A word has eight of a column: in the lower halves of its bytes the first
    four, in the upper ones the next. Behind them, in the lower half of word i, the scale of column i, and in the upper
    one that of column i + columns / 2. The scale makes the largest of a group -8: its sign is that number's.
    """
    K, N = weight.shape
    groups, columns = -(-K // GROUP), tile.columns
    panels = -(-N // columns)
    filled = np.zeros((groups * GROUP, panels * columns), np.float32)
    filled[:K, :N] = weight
    filled = filled.reshape(groups, GROUP, -1)
    lowest, highest = filled.min(1), filled.max(1)
    bits = _to_bf16(np.where(highest > -lowest, highest, lowest) / np.float32(-8))  # [groups, N]
    scales = (bits.astype(np.uint32) << 16).view(np.float32)
    inverse = 1 / np.where(scales == 0, np.float32(1), scales)
    numbers = np.clip(np.rint(filled * inverse[:, None]) + 8, 0, 15).astype(np.uint8)
    halves = numbers.reshape(groups, GROUP // 8, 2, 4, panels, columns)
    bytes_ = (halves[:, :, 0] | halves[:, :, 1] << 4).transpose(3, 0, 1, 4, 2)  # [panels, groups, words, columns, 4]
    words = np.ascontiguousarray(bytes_).view(np.int32).reshape(panels, groups, -1)
    of_columns = bits.reshape(groups, panels, 2, columns // 2).transpose(1, 0, 3, 2)
    return np.concatenate([words, np.ascontiguousarray(of_columns).view(np.int32)[..., 0]], axis=-1)


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
    return _dot_bytes(sums, _spread(x, w), w)


def _dot_int4(sums: Expr, x: Expr, w: Expr) -> Expr:
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


FP32 = Arithmetic("fp32", 1, "float32", "float32", _add_product, None, False, False, "")


def _calling(function: str) -> Callable[[Expr, Expr, Expr], Expr]:
    return lambda sums, x, w: T.call_extern(str(sums.ty.dtype), function, sums, x, w)


def _calling_on(result: str, function: str) -> Callable[[Expr], Expr]:
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


_DOT_BF16 = _instruction("dot_bf16", "float", "32 x bfloat", "avx512bf16.dpbf16ps", "%xs", "%ws")
# unsigned bytes first: those of x in int8, of the weight in int4
_DOT_INT8 = _instruction("dot_int8", "i32", "64 x i8", "avx512.vpdpbusd", "%xs", "%ws")
_DOT_INT4 = _instruction("dot_int4", "i32", "64 x i8", "avx512.vpdpbusd", "%ws", "%xs")
_TO_BF16_INSTRUCTION = """
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)
define linkonce_odr hidden <8 x i32> @to_bf16(<16 x float> %x) alwaysinline {
  %narrow = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %x)
  %words = bitcast <16 x bfloat> %narrow to <8 x i32>
  ret <8 x i32> %words
}
"""
_PAIR_BF16 = f"""
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
# of x in -127 … 127. Added to 1.5 · 2^23, a float32 has its nearest whole number in its lowest bits.
_TO_BYTES = """
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
