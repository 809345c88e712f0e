"""One training run in the middle: all that changes with its steps, and how it is kept and taken up again."""

import math
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute

from gpt import onednn
from gpt.batches import Batches
from gpt.bigram import Bigram
from gpt.checkpoint import Checkpoint, load_training, state_of
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.corpus import Corpus
from gpt.costs import parameter_count
from gpt.device import check_memory
from gpt.distributed import Ranks
from gpt.model import GPT
from gpt.optimizer import optimizer_of, precision_of
from gpt.pretrained import load_pretrained
from gpt.run_folder import plain
from gpt.tokenizer import NoTokenizer, tokenizer_from_json
from gpt.train_config import TrainConfig
from gpt.training_state import check_corpus, check_training
from gpt.zoo import build_model

LESS_MEMORY = "lower --batch-size or --micro-batch-size, or take a smaller model or --block-size"
# settings that may differ when a run goes on
UNREMARKABLE = {"resume", "overwrite", "allow_changed_corpus", "device", "threads"}


class Run:
    """Model, optimizer, batches and counters. Every rank has one, and they differ in random numbers and batches alone.

    raw: the model that is kept; compute: the same, compiled or not; model: the same again, whose gradients are the
    mean over the ranks. losses: as `Checkpoint` has them. best_val: the least so far; stale: evaluations since then.
    Raises UserError for a config that does not fit the corpus, the ranks or the device.
    """

    def __init__(self, config: TrainConfig, corpus: Corpus, ranks: Ranks) -> None:
        self.config, self.corpus, self.ranks = config, corpus, ranks
        self.precision = precision_of(config, ranks.device)
        self.batches = batches_of(config, corpus, ranks)
        torch.manual_seed(config.seed)  # the same weights on all ranks
        shape, state = _beginning(config, corpus)
        _check_room(shape, self.batches, ranks.device)
        self.raw = build_model(shape, attention="sdpa")
        if state is not None:
            self.raw.load_state_dict(state)
        self.raw.to(ranks.device)
        if (ranks.device.type, self.precision, config.compile) == ("cpu", "fp32", False) and onednn.pays():
            onednn.use_onednn(self.raw)
        self.compute, self.model = _wrap(self.raw, config, ranks)
        self.optimizer = optimizer_of(self.raw, config)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.precision == "fp16")
        torch.manual_seed(config.seed + (ranks.rank + 1) * 2**32)  # another dropout on each rank
        self.step = 0
        self.losses: dict[str, list[float]] = {"step": [], "train": [], "val": []}
        self.best_val, self.stale = math.inf, 0

    def checkpoint(self) -> Checkpoint:
        """Return the model as it is now."""
        losses = {name: list(values) for name, values in self.losses.items()}
        return Checkpoint(self.raw.config, state_of(self.raw), self.step, self.corpus.tokenizer.to_json(), losses)

    def training(self) -> dict[str, Any]:
        """Return all else that going on takes, as tensors and plain values. Every rank must ask, and gets the same."""
        return {
            "config": plain(self.config),
            "corpus": self.corpus.identity(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "position": self.batches.position,
            "rng": self.ranks.gather(_random_state(self.ranks.device)),
            "best_val": self.best_val,
            "stale": self.stale,
        }

    def restore(self, path: Path) -> list[str]:
        """Become the run that was saved there; return the settings that differ from its own, in words.

        All that is there is checked before any of it is used. Raises UserError for a checkpoint that does not fit, and
        for another corpus than the one that it was trained on, unless the config allows that.
        """
        found, training = load_training(path)
        if found.config != self.raw.config or found.tokenizer != self.corpus.tokenizer.to_json():
            raise UserError(f"{path}: is of another model or corpus; resume with its settings, or --overwrite it")
        scaler = self.scaler.state_dict()  # empty unless it is enabled
        check_training(path, found, training, self.raw, self.optimizer, scaler)
        notes = self._notes_on_corpus(path, training["corpus"]) + _differences(training["config"], plain(self.config))
        self.raw.load_state_dict(found.state)
        # the settings stay this run's own: those of the checkpoint may differ, and were checked by nobody
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": training["optimizer"]["state"], "param_groups": groups})
        if scaler and training["scaler"]:
            self.scaler.load_state_dict({name: training["scaler"][name] for name in scaler})
        self.batches.position = training["position"]
        self.step, self.losses = found.step, {name: found.losses[name] for name in self.losses}
        self.best_val, self.stale = training["best_val"], training["stale"]
        if len(training["rng"]) == self.ranks.world:
            _set_random_state(path, training["rng"][self.ranks.rank], self.ranks.device)
        elif self.config.dropout:
            notes.append(f"{self.ranks.world} ranks (were {len(training['rng'])}): dropout is drawn anew")
        return notes

    def _notes_on_corpus(self, path: Path, before: dict[str, Any]) -> list[str]:
        """Return a note if the corpus is another than before and that is allowed. Raises UserError where it is not."""
        check_corpus(path, before)
        if (changed := self.corpus.change_since(before, read=self.ranks.leads)) is None:
            return []
        if not self.config.allow_changed_corpus:
            raise UserError(
                f"{self.corpus.name}: is not the corpus of {path} ({changed}); bring that one back, or go on with this "
                "one by --allow-changed-corpus"
            )
        return [f"another corpus ({changed})"]


def batches_of(config: TrainConfig, corpus: Corpus, ranks: Ranks, part: str | None = None) -> Batches:
    """Return the batches to train on; or, with `part` (`train` or `val`), an evaluation's, which are always the same.

    Raises UserError for a corpus that is too short or sizes that do not fit.
    """
    order, seed = config.order, config.seed
    if part == "val" or (part == "train" and order != "one"):
        order, seed = "random", seed + 1
    tokens = corpus.val if part == "val" else corpus.train
    if min(len(corpus.train), len(corpus.val)) <= config.block_size:
        raise UserError(
            f"{corpus.name}: {len(corpus.train):,} tokens to train on and {len(corpus.val):,} to validate on are too "
            f"few for block_size={config.block_size}; give a longer text, or a smaller --block-size"
        )
    return Batches(
        tokens,
        config.block_size,
        config.batch_size,
        order,
        seed,
        ranks.rank,
        ranks.world,
        config.micro_batch_size,
        ranks.device,
        vocab_size=corpus.tokenizer.vocab_size,
    )


def _beginning(config: TrainConfig, corpus: Corpus) -> tuple[GPTConfig, dict[str, Tensor] | None]:
    """Return the model's shape, and the weights to begin with: None for random ones. Raises UserError."""
    tokenizer = corpus.tokenizer
    if config.init_from is None:
        return config.model_config(tokenizer.vocab_size), None
    found = load_pretrained(config.init_from)
    # a vocabulary that was padded has ids that no text is encoded to; without a tokenizer its size is all there is
    is_same = found.tokenizer == tokenizer.to_json() or (
        isinstance(tokenizer_from_json(found.tokenizer), NoTokenizer)
        and found.config.vocab_size == tokenizer.vocab_size
    )
    if not is_same:
        raise UserError(f"--init-from {config.init_from}: has another vocabulary than {corpus.name}; see --tokenizer")
    if config.block_size > found.config.block_size:
        raise UserError(f"block_size={config.block_size}: {config.init_from} has {found.config.block_size}; be below")
    if found.config.model == "bigram":
        return replace(found.config, block_size=config.block_size), found.state
    positions = found.state["transformer.wpe.weight"][: config.block_size]
    shape = replace(found.config, block_size=config.block_size, dropout=config.dropout)
    return shape, found.state | {"transformer.wpe.weight": positions}


def _check_room(shape: GPTConfig, batches: Batches, device: torch.device) -> None:
    """Raise UserError where this machine's memory cannot hold what training takes at the least.

    That is a model's weights, which are drawn on the CPU in float32; and if it trains there, also their gradients,
    AdamW's two moments and a micro-batch's logits.
    """
    weights, sequences = 4 * parameter_count(shape), batches.batch_size // batches.world // batches.micro_steps
    check_memory(weights if device.type != "cpu" else 4 * weights, "the model and its training", LESS_MEMORY)
    if device.type == "cpu":
        check_memory(4 * sequences * shape.block_size * shape.vocab_size, "a micro-batch's logits", LESS_MEMORY)


def _wrap(raw: GPT | Bigram, config: TrainConfig, ranks: Ranks) -> tuple[nn.Module, nn.Module]:
    """Return the model to evaluate with and the model to train with; both have the weights of `raw`."""
    if config.recompute and isinstance(raw, GPT):
        for block in raw.transformer.h:
            recomputed = partial(recompute, block.forward, use_reentrant=False)
            block.forward = recomputed  # type: ignore[method-assign]  # nn.Module lets one do so
    # torch.compile's type tells only that the result can be called; of a module it is a module
    compute = cast(nn.Module, torch.compile(raw)) if config.compile else raw
    if ranks.world == 1:
        return compute, compute
    return compute, DistributedDataParallel(compute, gradient_as_bucket_view=True)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = [each.name for each in fields(TrainConfig) if each.name not in UNREMARKABLE]
    return [f"{name}={now[name]} (was {before.get(name)})" for name in names if before.get(name) != now[name]]


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def _set_random_state(path: Path, state: dict[str, Tensor], device: torch.device) -> None:
    try:
        torch.set_rng_state(state["cpu"])
        if device.type in state and device.type != "cpu":
            torch.get_device_module(device).set_rng_state(state[device.type])
    except RuntimeError as error:  # the generator's own checks
        raise UserError(f"{path}: does not fit this run: the random numbers' state: {error}; --overwrite it") from error
