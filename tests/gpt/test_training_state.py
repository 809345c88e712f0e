"""What is wrong in a checkpoint's training state is said in one line, before any of it is used."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt.cli import UserError
from gpt.corpus import load_corpus
from gpt.distributed import Ranks
from gpt.run import Run
from gpt.train import train
from gpt.train_config import TrainConfig

WTE = "transformer.wte.weight"


@pytest.fixture(scope="module")
def config(train_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Of a run with one update."""
    config = replace(train_config, output=tmp_path_factory.mktemp("one") / "ckpt.pt", max_steps=1, n_layer=1)
    train(config)
    return config


def restore(config: TrainConfig, path: Path) -> Run:
    run = Run(config, load_corpus(config.corpus), Ranks(0, 1, torch.device("cpu")))
    run.restore(path)
    return run


def at(content: dict[str, Any], where: str) -> tuple[Any, Any]:
    """The dict or list, and the key in it, that dots lead to."""
    *keys, last = (int(key) if key.isdigit() else key for key in where.split("."))
    for key in keys:
        content = content[key]
    return content, last


MOMENT = "training.optimizer.state.0.exp_avg"
SQUARES = "training.optimizer.state.0.exp_avg_sq"
STEP = "training.optimizer.state.0.step"
GROW = "training.optimizer.state.0.max_exp_avg_sq"
CHANGES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "a longer moment": (
        MOMENT,
        lambda t: torch.zeros(99),
        rf"optimizer's exp_avg of {WTE} is float32 \[99\], not float32",
    ),
    "a shorter moment": (SQUARES, lambda t: t[:1], rf"exp_avg_sq of {WTE} is float32 \[1, 32\], not float32 \[28, 32"),
    "a moment of another dtype": (MOMENT, lambda t: t.double(), rf"exp_avg of {WTE} is float64"),
    "one number as a whole moment": (MOMENT, lambda t: torch.zeros(1).expand(t.shape), "with strides .0, 0., not cont"),
    "a turned moment": (MOMENT, lambda t: t.t().contiguous().t(), "with strides .*, not contiguous"),
    "a sparse moment": (MOMENT, lambda t: t.to_sparse(), "in sparse_coo, not float32"),
    "a moment without memory": (MOMENT, lambda t: t.to("meta"), "on meta, not float32"),
    "a list as a moment": (MOMENT, lambda t: t.tolist(), "exp_avg of .* is no tensor but list, not float32"),
    "no moment": (MOMENT, None, "exp_avg of .* is absent, not float32"),
    "a moment too many": (GROW, lambda t: torch.zeros(1), "max_exp_avg_sq of .* is float32 .1., not absent"),
    "a negative square": (SQUARES, lambda t: t - 1, "exp_avg_sq of .* is below 0, not a mean of squares"),
    "a NaN": (MOMENT, lambda t: t / 0, "optimizer.state.0.exp_avg holds NaN or infinity"),
    "a step of another shape": (STEP, lambda t: torch.ones(2), f"step of {WTE} is float32 .2., not float32 .."),
    "a negative step": (STEP, lambda t: -t, f"step of {WTE} is -1.0, not in 0 … 1"),
    "a parameter's state missing": (
        "training.optimizer.state.3",
        None,
        r"optimizer's state is of \d parameters, not of",
    ),
    "another state": ("training.optimizer.state", lambda s: [1], "optimizer's state is of list parameters"),
    "no optimizer": ("training.optimizer", None, "optimizer is absent, not dict"),
    "a position of text": ("training.position", str, "position is str, not int"),
    "a position that is a truth": ("training.position", lambda n: True, "position is bool, not int"),
    "a negative position": ("training.position", lambda n: -1, "position is -1, not in 0"),
    "a huge position": ("training.position", lambda n: 2**70, "position is 1180591620717411303424, not in 0"),
    "a best loss that is none": ("training.best_val", lambda x: float("nan"), "best_val is NaN"),
    "a stale of text": ("training.stale", str, "stale is str, not int"),
    "settings as a list": ("training.config", lambda c: [], "config is list, not dict"),
    "no corpus": ("training.corpus", None, "corpus is absent, not dict"),
    "a corpus of numbers": ("training.corpus.train", lambda c: 5, "corpus is of other entries"),
    "a corpus of texts": ("training.corpus.train", lambda c: ["a"], "corpus is of other entries"),
    "random numbers as text": ("training.rng.0", str, "random numbers' state of rank 0 on cpu is absent, not uint8"),
    "too few random numbers": ("training.rng.0.cpu", lambda t: t[:9].clone(), "the random numbers' state: "),
    "random numbers of zeros": ("training.rng.0.cpu", torch.zeros_like, "the random numbers' state: "),
    "random floats": ("training.rng.0.cpu", lambda t: t.float(), r"random numbers' state .* is float32 \["),
    "losses of fewer kinds": ("losses.val", None, "losses is of step, train, not of step, train, val"),
    "losses of text": ("losses.val.0", str, "losses are not lists of numbers"),
    "more losses of a kind": ("losses.val", lambda v: [*v, 1.0], "losses are not lists of numbers, all as long"),
    "no step": ("step", None, "is damaged .'step'."),
    "a step of text": ("step", str, "step='1': must be a whole number"),
    "a negative step of the model": ("step", lambda n: -1, "step=-1: must be a whole number"),
    "a truth as a width": ("config.n_embd", bool, "n_embd=True: must be a whole number"),
    "text as a truth": ("config.bias", str, "bias='False': must be True or False"),
    "more layers than memory": (
        "config.n_layer",
        lambda n: 10**9,
        "does not fit its own config: 10 tensors for n_layer",
    ),
    "a width beyond all numbers": ("config.n_embd", lambda n: 2**61, "must be a whole number of at least 1 and below"),
    "a weight without a name": ("state.0", lambda t: torch.zeros(1), "not all of its tensors have names"),
    "a sparse weight": (
        f"state.{WTE.replace('.', '/')}",
        lambda t: t.to_sparse(),
        f"{WTE} is float32 .* in sparse_coo",
    ),
    "half a character": ("tokenizer.characters", lambda c: c[:-1] + "\ud800", "half a surrogate pair"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_is_named_before_it_is_used(config, tmp_path, change):
    where, how, words = CHANGES[change]
    content = torch.load(config.folder / "step-00000001.pt")
    holder, key = at(content, where)
    if isinstance(key, str):
        key = key.replace("/", ".")
    if how is None:
        del holder[key]
    else:
        holder[key] = how(holder[key] if isinstance(holder, list) or key in holder else None)
    torch.save(content, tmp_path / "step-00000001.pt")
    with pytest.raises(UserError, match=words) as caught:
        restore(config, tmp_path / "step-00000001.pt")
    assert str(caught.value).startswith(str(tmp_path / "step-00000001.pt"))
    assert "\n" not in str(caught.value)


def test_what_fits_is_restored(config):
    assert restore(config, config.folder / "step-00000001.pt").step == 1


def test_groups_of_the_checkpoint_are_not_used(config, tmp_path):
    content = torch.load(config.folder / "step-00000001.pt")
    content["training"]["optimizer"]["param_groups"] = "anything"
    torch.save(content, tmp_path / "step.pt")
    assert restore(config, tmp_path / "step.pt").step == 1


@pytest.mark.parametrize(
    ("name", "value"), [("scale", -1.0), ("scale", 0.0), ("scale", "2"), ("_growth_tracker", None)]
)
def test_a_scale_of_fp16_must_be_a_number(config, tmp_path, name, value):
    config = replace(config, precision="fp16", max_steps=2, resume=True, overwrite=False)
    content = torch.load(config.folder / "step-00000001.pt")
    run = Run(config, load_corpus(config.corpus), Ranks(0, 1, torch.device("cpu")))
    content["training"]["scaler"] = run.scaler.state_dict() | {name: value}
    torch.save(content, tmp_path / "step.pt")
    with pytest.raises(UserError, match=rf"the scaler's {name} is {value!r}, not a number as"):
        run.restore(tmp_path / "step.pt")


def test_a_list_that_holds_itself_ends(config, tmp_path):
    content = torch.load(config.folder / "step-00000001.pt")
    content["training"]["config"]["loop"] = loop = []
    loop.append(loop)
    torch.save(content, tmp_path / "step.pt")
    assert restore(config, tmp_path / "step.pt").step == 1
