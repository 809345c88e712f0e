"""GEMM micro-kernel: an MR x NR register tile, MR rows of x times one packed weight panel, over all of K.

It is loop 1 of `linear`, where the five loops stand. Per step of k it reads:

       x [M, K/p]                    panel of W [K/p, NR], packed: the next step is the next NR elements in memory
         k                             |<--- NR_VECTORS vectors --->|
    row  [e] broadcast  ── x ──  k     [ e e e e e e | e e e e e e ]   e: a storage element of p consecutive k
    row  [e]                                                           (p = 1 fp32, 2 bf16, 4 int8)
    …    [e]                         acc [MR, NR]: MR x NR_VECTORS vector registers, which stay there over all of k
    MR rows

For each of the MR x NR_VECTORS registers a step is one dot-product instruction, `fmt.dot`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T

from tvm_frontend.kernels.cpu.formats import GemmFormat
from tvm_frontend.kernels.cpu.intrinsics import prefetch
from tvm_frontend.kernels.cpu.packing import GROUP_SIZE
from tvm_frontend.kernels.cpu.register_tile import Tile, clear

UNROLL_K = 4  # steps of k per iteration of the k loop; without it loop overhead is up to half the time
# KC in iterations: in fp32 an accumulator takes KC = 256 products and is then flushed to a second one (blocked
# summation), as the rounding error of one sum grows with its length.
KC_ITERS = 64
LINE_ELEMENTS = 16  # storage elements in a cache line of 64 bytes
# Prefetch the next panel only if it is this small: then two panels and the x block fit in L2 together.
PREFETCH_PANEL_BYTES = 2**17
LOW_NIBBLES, UPPER_BF16 = 0x0F0F0F0F, -0x10000  # masks of an int32: the low nibble of each byte; its upper bf16

NO_BUFFER = None


@dataclass(frozen=True, eq=False)
class GemmBuffers:
    """The buffers of one GEMM out [M, N] = x [M, K] · W [K, N]; NO_BUFFER for what this one has not."""

    x: T.Buffer  # storage elements [M, fmt.row_elements(K)]
    w: T.Buffer  # the packed panels of `fmt.pack`
    params: T.Buffer  # float32 [fmt.epilogue_rows, N], of `fmt.epilogue_params`
    residual: T.Buffer | None  # float32 [M, N], which the epilogue adds
    out: T.Buffer  # [M, N] float32, or [M, N/2] pairs of bf16
    scales: T.Buffer | None = NO_BUFFER  # of quantised x: float32 [M, 1], or [M, groups]
    corrections: T.Buffer | None = NO_BUFFER  # of group-wise quantised x, for W's zero point: int32 [M, groups]


@dataclass(frozen=True, eq=False)
class TileIndex:
    """Where a register tile lies in out, and what it prefetches."""

    panel: Expr  # of the N / NR packed panels
    first: Expr  # row of out
    last: Expr  # the last row of out, M - 1
    ahead: Expr | None  # index of the tile in its task, which prefetches that share of the next panel; None: nothing

    def row(self, i: Expr) -> Expr:
        """Return row i of the tile. Tail rows are clamped to M - 1, so no mask is needed: duplicates store the same."""
        return T.min(self.first + i, self.last)


def k_splits(mr: int) -> int:
    """Return how many independent accumulators a row has: with few rows, k is split to hide the latency of the FMA."""
    return max(1, UNROLL_K // mr)


def accumulator_rows(mr: int, fmt: GemmFormat) -> int:
    """Return the rows of the buffer of accumulators that the micro-kernel needs for mr rows of x."""
    return mr if fmt.groupwise else mr * k_splits(mr)


def microkernel(K: int, panels: int, tile: Tile, fmt: GemmFormat) -> Callable:
    """Build a macro (mr, acc, gemm: GemmBuffers, at: TileIndex): acc[:mr] = x[at.row(0 … mr - 1)] · W[:, at.panel].

    acc: fmt.acc_dtype [accumulator_rows(mr, fmt), NR]. The module must import the intrinsic PREFETCH.
    """
    return _groupwise(K, tile, fmt) if fmt.groupwise else _over_k(K, panels, tile, fmt)


def _over_k(K: int, panels: int, tile: Tile, fmt: GemmFormat) -> Callable:
    """fp32, bf16 and int8: one accumulation over all of K.

    for each KC block (fp32 only; else one of all K)       KC = 256: partial sums, flushed into acc
        for each iteration in it, UNROLL_K steps of k      one prefetch of the next panel per iteration
            MR x NR_VECTORS dot products                   in registers
    acc += the other accumulators of the row, if split
    """
    NR, LANES, VECTORS = tile.nr, tile.lanes, tile.nr_vectors
    ELEMENTS, dot = fmt.row_elements(K), fmt.dot
    ITERS = ELEMENTS // UNROLL_K
    KC_BLOCKS = -(-ITERS // KC_ITERS) if fmt.pack_factor == 1 else 1
    PREFETCHES = 4 * ELEMENTS * NR <= PREFETCH_PANEL_BYTES
    PREFETCH_TILES = max(1, NR * UNROLL_K // LINE_ELEMENTS)  # so many tiles, a line per iteration, fetch a whole panel

    @T.macro
    def step(mr, base, acc, gemm, at, k):
        for i in T.unroll(mr):
            for v in T.unroll(VECTORS):
                acc[base + i, T.ramp(v * LANES, 1, LANES)] = dot(
                    acc[base + i, T.ramp(v * LANES, 1, LANES)],
                    gemm.x[at.row(i), k],
                    gemm.w[at.panel, k, T.ramp(v * LANES, 1, LANES)],
                )

    @T.macro
    def accumulate(mr, acc, partial, base):
        """acc[i] += partial[base + i]."""
        for i in T.unroll(mr):
            for v in T.unroll(VECTORS):
                columns = T.meta_var(T.ramp(v * LANES, 1, LANES))
                acc[i, columns] = acc[i, columns] + partial[base + i, columns]

    @T.macro
    def k_loop(mr, splits, acc, gemm, at, first_iter, iters):
        for each in range(iters):
            it: T.let = first_iter + each
            if at.ahead is not None and PREFETCHES:
                line = T.meta_var(at.ahead % PREFETCH_TILES * ITERS + it)
                prefetch(gemm.w[T.min(at.panel + 1, panels - 1), 0, line * LINE_ELEMENTS])
            for u in T.unroll(UNROLL_K):
                step(mr, u % splits * mr, acc, gemm, at, it * UNROLL_K + u)

    @T.macro
    def kernel(mr, acc, gemm, at):
        splits = T.meta_var(k_splits(mr))
        acc_tile = T.meta_var(Tile(splits * mr, VECTORS, LANES))
        clear(acc_tile, acc)
        if KC_BLOCKS > 1:
            partial = T.alloc_buffer((splits * mr, NR), fmt.acc_dtype)
            for block in range(KC_BLOCKS):
                iters = T.meta_var(T.min(KC_ITERS, ITERS - block * KC_ITERS))
                clear(acc_tile, partial)
                k_loop(mr, splits, partial, gemm, at, block * KC_ITERS, iters)
                accumulate(splits * mr, acc, partial, 0)
        else:
            k_loop(mr, splits, acc, gemm, at, 0, ITERS)
        for u in T.unroll(ELEMENTS % UNROLL_K):
            step(mr, u % splits * mr, acc, gemm, at, ITERS * UNROLL_K + u)
        for s in T.unroll(splits - 1):
            accumulate(mr, acc, acc, (s + 1) * mr)

    return kernel


def _groupwise(K: int, tile: Tile, fmt: GemmFormat) -> Callable:
    """int4: int32 accumulation within a group of k, which is then dequantised and added in fp32.

    for each group of GROUP_SIZE = 32 k                    group_acc, int32, begins with x's zero-point correction
        for each of its 4 rows of 8 k, and half of it      low nibbles: k 0 … 3, high nibbles: k 4 … 7
            NR_VECTORS x MR dot products                   in registers
        acc += float32(group_acc) * (scale of W's group * scale of x's group)
    """
    NR, LANES, VECTORS = tile.nr, tile.lanes, tile.nr_vectors
    GROUPS, GROUP_ROWS, dot = -(-K // GROUP_SIZE), GROUP_SIZE // 8, fmt.dot

    def nibbles(elements, half):
        shifted = T.shift_right(elements, T.broadcast(4 * half, LANES))
        return T.bitwise_and(shifted, T.broadcast(LOW_NIBBLES, LANES))

    def weight_scale(element, v):
        return T.reinterpret("float32", T.bitwise_and(T.shift_left(element, 16 - 16 * v), T.int32(UPPER_BF16)))

    @T.macro
    def kernel(mr, acc, gemm, at):
        group_acc = T.alloc_buffer((mr, NR), "int32")
        clear(Tile(mr, VECTORS, LANES), acc)
        for g in range(GROUPS):
            for i in T.unroll(mr):
                for c in T.vectorized(NR):
                    group_acc[i, c] = gemm.corrections[at.row(i), g]
            for r in T.unroll(GROUP_ROWS):
                for half in T.unroll(2):
                    for v in T.unroll(VECTORS):
                        for i in T.unroll(mr):
                            group_acc[i, T.ramp(v * LANES, 1, LANES)] = dot(
                                group_acc[i, T.ramp(v * LANES, 1, LANES)],
                                gemm.x[at.row(i), (g * GROUP_ROWS + r) * 2 + half],
                                nibbles(gemm.w[at.panel, g, T.ramp(r * NR + v * LANES, 1, LANES)], half),
                            )
            for v in T.unroll(VECTORS):
                for i in T.unroll(mr):
                    for lane in T.vectorized(LANES):
                        acc[i, v * LANES + lane] = acc[i, v * LANES + lane] + T.Cast(
                            "float32", group_acc[i, v * LANES + lane]
                        ) * (
                            weight_scale(gemm.w[at.panel, g, GROUP_ROWS * NR + lane], v)
                            * gemm.scales[at.row(i), g]
                        )  # fmt: skip

    return kernel
