"""What this machine can do at best, and the least time that some work takes by it.

Prefill is bound by arithmetic as soon as a few rows share a weight; below that, and in decode, by reading the weights.
"""

from dataclasses import astuple, dataclass

from gpt.config import GPTConfig
from gpt.costs import decode_flops_per_token, matmul_parameters, prefill_flops_per_token

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
