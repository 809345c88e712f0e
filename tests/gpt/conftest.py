"""What the tests of `gpt` share."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt.checkpoint import Checkpoint
from gpt.config import GPTConfig
from gpt.tokenizer import CharTokenizer
from gpt.train import TrainConfig, train

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config() -> GPTConfig:
    """A model small enough for any test."""
    return GPTConfig(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=16, bias=True)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that a tiny model learns quickly."""
    path = tmp_path_factory.mktemp("corpus") / "fox.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    return path


@pytest.fixture(scope="session")
def train_config(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of less than a second, which may be run over and over."""
    return TrainConfig(
        corpus=text_file,
        output=tmp_path_factory.mktemp("trained") / "ckpt.pt",
        overwrite=True,
        n_layer=2,
        n_head=2,
        n_embd=32,
        block_size=32,
        max_steps=60,
        warmup_steps=5,
        learning_rate=1e-2,
        eval_interval=30,
        eval_batches=2,
        tensorboard=False,
        device="cpu",
        threads=1,
    )


@pytest.fixture(scope="session")
def trained(train_config: TrainConfig) -> Checkpoint:
    """A model that has seen the fox; its tokenizer is the text's."""
    checkpoint = train(train_config)
    assert CharTokenizer(checkpoint.tokenizer["characters"]).vocab_size == 28
    return checkpoint


@pytest.fixture
def environment() -> dict[str, str]:
    """Of a process that finds this code, prints at once and computes on one thread."""
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def start(tmp_path: Path, environment: dict[str, str]) -> Callable[..., subprocess.Popen]:
    """Start `python -m` with some arguments in an empty folder."""

    def begin(*arguments: object) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


@pytest.fixture
def run(start: Callable[..., subprocess.Popen]) -> Callable[..., subprocess.CompletedProcess]:
    """Run `python -m` with some arguments in an empty folder, to its end."""

    def finish(*arguments: object) -> subprocess.CompletedProcess:
        with start(*arguments) as process:
            stdout, stderr = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return finish


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda content: content[: len(content) // 2],
    "a flipped bit": lambda content: (
        content[: (at := len(content) // 2)] + bytes([content[at] ^ 1]) + content[at + 1 :]
    ),
    "empty": lambda content: b"",
    "NULs": lambda content: bytes(len(content)),
}


@pytest.fixture(params=DAMAGE)
def damage(request: pytest.FixtureRequest) -> Callable[[Path], bytes]:
    """Leave of a file what a disk or a loss of power may leave; return what is then in it."""

    def do(path: Path) -> bytes:
        path.write_bytes(DAMAGE[request.param](path.read_bytes()))
        return path.read_bytes()

    return do
