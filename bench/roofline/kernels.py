"""TensorIR micro-benchmarks behind the roofline: independent multiply-add chains, and a streaming read.

Each kernel gives one task to each of `threads` threads and keeps `accumulators` vectors of `width` elements in
registers. The sums are stored at the end, or LLVM would remove the loops as dead code.
"""

from collections.abc import Callable

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T


def fma_kernel(threads: int, accumulators: int, width: int, steps: int) -> tvm.tirx.PrimFunc:
    """Build sums = sums · x[0] + x[1], `steps` times in float32: x [2, width], out [threads, accumulators, width].

    The chains do not depend on one another, so `accumulators` of them hide the latency of one multiply-add.
    """

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((2, width), "float32"), out: T.Buffer((threads, accumulators, width), "float32")):
        T.func_attr({"global_symbol": "kernel", "tirx.noalias": True})
        for thread in T.parallel(threads):
            with T.sblock("one"):
                p = T.axis.spatial(threads, thread)
                sums = T.sblock_alloc_buffer((accumulators, width), "float32")
                for a in T.unroll(accumulators):
                    for lane in T.vectorized(width):
                        sums[a, lane] = 0.0
                for _ in range(steps):
                    for a in T.unroll(accumulators):
                        for lane in T.vectorized(width):
                            sums[a, lane] = sums[a, lane] * x[0, lane] + x[1, lane]
                for a in T.unroll(accumulators):
                    for lane in T.vectorized(width):
                        out[p, a, lane] = sums[a, lane]

    return kernel


def dot_kernel(
    out_shape: tuple[int, int, int],
    x_shape: tuple[int, int],
    passes: int,
    dot: Callable[[Expr, Expr, Expr], Expr],
    acc_dtype: str,
    imports: dict[str, str],
) -> tvm.tirx.PrimFunc:
    """Build sums[a] = dot(sums[a], x[row, a], x[0, :width]) over all rows, `passes` times; x is packed int32.

    dot adds the products of two bf16 or four int8 to each accumulator of `acc_dtype`. Each accumulator has factors of
    its own and they change from row to row: equal products would be computed once for all, and constant ones once for
    all steps, where a target has no instruction that multiplies and adds. imports: the loop annotations with the LLVM
    IR of the functions that dot calls. out_shape: [threads, accumulators, width].
    """
    threads, accumulators, width = out_shape
    rows, columns = x_shape

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((rows, columns), "int32"), out: T.Buffer((threads, accumulators, width), acc_dtype)):
        T.func_attr({"global_symbol": "kernel", "tirx.noalias": True})
        for thread in T.parallel(threads, annotations=imports):
            with T.sblock("one"):
                p = T.axis.spatial(threads, thread)
                sums = T.sblock_alloc_buffer((accumulators, width), acc_dtype)
                for a in T.unroll(accumulators):
                    for lane in T.vectorized(width):
                        sums[a, lane] = T.Cast(acc_dtype, 0)
                for _ in range(passes):
                    for row in range(rows):
                        for a in T.unroll(accumulators):
                            sums[a, T.ramp(0, 1, width)] = dot(
                                sums[a, T.ramp(0, 1, width)], x[row, a], x[0, T.ramp(0, 1, width)]
                            )
                for a in T.unroll(accumulators):
                    for lane in T.vectorized(width):
                        out[p, a, lane] = sums[a, lane]

    return kernel


def read_kernel(threads: int, streams: int, rows: int, accumulators: int, width: int, passes: int) -> tvm.tirx.PrimFunc:
    """Build a sum over data [threads, streams, rows, accumulators, width], read `passes` times in float32.

    A thread reads its streams a row of each in turn, so that several hardware prefetchers run ahead.
    """

    @T.prim_func(s_tir=True)
    def kernel(
        data: T.Buffer((threads, streams, rows, accumulators, width), "float32"),
        out: T.Buffer((threads, streams, accumulators, width), "float32"),
    ):
        T.func_attr({"global_symbol": "kernel", "tirx.noalias": True})
        for thread in T.parallel(threads):
            with T.sblock("one"):
                p = T.axis.spatial(threads, thread)
                sums = T.sblock_alloc_buffer((streams, accumulators, width), "float32")
                for s in T.unroll(streams):
                    for a in T.unroll(accumulators):
                        for lane in T.vectorized(width):
                            sums[s, a, lane] = 0.0
                for _ in range(passes):
                    for row in range(rows):
                        for s in T.unroll(streams):
                            for a in T.unroll(accumulators):
                                for lane in T.vectorized(width):
                                    sums[s, a, lane] = sums[s, a, lane] + data[p, s, row, a, lane]
                for s in T.unroll(streams):
                    for a in T.unroll(accumulators):
                        for lane in T.vectorized(width):
                            out[p, s, a, lane] = sums[s, a, lane]

    return kernel
