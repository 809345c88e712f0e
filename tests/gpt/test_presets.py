import json
import math
from dataclasses import replace

import pytest
import torch

from gpt.presets import PRESETS
from gpt.train import train
from gpt.zoo import build_model

pytestmark = pytest.mark.slow


def recipe(name, *fields):
    return tuple(getattr(PRESETS[name][1], field) for field in fields)


@pytest.mark.parametrize(("name", "steps"), [("demo", 1500), ("char-cpu", 2000)])
def test_nanogpts_cpu_recipe(name, steps):
    shape = recipe(name, "n_layer", "n_head", "n_embd", "block_size", "dropout", "bias")
    assert shape == (4, 4, 128, 64, 0.0, False)
    assert recipe(name, "batch_size", "learning_rate", "min_lr", "beta2", "warmup_steps") == (12, 1e-3, 1e-4, 0.99, 100)
    assert recipe(name, "max_steps", "decay_steps") == (steps, None)


@pytest.mark.parametrize("name", ["char", "shakespeare-char"])
def test_nanogpts_gpu_recipe(name):
    assert recipe(name, "n_layer", "n_head", "n_embd", "block_size") == (6, 6, 384, 256)
    assert recipe(name, "batch_size", "dropout", "max_steps", "learning_rate") == (64, 0.2, 5000, 1e-3)


def test_the_lectures_variant():
    assert recipe("char-lecture", "learning_rate", "min_lr", "max_steps") == (3e-4, 3e-4, 6000)
    assert recipe("char-lecture", "activation", "tied_head", "bias") == ("relu", False, True)


@pytest.mark.parametrize(
    ("name", "vocab_size", "parameters"),
    [
        ("char", 65, 10_745_088),  # nanoGPT prints 10.65M, without the 98,304 of wpe
        ("gpt2-124m", 50257, 124_439_808),
        ("gpt2-medium", 50257, 354_823_168),
        ("gpt2-large", 50257, 774_030_080),
        ("gpt2-xl", 50257, 1_557_611_200),
        ("bigram", 65, 65 * 65),
    ],
)
def test_parameter_counts_are_the_published_ones(name, vocab_size, parameters):
    with torch.device("meta"):
        assert build_model(PRESETS[name][1].model_config(vocab_size)).parameter_count() == parameters


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("gpt2")])
@pytest.mark.parametrize("world", [1, 8])
def test_gpt2_takes_half_a_million_tokens_an_update_on_one_gpu_or_eight(name, world):
    batch_size, micro_batch_size, block_size = recipe(name, "batch_size", "micro_batch_size", "block_size")
    assert batch_size * block_size == 2**19
    assert batch_size % (world * micro_batch_size) == 0


@pytest.mark.parametrize("seed", [1, 2])
def test_overfit_learns_one_batch_by_heart(tmp_path, text_file, seed):
    preset = PRESETS["overfit"][1]
    config = replace(preset, corpus=text_file, output=tmp_path / "ckpt.pt", seed=seed, tensorboard=False)
    train(config)
    rows = map(json.loads, (config.folder / "log.jsonl").read_text().splitlines())
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] == pytest.approx(math.log(28), rel=0.1)
    learned = next(step for step, loss in enumerate(losses) if loss < 0.2)
    assert 10 <= learned <= 30
    assert losses[-1] < 0.2


def test_a_bigram_learns_what_follows_what(tmp_path, text_file):
    preset = PRESETS["bigram"][1]
    config = replace(preset, corpus=text_file, output=tmp_path / "ckpt.pt", max_steps=300, tensorboard=False)
    losses = train(config).losses["val"]
    assert losses[0] == pytest.approx(math.log(28), rel=0.05)
    assert losses[-1] < 0.7 * losses[0]
