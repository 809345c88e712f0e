"""The layout of the KV cache: a row of storage elements per head and token, in fewer bits where the products are.

cache [B, nh, length, elements], one row of hs values, padded with zeros to whole vectors of VEC_LANES unless fp32:

    fp32   | v0 | v1 | v2 | …                              hs float32
    bf16   | v1 v0 | v3 v2 | …                             two per int32, the first in the lower half
    int8   | v3 v2 v1 v0 | v7 v6 v5 v4 | … | scale |       four per int32; the row's scale, absmax / 127, as bits
"""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T

from tvm_frontend.kernels.cpu.formats import VEC_LANES, GemmFormat
from tvm_frontend.kernels.cpu.intrinsics import Convert, Intrinsic, to_signed
from tvm_frontend.kernels.cpu.quantize_rows import MIN_ABSMAX_BITS, fill, update_absmax
from tvm_frontend.kernels.cpu.register_tile import Tile, horizontal_reduce, pow2_divisor, vector_slice


@dataclass(frozen=True)
class KvLayout:
    """Store, load and dequantise the key or value of one head and token."""

    hs: int  # head size
    dtype: str  # of a storage element: "float32" or "int32"
    elements: int  # storage elements per row
    lanes: int  # float32 elements per vector as a row is loaded
    vectors: int  # vectors per row: lanes * vectors >= hs
    convert: Convert | None  # VEC_LANES float32 (divided by their scale if `quantized`) → packed; None for fp32
    quantized: bool  # int8 with a scale per row
    intrinsics: tuple[Intrinsic, ...]  # LLVM functions that `convert` calls

    def load(self, cache: T.Buffer, b: Expr, h: Expr, row: Expr, v: int) -> Expr:
        """Return vector v of a row as float32, still to be multiplied by `scale`."""
        stored = self.lanes if self.convert is None else self._vector_elements
        packed = cache[b, h, row, vector_slice(v * stored, stored)]
        if self.convert is None:
            return packed
        if self.quantized:
            return T.Cast(f"float32x{VEC_LANES}", T.reinterpret(f"int8x{VEC_LANES}", packed))
        bf16 = T.Cast(f"uint32x{VEC_LANES}", T.reinterpret(f"uint16x{VEC_LANES}", packed))
        return T.reinterpret(f"float32x{VEC_LANES}", T.shift_left(bf16, T.broadcast(T.uint32(16), VEC_LANES)))

    def scale(self, cache: T.Buffer, b: Expr, h: Expr, row: Expr) -> Expr:
        """Return the scale of a row: 1 unless `quantized`."""
        return T.reinterpret("float32", cache[b, h, row, self.elements - 1]) if self.quantized else T.float32(1)

    @property
    def store_row(self) -> Callable:
        """A macro (cache, b, h, row, x, t, first) that stores x[b, t, first : first + hs], float32, as a row."""
        hs, lanes, vectors, convert, quantized = self.hs, self.lanes, self.vectors, self.convert, self.quantized
        if convert is None:

            @T.macro
            def store_fp32(cache, b, h, row, x, t, first):
                for v in T.unroll(vectors):
                    for lane in T.vectorized(lanes):
                        cache[b, h, row, v * lanes + lane] = x[b, t, first + v * lanes + lane]

            return store_fp32
        full, tail = divmod(hs, VEC_LANES)
        stored, last = self._vector_elements, self.elements - 1
        reduce_max = horizontal_reduce(VEC_LANES, T.max)

        def converted(values, reciprocal):
            return convert(values * T.broadcast(reciprocal[0], VEC_LANES) if quantized else values)

        @T.macro
        def store_packed(cache, b, h, row, x, t, first):
            values = T.alloc_buffer((1, vectors * VEC_LANES), "float32")
            reciprocal = T.alloc_buffer((1,), "float32")
            for v in T.unroll(vectors):
                for lane in T.vectorized(VEC_LANES):
                    values[0, v * VEC_LANES + lane] = T.float32(0)
            for v in T.unroll(full):
                for lane in T.vectorized(VEC_LANES):
                    values[0, v * VEC_LANES + lane] = x[b, t, first + v * VEC_LANES + lane]
            for d in range(tail):
                values[0, full * VEC_LANES + d] = x[b, t, first + full * VEC_LANES + d]
            if quantized:
                absmax = T.alloc_buffer((1, VEC_LANES), "int32")
                fill(absmax, MIN_ABSMAX_BITS)
                for v in T.unroll(vectors):
                    update_absmax(absmax, values, 0, v * VEC_LANES)
                reduce_max(absmax, 0)
                cache[b, h, row, last] = T.reinterpret(
                    "int32", T.reinterpret("float32", absmax[0, 0]) * T.float32(1 / 127)
                )
                reciprocal[0] = T.float32(127) / T.reinterpret("float32", absmax[0, 0])
            for v in T.unroll(vectors):
                cache[b, h, row, T.ramp(v * stored, 1, stored)] = converted(
                    values[0, T.ramp(v * VEC_LANES, 1, VEC_LANES)], reciprocal
                )

        return store_packed

    @property
    def _vector_elements(self) -> int:
        return VEC_LANES // (4 if self.quantized else 2)


def kv_layout(hs: int, fmt: GemmFormat, tile: Tile) -> KvLayout:
    """Return the layout beside linear layers of a format: float32, bf16 with bf16, int8 with int8 and int4."""
    if fmt.convert is None:
        lanes = pow2_divisor(hs, tile.lanes)
        return KvLayout(hs, "float32", hs, lanes, hs // lanes, None, False, ())
    vectors = -(-hs // VEC_LANES)
    if fmt.quantized:
        elements = vectors * VEC_LANES // 4 + 1
        return KvLayout(hs, "int32", elements, VEC_LANES, vectors, to_signed, True, fmt.intrinsics)
    return KvLayout(hs, "int32", vectors * VEC_LANES // 2, VEC_LANES, vectors, fmt.convert, False, fmt.intrinsics)
