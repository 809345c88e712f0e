"""What this machine can do at best, measured with kernels of our own at the same number of threads."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bench.harness.worker import sample
from bench.roofline.bounds import FLOAT32_BYTES

if TYPE_CHECKING:
    import tvm

# Widths in float32 and accumulators to try: the fastest pair says what the machine can do, whatever its instructions.
# Two FMA units of four cycles' latency keep eight accumulators busy; more than the registers hold would be spilled.
WIDTHS = (4, 8, 16)
ACCUMULATORS = (8, 12, 24)
FMA_STEPS = 200_000  # of one call: a third of a millisecond or so
BYTES_A_CALL = 200_000_000  # read in one call, by passing several times over what fits a cache
CALLS_S = 0.05  # of calls of a kernel, each time that a rate is asked for
KEPT = 3  # of those for multiply-adds, as some are equally fast and one may have met a slow moment
STREAMS = 2  # that a thread reads at once, 64 bytes of each in turn: CPUs fetch ahead for each
FILL = {"float32": 0.5, "int32": 0x3F003F00}  # what the kernels read; a word is two bfloat16 of 0.5, or four int8
UNCACHED_BYTES = 512_000_000  # more than the caches of most machines hold

FMA_KERNEL = """
@T.prim_func(s_tir=True)
def kernel(
    x: T.Buffer((2, {width}), "float32"), out: T.Buffer(({threads}, {accumulators}, {width}), "float32")
):
    T.func_attr({{"global_symbol": "kernel", "tirx.noalias": True}})
    for thread in T.parallel({threads}):
        with T.sblock("one"):
            p = T.axis.spatial({threads}, thread)
            sums = T.sblock_alloc_buffer(({accumulators}, {width}), "float32")
            for a in T.unroll({accumulators}):
                for lane in T.vectorized({width}):
                    sums[a, lane] = 0.0
            for step in range({steps}):
                for a in T.unroll({accumulators}):
                    for lane in T.vectorized({width}):
                        sums[a, lane] = sums[a, lane] * x[0, lane] + x[1, lane]
            for a in T.unroll({accumulators}):
                for lane in T.vectorized({width}):
                    out[p, a, lane] = sums[a, lane]
"""
# The same with the instructions that add up products of narrower numbers, as words of two or four of them.
DOT_KERNEL = """
@T.prim_func(s_tir=True)
def kernel(
    x: T.Buffer((2, {width}), "int32"), out: T.Buffer(({threads}, {accumulators}, {width}), "{total}")
):
    T.func_attr({{"global_symbol": "kernel", "tirx.noalias": True}})
    for thread in T.parallel({threads}, annotations=imports):
        with T.sblock("one"):
            p = T.axis.spatial({threads}, thread)
            sums = T.sblock_alloc_buffer(({accumulators}, {width}), "{total}")
            for a in T.unroll({accumulators}):
                for lane in T.vectorized({width}):
                    sums[a, lane] = T.Cast("{total}", 0)
            for step in range({steps}):
                for a in T.unroll({accumulators}):
                    sums[a, T.ramp(0, 1, {width})] = dot(
                        sums[a, T.ramp(0, 1, {width})], x[0, 0], x[1, T.ramp(0, 1, {width})]
                    )
            for a in T.unroll({accumulators}):
                for lane in T.vectorized({width}):
                    out[p, a, lane] = sums[a, lane]
"""
READ_KERNEL = """
@T.prim_func(s_tir=True)
def kernel(
    data: T.Buffer(({threads}, {streams}, {rows}, {accumulators}, {width}), "float32"),
    out: T.Buffer(({threads}, {streams}, {accumulators}, {width}), "float32"),
):
    T.func_attr({{"global_symbol": "kernel", "tirx.noalias": True}})
    for thread in T.parallel({threads}):
        with T.sblock("one"):
            p = T.axis.spatial({threads}, thread)
            sums = T.sblock_alloc_buffer(({streams}, {accumulators}, {width}), "float32")
            for s in T.unroll({streams}):
                for a in T.unroll({accumulators}):
                    for lane in T.vectorized({width}):
                        sums[s, a, lane] = 0.0
            for passes in range({passes}):
                for row in range({rows}):
                    for s in T.unroll({streams}):
                        for a in T.unroll({accumulators}):
                            for lane in T.vectorized({width}):
                                sums[s, a, lane] = sums[s, a, lane] + data[p, s, row, a, lane]
            for s in T.unroll({streams}):
                for a in T.unroll({accumulators}):
                    for lane in T.vectorized({width}):
                        out[p, s, a, lane] = sums[s, a, lane]
