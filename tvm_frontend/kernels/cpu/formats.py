"""How a linear layer multiplies: what a word of packed weights holds, and what one step adds up of it.

A word is one float32, two bfloat16, four int8 or eight int4, so that a step takes a word of x and a register of words
of the weight, whatever the precision. TVM sees the narrow ones as int32: the instructions for them are called by name.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm.ir import Expr

from tvm_frontend.kernels.cpu.intrinsics import (
    DOT_BF16,
    DOT_INT4,
    DOT_INT8,
    PAIR_BF16,
    TO_BF16,
    TO_BF16_INSTRUCTION,
    TO_BYTES,
    add_product,
    calling,
    calling_on,
    dot_bf16,
    dot_int4,
    dot_int8,
    to_signed,
)
from tvm_frontend.kernels.cpu.packing import GROUP, pack_groups, pack_panels, scales_of, to_bf16, to_int8, words_of
from tvm_frontend.kernels.cpu.register_tile import Tile
from tvm_frontend.target import CompileTarget

AT_ONCE = 16  # float32 of a row that become words together


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
        [ceil(N / columns), groups, group_words(tile)], see `pack_groups`.
        """
        if self.grouped:
            return pack_groups(weight, tile)
        return pack_panels(self._words_of(weight), tile)

    def _words_of(self, weight: np.ndarray) -> np.ndarray:
        if self.narrow is None:
            return weight
        rounded = to_int8(weight) if self.scaled else to_bf16(weight)
        return words_of(rounded, self.words(len(weight)), self.values)

    def table(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """What a finished sum needs, float32 [rows, N]: the bias; in int8, also the scales of the columns.

        And a third row then, whose bits are int32: what to add because the bytes of x count from -128.
        """
        if self.table_rows == 1:
            return bias[None]
        correction = -128 * to_int8(weight).sum(0, dtype=np.int32)
        return np.stack([bias, scales_of(weight), correction.view(np.float32)])

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
        dot = calling("dot_bf16") if has else dot_bf16
        llvm = TO_BF16_INSTRUCTION + PAIR_BF16 + DOT_BF16 if has else TO_BF16
        return Arithmetic("bf16", 2, "int32", "float32", dot, calling_on("int32x8", "to_bf16"), False, False, llvm)
    has = target.vector_bits == 512 and "avx512vnni" in target.features
    if precision == "int8":
        dot, llvm = (calling("dot_int8"), DOT_INT8) if has else (dot_int8, "")
        narrow = calling_on("int32x4", "to_unsigned")
        return Arithmetic("int8", 4, "int32", "int32", dot, narrow, True, False, TO_BYTES + llvm)
    dot, llvm = (calling("dot_int4"), DOT_INT4) if has else (dot_int4, "")
    return Arithmetic("int4", 4, "int32", "float32", dot, to_signed, True, True, TO_BYTES + llvm)


def arithmetic_of_attention(precision: str, target: CompileTarget) -> Arithmetic:
    """bf16 beside linear layers of bf16 or less, if the target has instructions for it; else fp32, then the faster."""
    return arithmetic_of("bf16", target) if precision != "fp32" and _has_bf16(target) else FP32


def row_of(width: int, narrow: Arithmetic | None) -> tuple[str, str, int]:
    """Of what passes between kernels, bfloat16 if narrowed: its dtype, that of a word, and how many words a row has."""
    return ("bfloat16", narrow.word, narrow.words(width)) if narrow else ("float32", "float32", width)


def _has_bf16(target: CompileTarget) -> bool:
    return target.vector_bits == 512 and "avx512bf16" in target.features


FP32 = Arithmetic("fp32", 1, "float32", "float32", add_product, None, False, False, "")
