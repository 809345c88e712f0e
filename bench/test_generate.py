"""pytest bench/test_generate.py --benchmark-only

Times generation after a short prompt for each engine that has a KV cache. A second test shows the benefit of a cache:
256 greedy tokens after one, by a model of 6 layers and width 384, with a cache and without. With a cache each token
reads the weights once and is memory-bound; without, it recomputes all tokens before it and is compute-bound.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.backends.eager import gpt_of
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
    """Each token must be the reference's argmax after the tokens before it; then whole generations are timed."""
    race()


@pytest.fixture(scope="module")
def model(setup: Setup) -> GPT:
    """Build a model of random weights on the CPU, with the engines' number of threads."""
    torch.set_num_threads(setup.plan.threads)
    return gpt_of(seeded_checkpoint(CONFIG).build("sdpa"))


@pytest.mark.parametrize("cache", [True, False], ids=["with-cache", "without-cache"])
def test_cache(benchmark: BenchmarkFixture, model: GPT, setup: Setup, cache: bool) -> None:
    """Both ways must give the same tokens; then one generation is timed. ms_per_token is its median over 256."""

    def draw(cache: bool) -> list[int]:
        return list(generate(model, START, TOKENS, temperature=0, cache=cache))

    assert draw(cache) == draw(not cache)
    benchmark.group = f"generate {TOKENS} tokens"
    benchmark.extra_info.update(
        {"cache": cache, "threads": setup.plan.threads, "torch": torch.__version__, "machine": describe_machine()}
    )
    benchmark.pedantic(draw, (cache,), rounds=3)
    if benchmark.stats is not None:  # None with --benchmark-disable, which calls it once and times nothing
        benchmark.extra_info["ms_per_token"] = benchmark.stats.stats.median * 1e3 / TOKENS
