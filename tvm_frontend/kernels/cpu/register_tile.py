"""The register tile that every kernel here is built from, and how large it may be on a CPU.

It is a buffer of the scope that T.alloc_buffer gives it: below 1 KB TVM puts those on the stack. For one of scope
local, which `i: T.int64 = …` makes too, it calls its allocator at each entry, whatever its size; and once a task for
AVX-512's tile of 8 × 2 registers, which is 1 KB.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T

from tvm_frontend.target import CompileTarget


@dataclass(frozen=True)
class Tile:
    """An accumulator of rows × columns that stays in vector registers.

    rows: values broadcast a step. vectors: registers across. lanes: float32 a register. One step of the inner loop
    loads `vectors` registers, broadcasts `rows` values and does rows · vectors fused multiply-adds.
    """

    rows: int
    vectors: int
    lanes: int

    @property
    def columns(self) -> int:
        """float32 values across the tile."""
        return self.vectors * self.lanes


def tile_for(target: CompileTarget) -> Tile:
    """The largest tile that hides the multiply-add's latency and leaves registers for the operands.

    AVX-512 has 32 registers: 8 × 2 accumulators. AVX2 and SSE have 16: 6 × 2. Fewer than about 8 chains would wait for
    the 4 cycles that a multiply-add takes on current cores (https://uops.info).
    """
    lanes = target.vector_bits // 32
    return Tile(8, 2, lanes) if target.vector_bits == 512 else Tile(6, 2, lanes)


@T.macro
def clear(tile, accumulator):
    """accumulator[rows, columns] = 0."""
    for i in T.unroll(tile.rows):
        for v in T.unroll(tile.vectors):
            for lane in T.vectorized(tile.lanes):
                accumulator[i, v * tile.lanes + lane] = T.Cast(accumulator.dtype, 0)


def divisor(number: int, largest: int) -> int:
    """The largest power of two up to `largest` that divides `number`."""
    return next(size for size in (64, 32, 16, 8, 4, 2, 1) if size <= largest and number % size == 0)


def span(first: Expr | int, lanes: int) -> Expr | int:
    """The index of `lanes` neighbours in memory."""
    return first if lanes == 1 else T.ramp(first, 1, lanes)


def spread(value: Expr, lanes: int) -> Expr:
    """A register of one value."""
    return value if lanes == 1 else T.broadcast(value, lanes)


def fold_lanes(lanes: int, join: Callable) -> Callable:
    """A macro (partial, i): all lanes of partial[i], a power of two, joined in partial[i, 0], half onto half."""
    if lanes == 1:

        @T.macro
        def done(partial, i):
            pass

        return done
    half = lanes // 2
    rest = fold_lanes(half, join)

    @T.macro
    def fold(partial, i):
        for lane in T.vectorized(half):
            partial[i, lane] = join(partial[i, lane], partial[i, half + lane])
        rest(partial, i)

    return fold
