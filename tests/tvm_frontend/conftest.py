"""What the tests of `tvm_frontend` share: one tiny checkpoint, its export, and what was compiled from it."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tvm import relax

from export.artifact import ExportedModel
from export.onnx import export_onnx
from gpt import progress
from gpt.checkpoint import Checkpoint, save_checkpoint, seeded_checkpoint
from gpt.cli import run_command
from gpt.config import GPTConfig
from gpt.tokenizer import CharTokenizer
from tvm_frontend.artifact import CompiledModel
from tvm_frontend.compile import compile_model
from tvm_frontend.graph import ENTRY, Graph
from tvm_frontend.runtime import open_session
from tvm_frontend.runtime.session import Session

Export = Callable[..., tuple[Checkpoint, ExportedModel]]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Run a command's `main` with arguments in this process: exit code, stdout, stderr."""

    def run(main: Callable[[], None], *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
        monkeypatch.setattr(progress, "LINE_EVERY_S", float("inf"))  # so that a busy machine has nothing more to say
        code = 0
        try:
            run_command(main)
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def interrupt() -> Callable[..., tuple[int, bytes, bytes]]:
    """Send Ctrl-C to `python -m` with some arguments once its progress bar shows a pattern: exit code, stdout, stderr.

    check: called just before. Its stderr is a terminal, as only there the bar is drawn at once.
    """

    def run(
        pattern: bytes, *arguments: object, folder: Path, check: Callable[[], None] = lambda: None
    ) -> tuple[int, bytes, bytes]:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it: inherited
        terminal, end = pty.openpty()
        termios.tcsetwinsize(end, (24, 80))
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, arguments)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=end,
            stdout=subprocess.PIPE,
        )
        os.close(end)
        shown = b""
        try:
            with suppress(OSError):  # the terminal's end
                while not re.search(pattern, shown):
                    shown += os.read(terminal, 1000)
                check()
                process.send_signal(signal.SIGINT)
                while True:
                    shown += os.read(terminal, 1000)
            out, _ = process.communicate(timeout=300)
        finally:
            process.kill()
            os.close(terminal)
        return process.returncode, out, shown

    return run


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Export random weights, large enough that every part of the model moves the logits, and a tokenizer."""

    @cache
    def exported(config: GPTConfig, form: str = "forward", **how) -> tuple[Checkpoint, ExportedModel]:
        random = seeded_checkpoint(config)
        state = {name: 6 * tensor if tensor.dim() == 2 else tensor for name, tensor in random.state.items()}
        characters = "".join(chr(ord("À") + index) for index in range(config.vocab_size))
        checkpoint = replace(random, state=state, tokenizer=CharTokenizer(characters).to_json())
        folder = tmp_path_factory.mktemp("model")
        save_checkpoint(folder / "ckpt.pt", checkpoint)
        return checkpoint, export_onnx(folder / "ckpt.pt", folder / "model.onnx", form=form, **how)

    return exported


@pytest.fixture(scope="session")
def tiny(export: Export) -> tuple[Checkpoint, ExportedModel]:
    # torch.onnx folds the transpose of a tied head of up to 8192 numbers into a second weight; this one is larger.
    return export(GPTConfig(block_size=70, vocab_size=211, n_layer=2, n_head=2, n_embd=40))


@pytest.fixture(scope="session")
def checkpoint(tiny: tuple[Checkpoint, ExportedModel]) -> Checkpoint:
    return tiny[0]


@pytest.fixture(scope="session")
def exported(tiny: tuple[Checkpoint, ExportedModel]) -> ExportedModel:
    return tiny[1]


@pytest.fixture(scope="session")
def compiled(exported: ExportedModel) -> CompiledModel:
    """Opt level 3 for this machine's CPU."""
    return compile_model(exported.path)


@pytest.fixture(scope="session")
def session(compiled: CompiledModel) -> Session:
    return open_session(compiled, threads=2)


@pytest.fixture(scope="session")
def eager() -> Callable[[Checkpoint, np.ndarray], np.ndarray]:
    """The logits of a checkpoint in float64."""

    def logits(checkpoint: Checkpoint, ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return checkpoint.build().double()(torch.from_numpy(ids)).numpy()

    return logits


@pytest.fixture(scope="session")
def calls() -> Callable[[Graph], Counter]:
    """How often a graph calls each operator (as `relax.add`) and kernel (as `linear`, whatever its number)."""

    def count(graph: Graph) -> Counter:
        found = Counter()
        for block in graph.module[ENTRY].body.blocks:
            for binding in block.bindings:
                if isinstance(binding.value, relax.Call):
                    name = binding.value.op.name
                    if name == "relax.call_tir":
                        name = binding.value.args[0].name_hint.rstrip("0123456789")
                    found[name] += 1
        return found

    return count
