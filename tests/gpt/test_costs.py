from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gpt.config import GPTConfig
from gpt.costs import (
    decode_flops_per_token,
    matmul_parameters,
    parameter_count,
    prefill_flops_per_token,
    training_flops_per_token,
)
from gpt.model import GPT
from gpt.zoo import build_model

CONFIG = GPTConfig(block_size=32, vocab_size=65, n_layer=3, n_head=4, n_embd=48)


NARROW = replace(CONFIG, n_inner=100)


def counted(T: int, backward: bool = False, config: GPTConfig = CONFIG) -> int:
    """FLOPs of the matrix products that torch runs, the masked half of attention included."""
    model = GPT(config, "explicit")
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.zeros(1, T, dtype=torch.long))
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("config", [CONFIG, NARROW], ids=["4C", "n_inner"])
def test_weights_of_matrix_products_are_the_linear_layers(config):
    linear = [module for module in GPT(config).modules() if isinstance(module, torch.nn.Linear)]
    assert matmul_parameters(config) == sum(module.weight.numel() for module in linear)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, bias=False),
        replace(CONFIG, tied_head=False, n_layer=1),
        NARROW,
        replace(NARROW, bias=False),
        GPTConfig.bigram(7, 5),
    ],
)
def test_parameters_are_the_models(config):
    assert parameter_count(config) == build_model(config).parameter_count()


def test_prefill_is_what_torch_runs_without_the_masked_half():
    T = 32
    masked = 2 * 2 * CONFIG.n_layer * CONFIG.n_embd * T * (T - 1) // 2  # two products, a multiply-add is two
    assert prefill_flops_per_token(CONFIG, T) * T == counted(T) - masked


def test_prefill_is_the_sum_of_decoding_each_token():
    assert prefill_flops_per_token(CONFIG, 9) * 9 == sum(decode_flops_per_token(CONFIG, t) for t in range(1, 10))


@pytest.mark.parametrize("config", [CONFIG, NARROW], ids=["4C", "n_inner"])
def test_training_is_what_torch_runs_forward_and_backward(config):
    assert training_flops_per_token(config, 32) * 32 == counted(32, backward=True, config=config)


def test_nanogpts_char_model():
    config = GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384, bias=False)
    assert training_flops_per_token(config, 256) == pytest.approx(6 * 10_646_784 + 12 * 6 * 384 * 256, rel=1e-3)


@pytest.mark.parametrize("flops", [prefill_flops_per_token, decode_flops_per_token, training_flops_per_token])
def test_a_bigram_multiplies_nothing(flops):
    assert flops(GPTConfig.bigram(65, 8), 8) == 0