"""
FACTORY = f"{__name__}:Probe"


@dataclass(frozen=True)
class Kernel:
    """What one call of it does (operations, or bytes read), and the call."""

    amount: float
    call: Callable[[], object]

    def rate(self) -> float:
        """A second, in the fastest of the calls of a moment."""
        return self.amount / min(sample(self.call, CALLS_S))


class Probe:
    """Measures the limits, in a worker. The best call counts: a limit is not an average.

    Kernels, and the memory that they read, are kept: asked again, it measures at once.
    """

    def load(self, threads: int) -> None:
        """Make ready for `threads` threads."""
        self._threads = threads
        self._multipliers: dict[str, list[Kernel]] = {}
        self._readers: dict[int, Kernel] = {}
        self._filled: dict[str, np.ndarray] = {}

    def peak_flops_per_s(self, precision: str = "fp32") -> float:
        """Multiply-adds a second, times two, by the best of the kernels; of int4 as of int8, which it becomes.

        The first time all kernels are tried, later those that were the fastest then.
        """
        kernels = self._multipliers.get(precision) or self._make_multipliers(precision)
        rates = {kernel: kernel.rate() for kernel in kernels}
        self._multipliers[precision] = sorted(rates, key=rates.__getitem__)[-KEPT:]
        return max(rates.values())

    def read_bytes_per_s(self, working_set_bytes: int) -> float:
        """Bytes read a second from a working set of (about) that size, shared out among the threads."""
        if working_set_bytes not in self._readers:
            self._readers[working_set_bytes] = self._make_reader(working_set_bytes)
        return self._readers[working_set_bytes].rate()

    def _make_reader(self, working_set_bytes: int) -> Kernel:
        width, accumulators = 16, 4
        row_bytes = self._threads * STREAMS * width * accumulators * FLOAT32_BYTES
        rows = max(1, round(working_set_bytes / row_bytes))
        passes = max(1, round(BYTES_A_CALL / (rows * row_bytes)))
        shapes = [(self._threads, STREAMS, rows, accumulators, width), (self._threads, STREAMS, accumulators, width)]
        call = self._compile(READ_KERNEL, shapes, streams=STREAMS, rows=rows, passes=passes)
        return Kernel(rows * row_bytes * passes, call)

    def _make_multipliers(self, precision: str) -> list[Kernel]:
        kernels = [self._make_fma(width, accumulators) for width in WIDTHS for accumulators in ACCUMULATORS]
        if precision == "fp32":
            return kernels
        narrow = "bf16" if precision == "bf16" else "int8"
        return kernels + [self._make_dot(narrow, accumulators) for accumulators in ACCUMULATORS]

    def _make_fma(self, width: int, accumulators: int) -> Kernel:
        out = (self._threads, accumulators, width)
        call = self._compile(FMA_KERNEL, [(2, width), out], steps=FMA_STEPS)
        return Kernel(2 * self._threads * accumulators * width * FMA_STEPS, call)

    def _make_dot(self, precision: str, accumulators: int) -> Kernel:
        """As `_make_fma`, with what the target has for a word of bf16 or int8."""
        from tvm_frontend.kernels.cpu.formats import gemm_format
        from tvm_frontend.kernels.cpu.intrinsics import import_llvm
        from tvm_frontend.target import resolve_target

        target = resolve_target()
        fmt, width = gemm_format(precision, target), target.vector_bits // 32
        imports = import_llvm(*fmt.intrinsics)
        names, sizes = {"dot": fmt.dot, "imports": imports}, {"total": fmt.acc_dtype, "steps": FMA_STEPS}
        shapes = [(2, width), (self._threads, accumulators, width)]
        call = self._compile(DOT_KERNEL, shapes, names, ("int32", fmt.acc_dtype), **sizes)
        return Kernel(2 * fmt.pack_factor * self._threads * accumulators * width * FMA_STEPS, call)

    def _compile(
        self,
        source: str,
        shapes: list[tuple[int, ...]],
        names: dict[str, object] | None = None,
        dtypes: tuple[str, str] = ("float32", "float32"),
        **sizes: object,
    ) -> Callable[[], object]:
        """A call of a kernel of an input and an output; names: that its text uses."""
        import tvm
        from tvm.script import from_source
        from tvm.script import tirx as T

        from tvm_frontend.target import resolve_target

        *_, accumulators, width = shapes[-1]
        text = source.format(threads=self._threads, accumulators=accumulators, width=width, **sizes)
        module = tvm.IRModule({"kernel": from_source(text, {"T": T, **(names or {})})})
        kernel = tvm.compile(module, target=resolve_target().to_tvm())["kernel"]
        data, out = self._input(shapes[0], dtypes[0]), tvm.runtime.empty(shapes[1], dtypes[1])
        return lambda: kernel(data, out)

    def _input(self, shape: tuple[int, ...], dtype: str) -> "tvm.runtime.Tensor":
        """Filled memory, the same for all kernels, of which one reads as much as its shape says."""
        import tvm

        size = math.prod(shape)
        if size > self._filled.get(dtype, np.empty(0)).size:
            self._filled[dtype] = np.from_dlpack(tvm.runtime.empty((size,), dtype))
            self._filled[dtype].fill(FILL[dtype])
        return tvm.runtime.from_dlpack(self._filled[dtype][:size].reshape(shape))
