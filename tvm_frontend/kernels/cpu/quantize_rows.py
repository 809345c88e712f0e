"""Rows of float32 become words of fewer bits, for the products of linear layers: see `formats`."""

from collections.abc import Callable
from operator import add

import numpy as np
from tvm.script import tirx as T

from tvm_frontend.kernels.cpu.formats import AT_ONCE, Arithmetic
from tvm_frontend.kernels.cpu.packing import GROUP
from tvm_frontend.kernels.cpu.register_tile import fold_lanes

FEW = 4  # rows up to which waking the other threads takes longer than the work
WITHOUT_SIGN = 0x7FFFFFFF  # of the bits of a float32; as whole numbers these are in the order of the values, NaN last
SMALLEST = int(np.float32(1e-30).view(np.int32))  # a largest value counts as no less: its inverse is finite
SHIFT = 12582912.0  # 1.5 · 2^23: added to it, a whole number is in the lowest bits
SHIFT_BITS = int(np.float32(SHIFT).view(np.int32))


@T.macro
def note_largest(largest, x, row, first):
    """largest[0] = the larger of it and |x[row, first : first + AT_ONCE]|, as whole numbers of their bits."""
    for lane in T.vectorized(AT_ONCE):
        largest[0, lane] = T.max(
            largest[0, lane], T.bitwise_and(T.reinterpret("int32", x[row, first + lane]), T.int32(WITHOUT_SIGN))
        )


@T.macro
def fill(numbers, value):
    """numbers[0] = value in each of AT_ONCE lanes of int32."""
    for lane in T.vectorized(AT_ONCE):
        numbers[0, lane] = T.int32(value)


def narrow_rows(K: int, arithmetic: Arithmetic) -> Callable:
    """A macro (x, words, scales, offsets, M): M rows of x [M, K] as words [M, arithmetic.words(K)].

    Scaled: their largest |value| is 127; scales [M, 1], grouped [M, groups], say of how much. A NaN, which no whole
    number is, goes into its scale. Grouped: offsets [M, groups] int32 are -8 · the sum of a group, as the numbers of
    the weight count from 8.
    """
    UNIT = GROUP if arithmetic.grouped else AT_ONCE
    FULL, RAGGED = K // UNIT, K % UNIT
    PARTS, WIDE = UNIT // AT_ONCE, AT_ONCE // arithmetic.values
    SCALED, GROUPED, narrow = arithmetic.scaled, arithmetic.grouped, arithmetic.narrow
    find_largest, add_up = fold_lanes(AT_ONCE, T.max), fold_lanes(AT_ONCE, add)

    @T.macro
    def fill_up(tail, x, row):
        for k in range(UNIT):
            tail[0, k] = T.float32(0)
        for k in range(RAGGED):
            tail[0, k] = x[row, FULL * UNIT + k]

    def narrowed(values, inverse):
        return narrow(values * T.broadcast(inverse[0], AT_ONCE) if SCALED else values)

    @T.macro
    def by_row(words, scales, x, tail, row):
        inverse = T.alloc_buffer((1,), "float32")
        inverse[0] = T.float32(1)
        if SCALED:
            largest = T.alloc_buffer((1, AT_ONCE), "int32")
            fill(largest, SMALLEST)
            for c in range(FULL):
                note_largest(largest, x, row, c * AT_ONCE)
            if RAGGED > 0:
                note_largest(largest, tail, 0, 0)
            find_largest(largest, 0)
            scales[row, 0] = T.reinterpret("float32", largest[0, 0]) * T.float32(1 / 127)
            inverse[0] = T.float32(127) / T.reinterpret("float32", largest[0, 0])
        for c in range(FULL):
            words[row, T.ramp(c * WIDE, 1, WIDE)] = narrowed(x[row, T.ramp(c * AT_ONCE, 1, AT_ONCE)], inverse)
        if RAGGED > 0:
            words[row, T.ramp(FULL * WIDE, 1, WIDE)] = narrowed(tail[0, T.ramp(0, 1, AT_ONCE)], inverse)

    @T.macro
    def one_group(words, scales, offsets, row, g, x, x_row, first):
        largest = T.alloc_buffer((1, AT_ONCE), "int32")
        total = T.alloc_buffer((1, AT_ONCE), "int32")
        whole = T.alloc_buffer((PARTS, AT_ONCE), "float32")
        fill(largest, SMALLEST)
        fill(total, 0)
        for part in T.unroll(PARTS):
            note_largest(largest, x, x_row, first + part * AT_ONCE)
        find_largest(largest, 0)
        scales[row, g] = T.reinterpret("float32", largest[0, 0]) * T.float32(1 / 127)
        for part in T.unroll(PARTS):
            for lane in T.vectorized(AT_ONCE):
                whole[part, lane] = T.nearbyint(
                    x[x_row, first + part * AT_ONCE + lane] * (T.float32(127) / T.reinterpret("float32", largest[0, 0]))
                )
            for lane in T.vectorized(AT_ONCE):
                total[0, lane] = total[0, lane] + (
                    T.reinterpret("int32", whole[part, lane] + T.float32(SHIFT)) - T.int32(SHIFT_BITS)
                )
            words[row, T.ramp((g * PARTS + part) * WIDE, 1, WIDE)] = narrow(whole[part, T.ramp(0, 1, AT_ONCE)])
        add_up(total, 0)
        offsets[row, g] = total[0, 0] * T.int32(-8)

    @T.macro
    def one_row(x, words, scales, offsets, row):
        tail = T.alloc_buffer((1, UNIT), "float32")
        if RAGGED > 0:
            fill_up(tail, x, row)
        if GROUPED:
            for g in range(FULL):
                one_group(words, scales, offsets, row, g, x, row, g * GROUP)
            if RAGGED > 0:
                one_group(words, scales, offsets, row, FULL, tail, 0, 0)
        else:
            by_row(words, scales, x, tail, row)

    @T.macro
    def rows(x, words, scales, offsets, M):
        if M <= FEW:
            for row in range(M):
                one_row(x, words, scales, offsets, row)
        else:
            for row in T.parallel(M):
                one_row(x, words, scales, offsets, row)

    return rows
