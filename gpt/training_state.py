"""Check what a checkpoint holds to go on with, before any of it is used.

AdamW's kernel writes as many numbers as a parameter has into each moment, whatever room the moment has: one of another
shape would corrupt memory.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gpt.checkpoint import MOST, Checkpoint, describe_tensor
from gpt.cli import UserError

KINDS = {
    "config": dict,
    "corpus": dict,
    "optimizer": dict,
    "scaler": dict,
    "position": int,
    "rng": list,
    "best_val": float,
    "stale": int,
}
LOSSES = {"step", "train", "val"}


def check_training(
    path: Path,
    checkpoint: Checkpoint,
    training: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: Mapping[str, float],
) -> None:
    """Raise UserError, in one line that says what differs, unless a run can go on with `training` from `path`.

    checkpoint: the model that came with it, whose own checks it has passed. model, optimizer: the run's. scaler: the
    state of the run's own scaler, empty where it has none. That no tensor holds NaN is checked by `load_training`.
    """
    for name, kind in KINDS.items():
        if type(training.get(name)) is not kind:
            _refuse(path, name, _kind_of(training.get(name)), kind.__name__)
    for name in ("position", "stale"):
        if not 0 <= training[name] < MOST:
            _refuse(path, name, str(training[name]), "in 0 … 2**62")
    if math.isnan(training["best_val"]):
        _refuse(path, "best_val", "NaN", "a number")
    if checkpoint.losses.keys() != LOSSES:
        _refuse(path, "losses", f"of {', '.join(sorted(checkpoint.losses)) or 'nothing'}", "of step, train, val")
    _check_moments(path, training["optimizer"].get("state"), checkpoint.step, model, optimizer)
    for name, own in scaler.items() if training["scaler"] else ():
        found = training["scaler"].get(name)
        if type(found) is not type(own) or not 0 <= found < math.inf or (own and not found):
            _refuse(path, f"the scaler's {name}", repr(found), f"a number as {own!r}")
    for rank, states in enumerate(training["rng"]):
        found = states if isinstance(states, dict) and "cpu" in states else {"cpu": None}
        for device, state in found.items():
            if not isinstance(state, Tensor) or state.dim() != 1 or describe_tensor(state) != f"uint8 [{len(state)}]":
                _refuse(path, f"the random numbers' state of rank {rank} on {device}", describe_tensor(state), "uint8")


def check_corpus(path: Path, found: Mapping[str, Any]) -> None:
    """Raise UserError unless `found` has, as `Corpus.identity` does, lists of a hash and two numbers by part."""
    rows = [row for part in found.values() for row in (part if isinstance(part, list) else [part])]
    if not all(isinstance(row, list) and [type(each) for each in row] == [str, int, int] for row in rows):
        _refuse(path, "corpus", "of other entries", "lists of a hash, a size and a time")


def _check_moments(path: Path, found: Any, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise UserError unless `found` has AdamW's two moments and its number of steps for each parameter."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not isinstance(found, dict) or found.keys() != set(range(len(parameters))):
        count = len(found) if isinstance(found, dict) else _kind_of(found)
        _refuse(path, "the optimizer's state", f"of {count} parameters", f"of {len(parameters)}")
    for index, parameter in enumerate(parameters):
        like = f"float32 {list(parameter.shape)}"
        wanted = {"step": "float32 []", "exp_avg": like, "exp_avg_sq": like}
        state = found[index] if isinstance(found[index], dict) else {}
        for moment in sorted(wanted.keys() | state.keys(), key=str):
            name = f"the optimizer's {moment} of {names[parameter]}"
            expected, here = wanted.get(moment, "absent"), describe_tensor(state.get(moment))
            if here != expected:
                _refuse(path, name, here, expected)
            if not state[moment].is_contiguous():
                _refuse(path, name, f"with strides {list(state[moment].stride())}", "contiguous")
            if moment == "exp_avg_sq" and (state[moment] < 0).any():
                _refuse(path, name, "below 0", "a mean of squares")
        if not 0 <= state["step"].item() <= step:
            _refuse(path, f"the optimizer's step of {names[parameter]}", str(state["step"].item()), f"in 0 … {step}")


def _kind_of(found: Any) -> str:
    return "absent" if found is None else type(found).__name__


def _refuse(path: Path, name: str, found: str, wanted: str) -> NoReturn:
    raise UserError(
        f"{path}: does not fit this run: {name} is {found}, not {wanted}; use a checkpoint that gpt.train wrote, or "
        "begin again with --overwrite"
    )
