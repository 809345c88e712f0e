from dataclasses import replace

import pytest
import torch

from gpt.config import GPTConfig
from gpt.memory import PHASES, _Live, phase_memory
from gpt.model import GPT

CONFIG = GPTConfig(block_size=64, vocab_size=65, n_layer=3, n_head=4, n_embd=48)
WEIGHTS = 4 * GPT(CONFIG).parameter_count()


@pytest.mark.parametrize("phase", PHASES)
def test_weights_are_counted_once(phase):
    assert phase_memory(CONFIG, phase, 2, 64).weights_bytes == WEIGHTS


def test_training_keeps_gradients_and_two_moments():
    found = phase_memory(CONFIG, "training", 2, 64)
    assert (found.gradients_bytes, found.optimizer_bytes) == (WEIGHTS, 2 * WEIGHTS)


def test_decode_has_a_cache_of_all_keys_and_values():
    assert phase_memory(CONFIG, "decode", 2, 64).cache_bytes == 4 * 2 * 3 * 2 * 64 * 48
    assert phase_memory(CONFIG, "prefill", 2, 64).cache_bytes == 0


def test_explicit_attention_holds_all_weights_of_attention_at_once():
    explicit, sdpa = (phase_memory(CONFIG, "prefill", 2, 64, name) for name in ("explicit", "sdpa"))
    scores = 4 * 2 * 4 * 64 * 64
    assert explicit.activations_bytes - sdpa.activations_bytes > scores


def test_activations_of_the_phases_are_in_their_order():
    prefill, decode, training = (phase_memory(CONFIG, phase, 2, 64).activations_bytes for phase in
                                 ("prefill", "decode", "training"))  # fmt: skip
    assert 4 * 2 * 65 < decode < 4 * 2 * 64 * 65 < prefill < training


def test_activations_grow_with_the_batch_only():
    one, four = (phase_memory(CONFIG, "training", B, 64) for B in (1, 4))
    assert four.activations_bytes == pytest.approx(4 * one.activations_bytes, rel=0.1)
    assert four.weights_bytes == one.weights_bytes


def test_dropout_keeps_its_masks():
    assert (
        phase_memory(replace(CONFIG, dropout=0.1), "training", 2, 64).activations_bytes
        > phase_memory(CONFIG, "training", 2, 64).activations_bytes
    )


def test_tensors_without_content_take_what_real_ones_do():
    model = GPT(CONFIG, "sdpa").eval()
    ids = torch.zeros(2, 64, dtype=torch.long)
    with torch.no_grad(), _Live(model.parameters()) as live:
        model(ids)
    assert live.peak_bytes == phase_memory(CONFIG, "prefill", 2, 64).activations_bytes


def test_what_is_freed_is_taken_off():
    held = torch.ones(10)
    with _Live([held]) as live:
        for _ in range(3):
            (held + 1).view(2, 5)
        kept = held * 2
    assert (live.peak_bytes, live.live_bytes) == (40, 40)
    assert kept.nbytes == 40
