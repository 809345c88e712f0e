"""The roofline of a machine, and the least time that a piece of work can take under it.

Prefill is compute-bound as soon as a few rows share each weight; below that, and in decode, it is bound by reading the
weights.
"""

from dataclasses import astuple, dataclass

from bench.models.shape import Model, Shape, shape_of

FLOAT32_BYTES = 4
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "int4": 0.5}
# KV cache: (bytes per element, extra scale bytes per head of a row)
CACHE_BYTES = {
    "fp32": (4, 0),
    "bf16": (2, 0),
    "fp16": (2, 0),
    "int8": (1, 4),
    "int4": (1, 4),
}


@dataclass(frozen=True)
class Roofline:
    """Peak rates of this machine for one precision, measured at `threads` threads.

    peak_flops_per_s counts a multiply-add as two operations. bandwidth_bytes_per_s is measured by reading
    `working_set_bytes`, the size of the model's weights, again and again, from whichever cache they fit in;
    memory_bytes_per_s by reading more than any cache holds.
    """

    threads: int
    peak_flops_per_s: float
    bandwidth_bytes_per_s: float
    working_set_bytes: int
    memory_bytes_per_s: float
    precision: str = "fp32"


def best_of(*seen: Roofline) -> Roofline:
    """Combine several measurements of the same roofline by the highest of each rate, as a peak is what was reached."""
    return Roofline(*map(max, zip(*map(astuple, seen), strict=True)))


@dataclass(frozen=True)
class Bound:
    """A lower bound on the time of some work, in seconds, and what binds: `arithmetic` (compute) or `reading`."""

    seconds: float
    binds: str


def prefill_flops(config: Model, B: int, T: int) -> float:
    """Count the floating-point operations of a prefill's matmuls, a lower bound on all.

    As `gpt.costs.prefill_flops_per_token` counts them: each query meets half of the keys.
    """
    shape = shape_of(config)
    return B * T * (2 * shape.weights + 2 * shape.kept * (T + 1))


def weight_bytes(config: Model, precision: str = "fp32") -> int:
    """Count the bytes of the weight matrices with their scales, which a prefill reads once; or of a bigram's table.

    int8 has a float32 scale per column, int4 two bytes per group of a column. A file may hold them in fewer bytes than
    that. Embedding tables do not count, as only the rows of the ids are read.
    """
    shape = shape_of(config)
    if not shape.weights:
        return FLOAT32_BYTES * config.vocab_size**2
    size = int(WEIGHT_BYTES[precision] * shape.weights) + _scale_bytes(shape, precision)
    return size if shape.weight_bytes is None else min(size, shape.weight_bytes)


def _scale_bytes(shape: Shape, precision: str) -> int:
    if precision == "int8":
        return FLOAT32_BYTES * shape.columns
    if precision == "int4":
        from tvm_frontend.kernels.cpu.packing import GROUP_SIZE  # loads TVM, which other precisions do without

        return 2 * shape.weights // GROUP_SIZE
    return 0


def prefill_bytes(config: Model, B: int, T: int, precision: str = "fp32") -> int:
    """Count the bytes that a prefill must move: weights and ids read, logits written. A lower bound.

    Activations may stay in caches. A bigram may need a single row of its table, where all ids are the same.
    """
    read = weight_bytes(config, precision) if shape_of(config).weights else FLOAT32_BYTES * config.vocab_size
    return read + B * T * 8 + FLOAT32_BYTES * B * T * config.vocab_size


def decode_bytes(config: Model, B: int, context: int, precision: str = "fp32") -> int:
    """Count the bytes read for the next token of B sequences: weights once, keys and values of `context` tokens.

    The KV cache counts in this project's format: two bytes per element in bf16; in int8 and int4 one byte, and a
    float32 scale per head. That of a file counts in the file's.
    """
    shape = shape_of(config)
    per_element, per_head = CACHE_BYTES[precision]
    per_token = 2 * (per_element * shape.kept + per_head * shape.heads)
    kept_bytes = per_token if shape.kept_bytes is None else shape.kept_bytes
    return weight_bytes(config, precision) + B * context * kept_bytes


def prefill_bound(roofline: Roofline, config: Model, B: int, T: int) -> Bound:
    """Bound the time of the logits at all positions of B prompts of T tokens."""
    return _bound_of(roofline, prefill_flops(config, B, T), prefill_bytes(config, B, T, roofline.precision))


def decode_bound(roofline: Roofline, config: Model, B: int, context: int) -> Bound:
    """Bound the time of one more token for each of B sequences with `context` tokens in a KV cache."""
    shape = shape_of(config)
    flops = B * (2 * shape.weights + 4 * shape.kept * (context + 1))  # as `gpt.costs.decode_flops_per_token` counts
    return _bound_of(roofline, flops, decode_bytes(config, B, context, roofline.precision))


def first_token_bound(roofline: Roofline, config: Model, B: int, T: int) -> Bound:
    """Bound the time of a prompt's last logits: the head multiplies one row per sequence; only weights are read."""
    head_flops = 2 * shape_of(config).width * config.vocab_size
    flops = prefill_flops(config, B, T) - B * (T - 1) * head_flops
    return _bound_of(roofline, flops, weight_bytes(config, roofline.precision))


def generation_bound(roofline: Roofline, config: Model, B: int, context: int, tokens: int) -> Bound:
    """Bound the time per generated token: (first token of a `context` prompt + tokens - 1 decode steps) / tokens."""
    fill = first_token_bound(roofline, config, B, context)
    steps = [decode_bound(roofline, config, B, context + done) for done in range(tokens - 1)]
    binds = (steps or [fill])[-1].binds
    return Bound((fill.seconds + sum(step.seconds for step in steps)) / tokens, binds)


def _bound_of(roofline: Roofline, flops: float, moved_bytes: float) -> Bound:
    """Apply the roofline model (Williams et al., https://doi.org/10.1145/1498765.1498785): the larger of two times."""
    arithmetic_s = flops / roofline.peak_flops_per_s
    reading_s = moved_bytes / roofline.bandwidth_bytes_per_s
    return Bound(arithmetic_s, "arithmetic") if arithmetic_s >= reading_s else Bound(reading_s, "reading")
