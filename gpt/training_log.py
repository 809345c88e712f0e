"""Report on a training run while it runs: a progress bar, lines of JSON, and TensorBoard. One rank does."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gpt.cli import UserError
from gpt.files import atomic_output
from gpt.progress import progress_bar
from gpt.run_folder import set_aside


class TrainingLog:
    """Writes rows of numbers by step to the bar, to a JSONL file, and to TensorBoard where a folder for it is given.

    step: where the run begins; rows of later steps, which a killed run left, are dropped from the file. So is what is
    no row, as NULs or half a line after a loss of power; that is said, and the file as it was is kept beside it.
    step_tokens: tokens of an update. step_share: what an update a second would be of the devices' peak, if known.
    """

    def __init__(
        self,
        path: Path,
        tensorboard: Path | None,
        step: int,
        max_steps: int,
        step_tokens: int,
        step_share: float | None,
    ) -> None:
        _drop_after(path, step)
        self._file = path.open("a", buffering=1)  # a line at a time: none is lost to a kill
        self._board = _open_board(tensorboard, step) if tensorboard else None
        self._bar = progress_bar(total=max_steps, initial=step, unit="step", desc="train")
        self._step_tokens, self._step_share = step_tokens, step_share

    def step(self, step: int, loss: float, lr: float, grad_norm: float, dt_s: float) -> None:
        """Log an update. step: updates so far. loss: in nats a token. grad_norm: before clipping. dt_s: its seconds."""
        rate, mfu = self._step_tokens / dt_s, self._step_share and self._step_share / dt_s
        row = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm, "dt_s": dt_s, "tokens_per_s": rate}
        self._write(row | {"mfu": mfu})
        used = "" if mfu is None else f", mfu {mfu:.1%}"
        self._bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tok/s{used}", refresh=False)
        self._bar.update()

    def evaluation(self, step: int, train: float, val: float) -> None:
        """Log the loss on both parts, in nats a token; it is printed too."""
        self._write({"step": step, "train": train, "val": val})
        tqdm.write(f"step {step:5d}: train loss {train:.4f}, val loss {val:.4f}")

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; everything is on disk afterwards."""
        self._bar.close()
        self._file.close()
        if self._board:
            self._board.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        if self._board:
            self._board.file_writer.add_summary(_summary_of(row), row["step"])


def check_tensorboard() -> None:
    """Raise UserError where the package tensorboard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "tensorboard=True: needs the package tensorboard; install it with: pip install tensorboard, or leave its "
            "log out with --no-tensorboard"
        )


def _drop_after(path: Path, step: int) -> None:
    """Leave in a log only whole rows of steps up to this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    steps = [_step_of(line) for line in lines]
    if damaged := [number for number, found in enumerate(steps, 1) if found is None]:
        where = f"line {damaged[0]}" if len(damaged) == 1 else f"{len(damaged)} lines from {damaged[0]} on"
        aside = set_aside(path)
        print(f"{path}: {where} of {len(lines)} left out, being no whole rows; as it was it is {aside.name}")
    kept = [line for line, found in zip(lines, steps, strict=True) if found is not None and found <= step]
    with atomic_output(path) as part:
        part.write_bytes(b"".join(kept))


def _step_of(line: bytes) -> int | None:
    """Return the step of a row of the log; None for what is no whole row."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if type(step) is int else None


def _open_board(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)  # of a killed run


def _summary_of(row: dict[str, Any]) -> Any:
    """Return one event for all numbers of a row: add_scalar would write one each."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [
        Summary.Value(tag=tag, simple_value=value) for tag, value in row.items() if tag != "step" and value is not None
    ]
    return Summary(value=values)
