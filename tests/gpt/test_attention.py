import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt.attention import ATTENTIONS, sdpa_backend
from gpt.cache import KVCache
from gpt.checkpoint import seeded_checkpoint
from gpt.config import GPTConfig
from gpt.model import GPT

OTHERS = sorted(ATTENTIONS.keys() - {"explicit"})


def some_qkv(T: int, S: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, length, 8, generator=generator) for length in (T, S, S)]


# The exercise behind causal attention (Karpathy's lecture "Let's build GPT"): each position becomes the mean of itself
# and those before it, in three ways.


def averages_by_loop(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x[:, : t + 1].mean(dim=1) for t in range(x.shape[1])], dim=1)


def averages_by_matmul(x: torch.Tensor) -> torch.Tensor:
    weights = torch.ones(x.shape[1], x.shape[1]).tril()  # [T, T]
    return weights / weights.sum(dim=1, keepdim=True) @ x


def averages_by_softmax(x: torch.Tensor) -> torch.Tensor:
    T = x.shape[1]
    later = torch.ones(T, T).tril() == 0
    return F.softmax(torch.zeros(T, T).masked_fill(later, -math.inf), dim=1) @ x


@pytest.mark.parametrize("averages", [averages_by_matmul, averages_by_softmax])
def test_a_running_mean_is_a_matmul_is_a_masked_softmax(averages):
    x = torch.randn(4, 8, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(averages(x), averages_by_loop(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attention_with_equal_scores_is_the_running_mean(attention):
    q, k, v = some_qkv(8, 8)
    expected = averages_by_loop(v.flatten(0, 1)).view_as(v)
    torch.testing.assert_close(ATTENTIONS[attention](torch.zeros_like(q), k, v, 0.0, 1.0), expected, atol=1e-6, rtol=0)


# The three ways


@pytest.mark.parametrize("attention", OTHERS)
@pytest.mark.parametrize(("T", "S"), [(1, 1), (9, 9), (1, 9), (4, 9)])
def test_the_ways_are_equal(attention, T, S):
    q, k, v = some_qkv(T, S)
    expected = ATTENTIONS["explicit"](q, k, v, 0.0, 0.3)
    torch.testing.assert_close(ATTENTIONS[attention](q, k, v, 0.0, 0.3), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("attention", OTHERS)
@pytest.mark.parametrize(
    "config",
    [
        GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128, bias=False),
        GPTConfig(block_size=64, vocab_size=65, n_layer=2, n_head=1, n_embd=32, activation="relu", tied_head=False),
    ],
)
def test_models_of_the_same_weights_are_equal(config, attention):
    checkpoint = seeded_checkpoint(config)
    ids = torch.randint(config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    logits, expected = checkpoint.build(attention)(ids), checkpoint.build("explicit")(ids)
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("attention", OTHERS)
def test_gradients_are_equal(config, attention):
    found = []
    for name in ("explicit", attention):
        torch.manual_seed(0)
        model = GPT(config, name)
        model(torch.arange(10).view(1, 10)).square().sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_weights_are_dropped_and_the_rest_scaled(attention):
    q, k, _ = some_qkv(64, 64)
    kept = ATTENTIONS[attention](torch.zeros_like(q), k, torch.ones(2, 3, 64, 8), 0.25, 1.0)
    assert not torch.equal(kept, torch.ones_like(kept))
    assert kept[:, :, 32:].mean().item() == pytest.approx(1, abs=0.1)


# Which kernel


def test_flash_is_reported_on_a_cpu(config):
    assert sdpa_backend(config, torch.device("cpu")) == "flash"


def test_the_report_is_torchs_own_choice(config):
    with sdpa_kernel(SDPBackend.MATH):
        assert sdpa_backend(config, torch.device("cpu")) == "math"


def test_what_flash_cannot_do_is_not_reported_as_flash(config):
    assert sdpa_backend(replace(config, dropout=0.1), torch.device("cpu")) == "math"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here")
def test_flash_runs_on_a_gpu_in_bf16():
    assert sdpa_backend(GPTConfig(), torch.device("cuda"), torch.bfloat16) == "flash"


# With a cache


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_pieces_through_a_cache_are_the_whole(config, attention):
    model = seeded_checkpoint(config).build(attention)
    ids = torch.randint(config.vocab_size, (3, 16), generator=torch.Generator().manual_seed(0))
    cache = KVCache(config, B=3)
    with torch.inference_mode():
        pieces = [model(piece, cache=cache) for piece in ids.split([5, 1, 1, 7, 2], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), atol=1e-5, rtol=0)
    assert cache.length == 16
