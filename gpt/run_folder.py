"""The folder of one training run: checkpoints to resume from, the best one, and the logs."""

import itertools
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpt.checkpoint import Checkpoint, DamagedError, load_checkpoint, load_training, save_checkpoint
from gpt.cli import UserError
from gpt.files import atomic_output
from gpt.train_config import TrainConfig

STEP = re.compile(r"step-\d{8,}\.pt")


@dataclass(frozen=True)
class Resumption:
    """Tells where a run goes on. path: the newest checkpoint that is whole. notes: what was found damaged, in words.

    best_is_lost: whether `best.pt` is absent or damaged, so that the best model is to be found again.
    """

    path: Path
    notes: tuple[str, ...] = ()
    best_is_lost: bool = False


class RunFolder:
    """`step-00000250.pt` … (the last `keep_last`), `best.pt`, `config.json`, `log.jsonl`, `tensorboard/`, `finished`.

    Every file is written whole or not at all, and an old one goes only when its successor is in place. One that a disk
    has damaged is renamed to `….damaged` and stays until a new run begins.
    """

    def __init__(self, path: Path, keep_last: int = 2) -> None:
        self.path = path
        self.keep_last = keep_last
        self.best = path / "best.pt"
        self.log = path / "log.jsonl"
        self.tensorboard = path / "tensorboard"
        self.finished = path / "finished"

    def steps(self) -> list[Path]:
        """Return the checkpoints to resume from, the oldest first."""
        return sorted((path for path in self.path.glob("step-*.pt") if STEP.fullmatch(path.name)), key=_step_of)

    def begin(self, resume: bool, overwrite: bool) -> Resumption | None:
        """Make the folder ready; return where to resume, None for a run from the start.

        Raises UserError rather than remove an unfinished run that nobody said to overwrite, and where no checkpoint of
        a run to resume is whole.
        """
        for path in self.path.glob(".*"):  # a killed run was writing it
            shutil.rmtree(path, ignore_errors=True)
        steps = self.steps()
        if resume and steps:
            found = self._newest_whole(steps)
            self.finished.unlink(missing_ok=True)
            return found
        if steps and not (overwrite or self.finished.exists()):
            raise UserError(
                f"{self.path}: holds an unfinished run; go on with --resume, or begin again with --overwrite"
            )
        for path in [*steps, self.best, self.log, self.finished, *self.path.glob("*.damaged*")]:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.tensorboard, ignore_errors=True)
        return None

    def save(self, checkpoint: Checkpoint, training: dict[str, Any]) -> None:
        """Write a checkpoint to resume from, then remove those that are too many."""
        save_checkpoint(self.path / f"step-{checkpoint.step:08d}.pt", checkpoint, training)
        for path in self.steps()[: -self.keep_last]:
            path.unlink()

    def _newest_whole(self, steps: list[Path]) -> Resumption:
        """Find the newest checkpoint that is whole, and rename the damaged ones that are newer. Raises UserError."""
        damaged: dict[Path, DamagedError] = {}
        for path in reversed(steps):
            try:
                load_training(path)
            except DamagedError as error:
                damaged[path] = error
            else:
                break
        else:  # they keep their names: without them the next --resume would begin from the start
            reasons = ", ".join(f"{path.name} ({error.reason})" for path, error in damaged.items())
            raise UserError(f"{self.path}: none of its checkpoints is whole: {reasons}; begin again with --overwrite")
        lost = _step_of(steps[-1]) - _step_of(path)
        notes = [_rename_damaged(each, error) for each, error in damaged.items()]
        if damaged:
            notes.append(f"{lost} steps are lost and made again")
        best_is_lost = not self.best.exists()
        try:
            if not best_is_lost:
                load_checkpoint(self.best)
        except DamagedError as error:
            notes.append(f"{_rename_damaged(self.best, error)}, and the model of step {_step_of(path)} takes its place")
            best_is_lost = True
        return Resumption(path, tuple(notes), best_is_lost)

    def write_config(self, config: TrainConfig) -> None:
        """Write the resolved config, for people; checkpoints hold it too."""
        with atomic_output(self.path / "config.json") as part:
            part.write_text(json.dumps(plain(config), indent=1) + "\n")


def set_aside(path: Path) -> Path:
    """Rename a damaged file to `….damaged`, or `….damaged-2` and so on where that is taken; return its new path."""
    names = itertools.chain([".damaged"], (f".damaged-{number}" for number in itertools.count(2)))
    aside = next(place for name in names if not (place := path.with_name(path.name + name)).exists())
    os.rename(path, aside)
    return aside


def _rename_damaged(path: Path, error: DamagedError) -> str:
    return f"{path.name} {error.reason}: renamed to {set_aside(path).name}"


def _step_of(path: Path) -> int:
    """Return the number of updates in a checkpoint's name."""
    return int(path.stem.removeprefix("step-"))


def plain(config: TrainConfig) -> dict[str, Any]:
    """Return a config as JSON has it."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
