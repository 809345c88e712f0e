"""What this machine can do at best, measured with kernels of our own at the same number of threads.

Prefill is bound by arithmetic as soon as a few rows share a weight; below that, and in decode, by reading the weights.
"""

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import numpy as np

from bench.worker import sample
from gpt.config import GPTConfig
from gpt.costs import decode_flops_per_token, matmul_parameters, prefill_flops_per_token

if TYPE_CHECKING:
    import tvm

FLOAT32_BYTES = 4
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "int4": 0.5}
CACHE_BYTES = {
    "fp32": (4, 0),
    "bf16": (2, 0),
    "fp16": (2, 0),
    "int8": (1, 4),
    "int4": (1, 4),
}  # of a number; of a head besides
GROUP = 32  # weights that share a scale in 4 bits; in 8 bits those of a column do
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
class Limits:
    """Of one precision, measured at `threads` threads. peak_flops_per_s: of products, a multiply-add being two.

    bandwidth_bytes_per_s: reading `working_set_bytes`, the model's weights, again and again, from whichever cache they
    fit in. memory_bytes_per_s: reading what no cache holds.
    """

    threads: int
    peak_flops_per_s: float
    bandwidth_bytes_per_s: float
    working_set_bytes: int
    memory_bytes_per_s: float
    precision: str = "fp32"


def best_of(*seen: Limits) -> Limits:
    """A limit is the best that was seen, so of measurements of the same the highest rates."""
    return Limits(*map(max, zip(*map(astuple, seen), strict=True)))


@dataclass(frozen=True)
class Bound:
    """The least time that some work can take, in seconds, and which limit binds: `arithmetic` or `reading`."""

    seconds: float
    binds: str


def prefill_flops(config: GPTConfig, B: int, T: int) -> float:
    """Floating-point operations of the matmuls of a prefill (a lower bound); see `gpt.costs`."""
    return B * T * prefill_flops_per_token(config, T)


def weight_bytes(config: GPTConfig, precision: str = "fp32") -> int:
    """Bytes of the weights that a prefill works on: the matrices of products with their scales; a bigram's table.

    A scale is a float32 of each column in int8, two bytes of each GROUP of a column in int4. Embeddings do not count:
    of a table only the rows of the ids are read.
    """
    weights = matmul_parameters(config)
    columns = 9 * config.n_embd * config.n_layer + config.vocab_size  # 3C, C, 4C, C of a layer, and the head's
    scale_bytes = {"int8": FLOAT32_BYTES * columns, "int4": 2 * weights // GROUP}.get(precision, 0)
    if not weights:
        return FLOAT32_BYTES * config.vocab_size**2
    return int(WEIGHT_BYTES[precision] * weights) + scale_bytes


def prefill_bytes(config: GPTConfig, B: int, T: int, precision: str = "fp32") -> int:
    """Bytes that must move (a lower bound): weights read, ids read, logits written; activations may stay in caches.

    Of a bigram's table one row is enough, where all ids are the same.
    """
    read = weight_bytes(config, precision) if matmul_parameters(config) else FLOAT32_BYTES * config.vocab_size
    return read + B * T * 8 + FLOAT32_BYTES * B * T * config.vocab_size


def decode_bytes(config: GPTConfig, B: int, context: int, precision: str = "fp32") -> int:
    """Bytes that must be read for the next token of B sequences: weights once, keys and values of `context` tokens.

    Those count as this project keeps them: in bf16 two bytes a number, in int8 and int4 one, and a float32 a head.
    """
    of_number, of_head = CACHE_BYTES[precision]
    a_token = of_number * config.n_embd + of_head * config.n_head
    return weight_bytes(config, precision) + 2 * config.n_layer * B * context * a_token


def prefill_bound(limits: Limits, config: GPTConfig, B: int, T: int) -> Bound:
    """Of a prompt's logits at all positions."""
    return _bound_of(limits, prefill_flops(config, B, T), prefill_bytes(config, B, T, limits.precision))


def decode_bound(limits: Limits, config: GPTConfig, B: int, context: int) -> Bound:
    """Of one more token for each of B sequences, behind `context` tokens in a KV cache."""
    flops = B * decode_flops_per_token(config, context + 1)
    return _bound_of(limits, flops, decode_bytes(config, B, context, limits.precision))


def first_token_bound(limits: Limits, config: GPTConfig, B: int, T: int) -> Bound:
    """Of the logits behind a prompt alone: of the head, one row a sequence. What is read are the weights, once."""
    head_flops = 2 * config.n_embd * config.vocab_size
    flops = prefill_flops(config, B, T) - B * (T - 1) * head_flops
    return _bound_of(limits, flops, weight_bytes(config, limits.precision))


def generation_bound(limits: Limits, config: GPTConfig, B: int, context: int, tokens: int) -> Bound:
    """Of one of some tokens after a prompt of `context`: the prompt, whose last logits alone count, and the decodes."""
    fill = first_token_bound(limits, config, B, context)
    steps = [decode_bound(limits, config, B, context + done) for done in range(tokens - 1)]
    binds = (steps or [fill])[-1].binds
    return Bound((fill.seconds + sum(step.seconds for step in steps)) / tokens, binds)


def _bound_of(limits: Limits, flops: float, moved_bytes: float) -> Bound:
    """The roofline's floor (Williams et al., https://doi.org/10.1145/1498765.1498785): the larger of the two times."""
    arithmetic_s = flops / limits.peak_flops_per_s
    reading_s = moved_bytes / limits.bandwidth_bytes_per_s
    return Bound(arithmetic_s, "arithmetic") if arithmetic_s >= reading_s else Bound(reading_s, "reading")


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
        from tvm_frontend.schedules.cpu.arithmetic import arithmetic_of
        from tvm_frontend.target import resolve_target

        target = resolve_target()
        arithmetic, width = arithmetic_of(precision, target), target.vector_bits // 32
        imports = {"pragma_import_llvm": arithmetic.llvm} if arithmetic.llvm else {}
        names, sizes = {"dot": arithmetic.dot, "imports": imports}, {"total": arithmetic.total, "steps": FMA_STEPS}
        shapes = [(2, width), (self._threads, accumulators, width)]
        call = self._compile(DOT_KERNEL, shapes, names, ("int32", arithmetic.total), **sizes)
        return Kernel(2 * arithmetic.values * self._threads * accumulators * width * FMA_STEPS, call)

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
