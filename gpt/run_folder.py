"""The folder of one training run: checkpoints to resume from, the best one, and the logs."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpt.checkpoint import Checkpoint, save_checkpoint
from gpt.cli import UserError
from gpt.files import atomic_output
from gpt.train_config import TrainConfig


class RunFolder:
    """`step-00000250.pt` … (the last `keep_last`), `best.pt`, `config.json`, `log.jsonl`, `tensorboard/`, `finished`.

    Every file is written whole or not at all, and an old one goes only when its successor is in place.
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
        return sorted(self.path.glob("step-*.pt"))

    def begin(self, resume: bool, overwrite: bool) -> Path | None:
        """Make the folder ready; the checkpoint to resume from, None for a run from the start.

        Raises UserError rather than remove an unfinished run that nobody said to overwrite.
        """
        for path in self.path.glob(".*"):  # a killed run was writing it
            shutil.rmtree(path, ignore_errors=True)
        steps = self.steps()
        if resume and steps:
            self.finished.unlink(missing_ok=True)
            return steps[-1]
        if steps and not (overwrite or self.finished.exists()):
            raise UserError(
                f"{self.path}: holds an unfinished run; go on with --resume, or begin again with --overwrite"
            )
        for path in [*steps, self.best, self.log, self.finished]:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.tensorboard, ignore_errors=True)
        return None

    def save(self, checkpoint: Checkpoint, training: dict[str, Any]) -> None:
        """Write a checkpoint to resume from, then remove those that are too many."""
        save_checkpoint(self.path / f"step-{checkpoint.step:08d}.pt", checkpoint, training)
        for path in self.steps()[: -self.keep_last]:
            path.unlink()

    def write_config(self, config: TrainConfig) -> None:
        """Write the resolved config, for people; checkpoints hold it too."""
        with atomic_output(self.path / "config.json") as part:
            part.write_text(json.dumps(plain(config), indent=1) + "\n")


def plain(config: TrainConfig) -> dict[str, Any]:
    """Return a config as JSON has it."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
