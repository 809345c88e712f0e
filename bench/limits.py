"""What this machine can do at best, measured with kernels of our own at the same number of threads.

Prefill is bound by arithmetic as soon as a few rows share a weight; below that, and in decode, by reading the weights.
"""

from dataclasses import dataclass

from gpt.config import GPTConfig
from gpt.costs import decode_flops_per_token, matmul_parameters, prefill_flops_per_token

FLOAT32_BYTES = 4
# Widths in float32 and accumulators to try: the fastest pair says what the machine can do, whatever its instructions.
# Two FMA units of four cycles' latency keep eight accumulators busy; more than the registers hold would be spilled.
WIDTHS = (4, 8, 16)
ACCUMULATORS = (8, 12, 24)
FMA_STEPS = 200_000  # of one call: a third of a millisecond or so
BYTES_A_CALL = 200_000_000  # read in one call, by passing several times over what fits a cache
READ_S, FMA_S = 0.6, 0.1  # of calls; memory is shared with the machine's other users, so its best moment comes seldom
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
READ_KERNEL = """
@T.prim_func(s_tir=True)
def kernel(
    data: T.Buffer(({threads}, {rows}, {accumulators}, {width}), "float32"),
    out: T.Buffer(({threads}, {accumulators}, {width}), "float32"),
):
    T.func_attr({{"global_symbol": "kernel", "tirx.noalias": True}})
    for thread in T.parallel({threads}):
        with T.sblock("one"):
            p = T.axis.spatial({threads}, thread)
            sums = T.sblock_alloc_buffer(({accumulators}, {width}), "float32")
            for a in T.unroll({accumulators}):
                for lane in T.vectorized({width}):
                    sums[a, lane] = 0.0
            for passes in range({passes}):
                for row in range({rows}):
                    for a in T.unroll({accumulators}):
                        for lane in T.vectorized({width}):
                            sums[a, lane] = sums[a, lane] + data[p, row, a, lane]
            for a in T.unroll({accumulators}):
                for lane in T.vectorized({width}):
                    out[p, a, lane] = sums[a, lane]
"""
FACTORY = f"{__name__}:Probe"


@dataclass(frozen=True)
class Limits:
    """Measured at `threads` threads. bandwidth_bytes_per_s: reading `working_set_bytes`, the model's weights, again
    and again, from whichever cache they fit in. memory_bytes_per_s: reading what no cache holds."""

    threads: int
    peak_flops_per_s: float
    bandwidth_bytes_per_s: float
    working_set_bytes: int
    memory_bytes_per_s: float


@dataclass(frozen=True)
class Bound:
    """The least time that some work can take, in seconds, and which limit binds: `arithmetic` or `reading`."""

    seconds: float
    binds: str


def prefill_flops(config: GPTConfig, B: int, T: int) -> float:
    """Floating-point operations of the matmuls of a prefill (a lower bound); see `gpt.costs`."""
    return B * T * prefill_flops_per_token(config, T)


def weight_bytes(config: GPTConfig) -> int:
    """Bytes of the float32 weights that a prefill works on: the matrices of products, once each; a bigram's table."""
    return FLOAT32_BYTES * (matmul_parameters(config) or config.vocab_size**2)


def prefill_bytes(config: GPTConfig, B: int, T: int) -> int:
    """Bytes that must move (a lower bound): weights read, ids read, logits written; activations may stay in caches.

    Of a bigram's table one row is enough, where all ids are the same.
    """
    read = FLOAT32_BYTES * (matmul_parameters(config) or config.vocab_size)
    return read + B * T * 8 + FLOAT32_BYTES * B * T * config.vocab_size


def decode_bytes(config: GPTConfig, B: int, context: int) -> int:
    """Bytes that must be read for the next token of B sequences: weights once, keys and values of `context` tokens."""
    cache = 2 * config.n_layer * B * context * config.n_embd
    return FLOAT32_BYTES * (matmul_parameters(config) + cache)


