"""Rows of x, fp32, are converted to the packed elements that the micro-kernel reads, once per call of `linear`.

bf16: each element is rounded. int8: a row is divided by its scale, absmax / 127, and rounded. int4: so is each group of
GROUP_SIZE elements of the row. One row is one task; a pass for the absmax, which leaves the row in L1, and one to
convert it:

    x [M, K] fp32       row r:  | x x x … x |                  absmax over K, or over each group
    packed [M, K/p]             | p elements per int32 | …     p = 2 (bf16), 4 (int8, and x of int4)
    scales [M, 1 or groups]     absmax / 127
    corrections [M, groups]     int4 only: -8 * sum of the group, for the weights' zero point of 8
"""

from collections.abc import Callable
from operator import add

import numpy as np
from tvm.script import tirx as T

from tvm_frontend.kernels.cpu.formats import VEC_LANES, GemmFormat
from tvm_frontend.kernels.cpu.packing import GROUP_SIZE
from tvm_frontend.kernels.cpu.register_tile import horizontal_reduce

SERIAL_ROWS = 4  # up to this many rows run serially: waking the threads costs more than quantising them
ABS_MASK = 0x7FFFFFFF  # clears the sign bit: non-negative floats compare like their int32 bits, with NaN largest
MIN_ABSMAX_BITS = int(np.float32(1e-30).view(np.int32))  # lower clamp, so that an all-zero row's 127 / absmax is finite
ROUND_MAGIC = 12582912.0  # 1.5 * 2^23: added to it, an integer is in the lowest bits
ROUND_MAGIC_BITS = int(np.float32(ROUND_MAGIC).view(np.int32))


@T.macro
def update_absmax(absmax, x, row, first):
    """absmax[0] = max(absmax[0], |x[row, first : first + VEC_LANES]|), lane by lane, as int32 bits."""
    for lane in T.vectorized(VEC_LANES):
        absmax[0, lane] = T.max(
            absmax[0, lane], T.bitwise_and(T.reinterpret("int32", x[row, first + lane]), T.int32(ABS_MASK))
        )


@T.macro
def fill(vector, value):
    """vector[0] = value, in each of VEC_LANES lanes of int32."""
    for lane in T.vectorized(VEC_LANES):
        vector[0, lane] = T.int32(value)


def quantize_rows(K: int, fmt: GemmFormat) -> Callable:
    """Build a macro (x, packed, scales, corrections, M) that converts x, float32 [M, K], as the head of this file says.

    packed: storage elements [M, fmt.row_elements(K)]. A NaN, which no integer is, is carried by its scale: it turns the
    whole row, or group, into NaN. Raises ValueError for fp32, which needs no such macro.
    """
    UNIT = GROUP_SIZE if fmt.groupwise else VEC_LANES
    FULL, TAIL = K // UNIT, K % UNIT
    VECTORS, VECTOR_ELEMENTS = UNIT // VEC_LANES, VEC_LANES // fmt.pack_factor
    QUANTIZED, GROUPWISE, convert = fmt.quantized, fmt.groupwise, fmt.convert
    if convert is None:
        raise ValueError(f"format {fmt.precision}: stores rows as they are, with nothing to convert")
    reduce_max, reduce_add = horizontal_reduce(VEC_LANES, T.max), horizontal_reduce(VEC_LANES, add)

    def converted(values, reciprocal):
        return convert(values * T.broadcast(reciprocal[0], VEC_LANES) if QUANTIZED else values)

    @T.macro
    def load_tail(tail, x, row):
        """tail[0] = the last K % UNIT elements of the row, padded with zeros."""
        for k in range(UNIT):
            tail[0, k] = T.float32(0)
        for k in range(TAIL):
            tail[0, k] = x[row, FULL * UNIT + k]

    @T.macro
    def quantize_row(packed, scales, x, tail, row):
        reciprocal = T.alloc_buffer((1,), "float32")
        reciprocal[0] = T.float32(1)
        if QUANTIZED:
            absmax = T.alloc_buffer((1, VEC_LANES), "int32")
            fill(absmax, MIN_ABSMAX_BITS)
            for c in range(FULL):
                update_absmax(absmax, x, row, c * VEC_LANES)
            if TAIL > 0:
                update_absmax(absmax, tail, 0, 0)
            reduce_max(absmax, 0)
            scales[row, 0] = T.reinterpret("float32", absmax[0, 0]) * T.float32(1 / 127)
            reciprocal[0] = T.float32(127) / T.reinterpret("float32", absmax[0, 0])
        for c in range(FULL):
            packed[row, T.ramp(c * VECTOR_ELEMENTS, 1, VECTOR_ELEMENTS)] = converted(
                x[row, T.ramp(c * VEC_LANES, 1, VEC_LANES)], reciprocal
            )
        if TAIL > 0:
            packed[row, T.ramp(FULL * VECTOR_ELEMENTS, 1, VECTOR_ELEMENTS)] = converted(
                tail[0, T.ramp(0, 1, VEC_LANES)], reciprocal
            )

    @T.macro
    def quantize_group(packed, scales, corrections, row, g, x, x_row, first):
        """Group g of a row, whose elements are x[x_row, first : first + GROUP_SIZE]."""
        absmax = T.alloc_buffer((1, VEC_LANES), "int32")
        group_sum = T.alloc_buffer((1, VEC_LANES), "int32")
        rounded = T.alloc_buffer((VECTORS, VEC_LANES), "float32")
        fill(absmax, MIN_ABSMAX_BITS)
        fill(group_sum, 0)
        for v in T.unroll(VECTORS):
            update_absmax(absmax, x, x_row, first + v * VEC_LANES)
        reduce_max(absmax, 0)
        scales[row, g] = T.reinterpret("float32", absmax[0, 0]) * T.float32(1 / 127)
        for v in T.unroll(VECTORS):
            for lane in T.vectorized(VEC_LANES):
                rounded[v, lane] = T.nearbyint(
                    x[x_row, first + v * VEC_LANES + lane] * (T.float32(127) / T.reinterpret("float32", absmax[0, 0]))
                )
            for lane in T.vectorized(VEC_LANES):
                group_sum[0, lane] = group_sum[0, lane] + (
                    T.reinterpret("int32", rounded[v, lane] + T.float32(ROUND_MAGIC)) - T.int32(ROUND_MAGIC_BITS)
                )
            packed[row, T.ramp((g * VECTORS + v) * VECTOR_ELEMENTS, 1, VECTOR_ELEMENTS)] = convert(
                rounded[v, T.ramp(0, 1, VEC_LANES)]
            )
        reduce_add(group_sum, 0)
        corrections[row, g] = group_sum[0, 0] * T.int32(-8)

    @T.macro
    def convert_row(x, packed, scales, corrections, row):
        tail = T.alloc_buffer((1, UNIT), "float32")
        if TAIL > 0:
            load_tail(tail, x, row)
        if GROUPWISE:
            for g in range(FULL):
                quantize_group(packed, scales, corrections, row, g, x, row, g * GROUP_SIZE)
            if TAIL > 0:
                quantize_group(packed, scales, corrections, row, FULL, tail, 0, 0)
        else:
            quantize_row(packed, scales, x, tail, row)

    @T.macro
    def convert_rows(x, packed, scales, corrections, M):
        if M <= SERIAL_ROWS:
            for row in range(M):
                convert_row(x, packed, scales, corrections, row)
        else:
            for row in T.parallel(M):
                convert_row(x, packed, scales, corrections, row)

    return convert_rows
