"""The register tile, an MR x NR block of accumulators, and the vector operations that every kernel here is built from.

Buffers have the scope that `T.alloc_buffer` gives by default: below 1 KiB TVM makes them stack allocas, which LLVM
promotes to registers. `local` scope, which `i: T.int64 = …` has as well, goes through TVM's workspace allocator on
every entry, whatever the size. The 8 x 2 tile of AVX-512 is exactly 1 KiB: it costs one allocation per task.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T

from tvm_frontend.target import CompileTarget


@dataclass(frozen=True)
class Tile:
    """An MR x NR block of accumulators that stays in vector registers while the micro-kernel runs over k.

    One step of k loads `nr_vectors` registers of the packed panel, broadcasts `mr` elements of x and does
    mr * nr_vectors fused multiply-adds.
    """

    mr: int  # rows of x
    nr_vectors: int  # vector registers across
    lanes: int  # float32 elements per vector register

    @property
    def nr(self) -> int:
        """Columns of the tile, and of a packed panel: nr_vectors * lanes."""
        return self.nr_vectors * self.lanes


def tile_for(target: CompileTarget) -> Tile:
    """Return the largest tile whose accumulators and operands fit in the CPU's vector registers.

    AVX-512 has 32 registers: 8 x 2 accumulators. AVX2 and SSE have 16: 6 x 2. Both have more than the 8 independent
    chains that keep two FMA units with a latency of 4 cycles busy (https://uops.info).
    """
    lanes = target.vector_bits // 32
    return Tile(8, 2, lanes) if target.vector_bits == 512 else Tile(6, 2, lanes)


@T.macro
def clear(tile, acc):
    """acc[mr, nr] = 0."""
    for i in T.unroll(tile.mr):
        for v in T.unroll(tile.nr_vectors):
            for lane in T.vectorized(tile.lanes):
                acc[i, v * tile.lanes + lane] = T.Cast(acc.dtype, 0)


def pow2_divisor(number: int, largest: int) -> int:
    """Return the largest power of two up to `largest` that divides `number`."""
    return next(size for size in (64, 32, 16, 8, 4, 2, 1) if size <= largest and number % size == 0)


def vector_slice(first: Expr | int, lanes: int) -> Expr | int:
    """Return the index of `lanes` consecutive elements, as one vector load or store needs it."""
    return first if lanes == 1 else T.ramp(first, 1, lanes)


def broadcast(value: Expr, lanes: int) -> Expr:
    """Return a vector of `lanes` copies of a scalar."""
    return value if lanes == 1 else T.broadcast(value, lanes)


def horizontal_reduce(lanes: int, combine: Callable) -> Callable:
    """Build a macro (partial, i) that reduces the lanes of partial[i] to partial[i, 0], upper half onto lower half.

    lanes: a power of two. combine: (Expr, Expr) → Expr, associative and commutative.
    """
    if lanes == 1:

        @T.macro
        def done(partial, i):
            pass

        return done
    half = lanes // 2
    rest = horizontal_reduce(half, combine)

    @T.macro
    def reduce(partial, i):
        for lane in T.vectorized(half):
            partial[i, lane] = combine(partial[i, lane], partial[i, half + lane])
        rest(partial, i)

    return reduce