def prefill_bound(limits: Limits, config: GPTConfig, B: int, T: int) -> Bound:
    """Of a prompt's logits at all positions."""
    return _bound_of(limits, prefill_flops(config, B, T), prefill_bytes(config, B, T))


def decode_bound(limits: Limits, config: GPTConfig, B: int, context: int) -> Bound:
    """Of one more token for each of B sequences, behind `context` tokens in a KV cache."""
    flops = B * decode_flops_per_token(config, context + 1)
    return _bound_of(limits, flops, decode_bytes(config, B, context))


def generation_bound(limits: Limits, config: GPTConfig, B: int, context: int, tokens: int) -> Bound:
    """Of one of some tokens after a prompt of `context`: the prompt, whose last logits alone count, and the decodes."""
    head_flops = 2 * config.n_embd * config.vocab_size
    fill_flops = prefill_flops(config, B, context) - B * (context - 1) * head_flops
    fill = _bound_of(limits, fill_flops, FLOAT32_BYTES * matmul_parameters(config))
    steps = [decode_bound(limits, config, B, context + done) for done in range(tokens - 1)]
    binds = (steps or [fill])[-1].binds
    return Bound((fill.seconds + sum(step.seconds for step in steps)) / tokens, binds)


def _bound_of(limits: Limits, flops: float, moved_bytes: float) -> Bound:
    """The roofline's floor (Williams et al., https://doi.org/10.1145/1498765.1498785): the larger of the two times."""
    arithmetic_s = flops / limits.peak_flops_per_s
    reading_s = moved_bytes / limits.bandwidth_bytes_per_s
    return Bound(arithmetic_s, "arithmetic") if arithmetic_s >= reading_s else Bound(reading_s, "reading")


class Probe:
    """Measures the limits, in a worker. The best call counts: a limit is not an average."""

    def load(self, threads: int) -> None:
        """Make ready for `threads` threads."""
        self._threads = threads

    def peak_flops_per_s(self) -> float:
        """Float32 fused multiply-adds a second, times two, by the best of the kernels."""
        return max(self._fma(width, accumulators) for width in WIDTHS for accumulators in ACCUMULATORS)

    def read_bytes_per_s(self, working_set_bytes: int) -> float:
        """Bytes read a second from a working set of (about) that size, shared out among the threads."""
        width, accumulators = 16, 8
        row_bytes = self._threads * width * accumulators * FLOAT32_BYTES
        rows = max(1, round(working_set_bytes / row_bytes))
        passes = max(1, round(BYTES_A_CALL / (rows * row_bytes)))
        shape = (self._threads, rows, accumulators, width)
        seconds = self._best_s(READ_S, READ_KERNEL, [shape, (shape[0], *shape[2:])], rows=rows, passes=passes)
        return rows * row_bytes * passes / seconds

    def _fma(self, width: int, accumulators: int) -> float:
        out = (self._threads, accumulators, width)
        seconds = self._best_s(FMA_S, FMA_KERNEL, [(2, width), out], steps=FMA_STEPS)
        return 2 * self._threads * accumulators * width * FMA_STEPS / seconds

    def _best_s(self, budget_s: float, source: str, shapes: list[tuple[int, ...]], **sizes: int) -> float:
        """Seconds of the fastest of several calls of a kernel whose last argument is its output."""
        import numpy as np
        import tvm
        from tvm.script import from_source

        from bench.worker import sample
        from tvm_frontend.target import resolve_target

        threads, accumulators, width = shapes[-1]
        text = source.format(threads=threads, accumulators=accumulators, width=width, **sizes)
        module = tvm.IRModule({"kernel": from_source(text)})
        kernel = tvm.compile(module, target=resolve_target().to_tvm())["kernel"]
        tensors = [tvm.runtime.tensor(np.full(shape, 0.5, "float32")) for shape in shapes]
        return min(sample(lambda: kernel(*tensors), budget_s))
