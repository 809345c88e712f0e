"""A bar on a terminal; in a pipe a plain line a minute. The time is given to it, so no test waits."""

import ast
import io
import os
import pty
import sys
import termios
from pathlib import Path

import pytest

from gpt.cli import UserError, run_command
from gpt.progress import PlainProgress, progress_bar

ROOT = Path(__file__).parents[2]


class Clock:
    """A time that a test moves."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_pipe_gets_a_line_a_minute_and_the_last(clock, capfd):
    with PlainProgress(total=300, desc="train", unit="step", clock=clock) as bar:
        for _ in range(300):
            clock.now_s += 1
            bar.set_postfix_str("loss 2.5", refresh=False)
            bar.update()
            bar.refresh()
    shown = capfd.readouterr().err
    lines = shown.splitlines()
    assert [line.split(" [")[0] for line in lines] == [
        "train: 20% 60/300",
        "train: 40% 120/300",
        "train: 60% 180/300",
        "train: 80% 240/300",
        "train: 100% 300/300",
        "train: 100% 300/300",
    ]
    assert all(line.endswith("loss 2.5]") for line in lines)
    assert shown.endswith("\n")
    assert "\r" not in shown
    assert "\x1b" not in shown


def test_a_bar_that_would_vanish_leaves_no_line(clock, capfd):
    with PlainProgress(total=3, desc="run", leave=False, clock=clock) as bar:
        bar.update()
    assert capfd.readouterr().err == ""


def test_a_format_of_its_own_loses_its_bar_alone(clock, capfd):
    with PlainProgress(bar_format="{desc:<20.20} {bar} {elapsed}", leave=False, clock=clock) as bar:
        bar.reset(total=7)
        bar.set_description("load onnxruntime", refresh=False)
        clock.now_s = 61
        bar.refresh()
    assert capfd.readouterr().err == "load onnxruntime:    00:00\n"


def test_a_line_that_is_written_past_it_stays_whole(clock, capfd):
    with PlainProgress(total=2, desc="train", clock=clock) as bar:
        bar.write("step 1")
        bar.update()
    shown = capfd.readouterr()
    assert shown.out == "step 1\n"
    assert shown.err.startswith("train: 50% 1/2 [")
    assert shown.err.count("\n") == 1


def fail_in_a_block() -> None:
    with progress_bar(total=10**6, desc="corpus", unit="B", unit_scale=True) as bar:
        bar.update(1234)
        raise UserError("x")


def fail_in_a_block_of_unknown_length() -> None:
    with progress_bar(desc="corpus", unit="B", unit_scale=True) as bar:
        bar.update(1234)
        raise UserError("x")


def fail_in_a_loop() -> None:
    for _ in progress_bar(range(3), desc="verify", unit="file"):
        raise UserError("x")


@pytest.mark.parametrize(
    ("work", "shown"),
    [
        (fail_in_a_block, "corpus: 0% 1.23k/1.00M ["),
        (fail_in_a_block_of_unknown_length, "corpus: 1.23k B ["),
        (fail_in_a_loop, "verify: 0% 0/3 ["),
    ],
)
def test_an_error_starts_a_line_of_its_own(work, shown, capfd):
    with pytest.raises(SystemExit):
        run_command(work)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith(shown)
    assert lines[1:] == ["error: x"]


def test_without_stderr_nothing_is_shown(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress_bar(range(3))) == [0, 1, 2]


def test_a_terminal_gets_a_bar(monkeypatch):
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert list(progress_bar(range(3), desc="train")) == [0, 1, 2]
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        shown = os.read(leader, 10_000).decode()
    os.close(leader)
    assert "\rtrain: 100%|" in shown


def test_every_bar_of_the_project_is_made_here():
    made = {
        path.relative_to(ROOT).as_posix()
        for package in ("gpt", "export", "tvm_frontend", "bench")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tqdm"
    }
    assert made == set()
