"""How the KV cache keeps a head's key or value of one token: a row of words, in fewer bits where the products are."""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T

from tvm_frontend.kernels.cpu.formats import AT_ONCE, Arithmetic
from tvm_frontend.kernels.cpu.intrinsics import to_signed
from tvm_frontend.kernels.cpu.quantize_rows import SMALLEST, fill, note_largest
from tvm_frontend.kernels.cpu.register_tile import Tile, divisor, fold_lanes, span


@dataclass(frozen=True)
class CacheRows:
    """Rows of `hs` values: float32, bfloat16, or int8 behind which stands their scale, the bits of a float32.

    dtype, words: of a row in memory; two bfloat16 or four int8 are an int32, and a row is filled up with zeros. lanes,
    vectors: as it is read, lanes · vectors ≥ hs. narrow: makes words of AT_ONCE float32; None if words are float32.
    scaled: whether there is a scale. llvm: the functions that `narrow` calls.
    """

    hs: int
    dtype: str
    words: int
    lanes: int
    vectors: int
    narrow: Callable[[Expr], Expr] | None
    scaled: bool
    llvm: str

    def read(self, cache: T.Buffer, b: Expr, h: Expr, row: Expr, v: int) -> Expr:
        """Register v of a row as float32, still to be multiplied by `scale_of`."""
        wide = self.lanes if self.narrow is None else self._words_a_register
        words = cache[b, h, row, span(v * wide, wide)]
        if self.narrow is None:
            return words
        if self.scaled:
            return T.Cast(f"float32x{AT_ONCE}", T.reinterpret(f"int8x{AT_ONCE}", words))
        upper = T.Cast(f"uint32x{AT_ONCE}", T.reinterpret(f"uint16x{AT_ONCE}", words))
        return T.reinterpret(f"float32x{AT_ONCE}", T.shift_left(upper, T.broadcast(T.uint32(16), AT_ONCE)))

    def scale_of(self, cache: T.Buffer, b: Expr, h: Expr, row: Expr) -> Expr:
        """By which the values of a row are multiplied."""
        return T.reinterpret("float32", cache[b, h, row, self.words - 1]) if self.scaled else T.float32(1)

    @property
    def put(self) -> Callable:
        """A macro (cache, b, h, row, x, t, first): the row becomes x[b, t, first : first + hs]."""
        hs, lanes, vectors, narrow, scaled = self.hs, self.lanes, self.vectors, self.narrow, self.scaled
        if narrow is None:

            @T.macro
            def copy(cache, b, h, row, x, t, first):
                for v in T.unroll(vectors):
                    for lane in T.vectorized(lanes):
                        cache[b, h, row, v * lanes + lane] = x[b, t, first + v * lanes + lane]

            return copy
        whole, rest = divmod(hs, AT_ONCE)
        wide, last = self._words_a_register, self.words - 1
        find_largest = fold_lanes(AT_ONCE, T.max)

        def narrowed(values, inverse):
            return narrow(values * T.broadcast(inverse[0], AT_ONCE) if scaled else values)

        @T.macro
        def put(cache, b, h, row, x, t, first):
            values = T.alloc_buffer((1, vectors * AT_ONCE), "float32")
            inverse = T.alloc_buffer((1,), "float32")
            for v in T.unroll(vectors):
                for lane in T.vectorized(AT_ONCE):
                    values[0, v * AT_ONCE + lane] = T.float32(0)
            for v in T.unroll(whole):
                for lane in T.vectorized(AT_ONCE):
                    values[0, v * AT_ONCE + lane] = x[b, t, first + v * AT_ONCE + lane]
            for d in range(rest):
                values[0, whole * AT_ONCE + d] = x[b, t, first + whole * AT_ONCE + d]
            if scaled:
                largest = T.alloc_buffer((1, AT_ONCE), "int32")
                fill(largest, SMALLEST)
                for v in T.unroll(vectors):
                    note_largest(largest, values, 0, v * AT_ONCE)
                find_largest(largest, 0)
                cache[b, h, row, last] = T.reinterpret(
                    "int32", T.reinterpret("float32", largest[0, 0]) * T.float32(1 / 127)
                )
                inverse[0] = T.float32(127) / T.reinterpret("float32", largest[0, 0])
            for v in T.unroll(vectors):
                cache[b, h, row, T.ramp(v * wide, 1, wide)] = narrowed(
                    values[0, T.ramp(v * AT_ONCE, 1, AT_ONCE)], inverse
                )

        return put

    @property
    def _words_a_register(self) -> int:
        return AT_ONCE // (4 if self.scaled else 2)


def cache_rows(hs: int, arithmetic: Arithmetic, tile: Tile) -> CacheRows:
    """Rows for products of that arithmetic: float32, bfloat16 with bf16, int8 with int8 and int4."""
    if arithmetic.narrow is None:
        lanes = divisor(hs, tile.lanes)
        return CacheRows(hs, "float32", hs, lanes, hs // lanes, None, False, "")
    vectors = -(-hs // AT_ONCE)
    if arithmetic.scaled:
        words = vectors * AT_ONCE // 4 + 1
        return CacheRows(hs, "int32", words, AT_ONCE, vectors, to_signed, True, arithmetic.llvm)
    return CacheRows(hs, "int32", vectors * AT_ONCE // 2, AT_ONCE, vectors, arithmetic.narrow, False, arithmetic.llvm)
