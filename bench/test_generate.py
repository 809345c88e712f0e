"""pytest bench/test_generate.py --benchmark-only

Benchmark the tokens after a short prompt, for each engine that has a KV cache. Then show what a cache is for: a model
of 6 layers and 384 channels generates 256 tokens greedily, with a cache and without. With one, each token reads the
weights once, so bandwidth is the bound; without, it computes all tokens before it again, so arithmetic is.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.conftest import CLOCK, Setup
from bench.harness.machine import describe_machine
from gpt.checkpoint import seeded_checkpoint
from gpt.config import GPTConfig
from gpt.generate import generate
from gpt.model import GPT

PHASE = "generate"
CONFIG = GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384, bias=False)
TOKENS, START = 256, [0]


@pytest.mark.benchmark(timer=CLOCK)
def test_generate(race: Callable[[], None]) -> None:
    """Compare each token with the reference's likeliest after those before it; then time whole texts."""
    race()


@pytest.fixture(scope="module")
def model(setup: Setup) -> GPT:
    """Make a model of random weights on the CPU, with as many threads as every engine has."""
    torch.set_num_threads(setup.plan.threads)
    return seeded_checkpoint(CONFIG).build("sdpa")


@pytest.mark.parametrize("cache", [True, False], ids=["with-cache", "without-cache"])
def test_cache(benchmark: BenchmarkFixture, model: GPT, setup: Setup, cache: bool) -> None:
    """Check that both ways give the same tokens, then time a whole text; ms_per_token is its median per token."""

    def draw(cache: bool) -> list[int]:
        return list(generate(model, START, TOKENS, temperature=0, cache=cache))

    assert draw(cache) == draw(not cache)
    benchmark.group = f"generate {TOKENS} tokens"
    benchmark.extra_info.update(
        {"cache": cache, "threads": setup.plan.threads, "torch": torch.__version__, "machine": describe_machine()}
    )
    benchmark.pedantic(draw, (cache,), rounds=3)
    benchmark.extra_info["ms_per_token"] = benchmark.stats.stats.median * 1e3 / TOKENS
