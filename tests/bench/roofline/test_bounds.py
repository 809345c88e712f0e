"""Compares operations, bytes and bounds with a count by hand."""

import pytest

from bench.roofline.bounds import (
    Roofline,
    best_of,
    decode_bound,
    decode_bytes,
    generation_bound,
    prefill_bound,
    prefill_bytes,
    prefill_flops,
    weight_bytes,
)
from gpt.config import GPTConfig

CONFIG = GPTConfig(block_size=8, vocab_size=5, n_layer=2, n_head=2, n_embd=4)


def test_operations_as_counted_by_hand() -> None:
    """The count equals each matmul of the model written out: rows × columns × inner length × 2."""
    B, T, C, V, nh, hs = 3, 7, 4, 5, 2, 2
    linear = sum(2 * T * inner * outer for inner, outer in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)))
    scores = sum(2 * hs * 1 for query in range(T) for _ in range(query + 1))  # one dot product per pair
    attention = nh * (scores + scores)  # and the same for the weighted sum of values
    assert prefill_flops(CONFIG, B, T) == B * (2 * (linear + attention) + 2 * T * C * V)


def test_gpt2_takes_about_two_operations_a_weight() -> None:
    assert prefill_flops(GPTConfig(), 1, 128) == pytest.approx(2 * 124e6 * 128, rel=0.02)


def test_bytes_as_counted_by_hand() -> None:
    weights = 4 * (2 * (4 * 12 + 4 * 4 + 4 * 16 + 16 * 4) + 5 * 4)
    assert weight_bytes(CONFIG) == weights
    assert prefill_bytes(CONFIG, 3, 7) == weights + 3 * 7 * 8 + 3 * 7 * 5 * 4


def test_fewer_bits_are_fewer_bytes_and_scales() -> None:
    """int8 has a scale per column of each matrix, int4 one per group of 32 weights."""
    weights = 2 * (4 * 12 + 4 * 4 + 4 * 16 + 16 * 4) + 5 * 4
    columns = 2 * (12 + 4 + 16 + 4) + 5
    assert weight_bytes(CONFIG, "bf16") == 2 * weights
    assert weight_bytes(CONFIG, "int8") == weights + 4 * columns
    assert weight_bytes(CONFIG, "int4") == weights // 2 + 2 * weights // 32
    rows = 2 * 2 * 7  # rows of keys and values in two layers; each row has two heads
    for precision, row in {"bf16": 4 * 2, "int8": 4 + 2 * 4, "int4": 4 + 2 * 4}.items():
        assert decode_bytes(CONFIG, 1, 7, precision) == weight_bytes(CONFIG, precision) + rows * row


def test_the_best_of_several_measurements_counts() -> None:
    seen = [
        Roofline(2, 5.0, 1.0, 7, 3.0, "bf16"),
        Roofline(2, 4.0, 2.0, 7, 3.0, "bf16"),
        Roofline(2, 1.0, 1.0, 7, 4.0, "bf16"),
    ]
    assert best_of(*seen) == Roofline(2, 5.0, 2.0, 7, 4.0, "bf16")


def test_a_bigram_only_copies_rows_of_its_table() -> None:
    config = GPTConfig.bigram(vocab_size=5, block_size=8)
    assert prefill_flops(config, 3, 7) == 0
    assert weight_bytes(config) == 4 * 5 * 5
    assert prefill_bytes(config, 3, 7) == 4 * 5 + 3 * 7 * 8 + 3 * 7 * 5 * 4
    assert prefill_bound(Roofline(1, 1.0, 100.0, 1, 1.0), config, 1, 8).binds == "reading"


@pytest.mark.parametrize(("peak", "binds"), [(1.0, "arithmetic"), (1e15, "reading")])
def test_the_slower_of_the_two_binds(peak: float, binds: str) -> None:
    roofline = Roofline(1, peak, 100.0, 1, 1.0)
    bound = prefill_bound(roofline, CONFIG, 1, 8)
    assert bound.binds == binds
    assert bound.seconds == max(prefill_flops(CONFIG, 1, 8) / peak, prefill_bytes(CONFIG, 1, 8) / 100.0)


def test_a_decode_reads_the_weights_and_the_cache_so_far() -> None:
    keys_and_values = 2 * 2 * 7 * 4  # keys and values of two layers, 7 rows of 4 numbers
    assert decode_bytes(CONFIG, 1, 7) == weight_bytes(CONFIG) + 4 * keys_and_values
    assert decode_bytes(CONFIG, 3, 7) == weight_bytes(CONFIG) + 3 * 4 * keys_and_values


def test_gpt2_reads_half_a_gigabyte_for_a_token() -> None:
    assert decode_bytes(GPTConfig(), 1, 128) == pytest.approx(4 * 124e6 + 9.4e6, rel=0.01)


def test_a_decode_is_bound_by_reading_and_a_batch_of_them_by_arithmetic() -> None:
    roofline = Roofline(2, 500e9, 40e9, 1, 40e9)
    assert decode_bound(roofline, GPTConfig(), 1, 128).seconds == decode_bytes(GPTConfig(), 1, 128) / 40e9
    assert decode_bound(roofline, GPTConfig(), 64, 1).binds == "arithmetic"


def test_generation_is_the_prompt_and_the_decodes_over_all_tokens() -> None:
    roofline = Roofline(1, 1e15, 100.0, 1, 1.0)
    steps = [decode_bytes(CONFIG, 1, context) for context in (3, 4)]
    bound = generation_bound(roofline, CONFIG, 1, 3, tokens=3)
    assert bound.seconds == pytest.approx((weight_bytes(CONFIG) + sum(steps)) / 100 / 3)
    assert bound.binds == "reading"


def test_a_prompt_multiplies_the_head_at_its_last_position_alone() -> None:
    head = 2 * 4 * 5
    bound = generation_bound(Roofline(1, 1.0, 1e15, 1, 1.0), CONFIG, 1, 3, tokens=1)
    assert bound.seconds == prefill_flops(CONFIG, 1, 3) - 2 * head
