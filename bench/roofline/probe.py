"""Measures the peak arithmetic rate and the read bandwidth of this machine with micro-benchmarks.

TVM is imported inside functions: the parent process imports this file for FACTORY alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bench.harness.worker import sample
from bench.roofline.bounds import FLOAT32_BYTES

if TYPE_CHECKING:
    import tvm

# Vector widths in float32 and accumulators to try; the fastest pair counts, whatever instructions the machine has.
# Two FMA units of four cycles' latency keep eight accumulators busy; more than the registers hold are spilled.
WIDTHS = (4, 8, 16)
ACCUMULATORS = (8, 12, 24)
FMA_STEPS = 200_000  # loop iterations of one call, about a third of a millisecond
DOT_SLOTS = 250  # rows of packed factors that are multiplied in turn: they fit in L1, and LLVM does not unroll so many
BYTES_A_CALL = 200_000_000  # bytes read by one call; a working set that fits a cache is read several times
CALLS_S = 0.05  # seconds for which a kernel is called each time a rate is asked for
KEPT = 3  # keep the three fastest FMA kernels: several tie, and one run may have been disturbed
STREAMS = 2  # read streams per thread, interleaved by rows, so that more than one hardware prefetcher is active
FILL = {"float32": 0.5, "int32": 0x3F003F00}  # input values; an int32 holds two bf16 of 0.5, or four int8
UNCACHED_BYTES = 512_000_000  # more than the last-level caches of most machines hold

FACTORY = f"{__name__}:Probe"


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel with the work of one call, in operations or bytes."""

    work: float
    call: Callable[[], object]

    def rate(self) -> float:
        """Return the best observed throughput per second over about CALLS_S of calls."""
        return self.work / min(sample(self.call, CALLS_S))


class Probe:
    """Measures the machine's roofline in a worker process.

    The fastest call counts, as a roofline is what the machine can do at best and not on average. Compiled kernels and
    their input buffers are kept, so that a second measurement starts at once.
    """

    def load(self, threads: int) -> None:
        """Prepare to measure at `threads` threads."""
        self._threads = threads
        self._multipliers: dict[str, list[Kernel]] = {}
        self._readers: dict[int, Kernel] = {}
        self._filled: dict[str, np.ndarray] = {}

    def peak_flops_per_s(self, precision: str = "fp32") -> float:
        """Measure operations per second, a multiply-add counting as two; int4 is multiplied as int8.

        The first call tries all kernels, later calls only those that were the fastest then.
        """
        kernels = self._multipliers.get(precision) or self._make_multipliers(precision)
        rates = {kernel: kernel.rate() for kernel in kernels}
        self._multipliers[precision] = sorted(rates, key=rates.__getitem__)[-KEPT:]
        return max(rates.values())

    def read_bytes_per_s(self, working_set_bytes: int) -> float:
        """Measure bytes read per second from a working set of about that size, divided among the threads."""
        if working_set_bytes not in self._readers:
            self._readers[working_set_bytes] = self._make_reader(working_set_bytes)
        return self._readers[working_set_bytes].rate()

    def _make_reader(self, working_set_bytes: int) -> Kernel:
        from bench.roofline.kernels import read_kernel

        width, accumulators = 16, 4
        row_bytes = self._threads * STREAMS * width * accumulators * FLOAT32_BYTES
        rows = max(1, round(working_set_bytes / row_bytes))
        passes = max(1, round(BYTES_A_CALL / (rows * row_bytes)))
        kernel = read_kernel(self._threads, STREAMS, rows, accumulators, width, passes)
        shapes = (self._threads, STREAMS, rows, accumulators, width), (self._threads, STREAMS, accumulators, width)
        return Kernel(rows * row_bytes * passes, self._compile(kernel, *shapes))

    def _make_multipliers(self, precision: str) -> list[Kernel]:
        kernels = [self._make_fma(width, accumulators) for width in WIDTHS for accumulators in ACCUMULATORS]
        if precision == "fp32":
            return kernels
        packed = "bf16" if precision == "bf16" else "int8"
        return kernels + [self._make_dot(packed, accumulators) for accumulators in ACCUMULATORS]

    def _make_fma(self, width: int, accumulators: int) -> Kernel:
        from bench.roofline.kernels import fma_kernel

        kernel = fma_kernel(self._threads, accumulators, width, FMA_STEPS)
        call = self._compile(kernel, (2, width), (self._threads, accumulators, width))
        return Kernel(2 * self._threads * accumulators * width * FMA_STEPS, call)

    def _make_dot(self, precision: str, accumulators: int) -> Kernel:
        """Compile the multiply-adds of packed bf16 or int8, by the dot-product instruction that the target has."""
        from bench.roofline.kernels import dot_kernel
        from tvm_frontend.kernels.cpu.formats import gemm_format
        from tvm_frontend.kernels.cpu.intrinsics import import_llvm
        from tvm_frontend.target import resolve_target

        target = resolve_target()
        fmt, width = gemm_format(precision, target), target.vector_bits // 32
        rows, columns = DOT_SLOTS, max(accumulators, width)
        kernel = dot_kernel(
            (self._threads, accumulators, width),
            (rows, columns),
            FMA_STEPS // rows,
            fmt.dot,
            fmt.acc_dtype,
            import_llvm(*fmt.intrinsics),
        )
        call = self._compile(kernel, (rows, columns), (self._threads, accumulators, width), ("int32", fmt.acc_dtype))
        steps = FMA_STEPS // rows * rows
        return Kernel(2 * fmt.pack_factor * self._threads * accumulators * width * steps, call)

    def _compile(
        self,
        function: "tvm.tirx.PrimFunc",
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        dtypes: tuple[str, str] = ("float32", "float32"),
    ) -> Callable[[], object]:
        """Compile a kernel of one input and one output for this machine, and bind it to buffers of these shapes."""
        import tvm

        from tvm_frontend.target import resolve_target

        kernel = tvm.compile(tvm.IRModule({"kernel": function}), target=resolve_target().to_tvm())["kernel"]
        data, out = self._input(in_shape, dtypes[0]), tvm.runtime.empty(out_shape, dtypes[1])
        return lambda: kernel(data, out)

    def _input(self, shape: tuple[int, ...], dtype: str) -> "tvm.runtime.Tensor":
        """Return a filled input of that shape, a view of the one buffer per dtype that all kernels share."""
        import tvm

        size = math.prod(shape)
        if size > self._filled.get(dtype, np.empty(0)).size:
            self._filled[dtype] = np.from_dlpack(tvm.runtime.empty((size,), dtype))
            self._filled[dtype].fill(FILL[dtype])
        return tvm.runtime.from_dlpack(self._filled[dtype][:size].reshape(shape))
