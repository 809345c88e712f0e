"""Loss on text: the number against torch's, which windows are taken, and which text."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.backends import find_candidates
from bench.correctness.loss import TOKENS, find_held_out, nats_of, windows_of
from bench.harness.worker import Worker
from bench.models.artifacts import Artifacts
from bench.models.build import SEEDED
from gpt.checkpoint import load_checkpoint, save_checkpoint, seeded_checkpoint
from gpt.cli import UserError
from gpt.corpus import load_corpus
from gpt.model import loss_of
from gpt.tokenizer import CharTokenizer

TEXT = "the cat sat on the mat\n" * 160


@pytest.fixture
def trained(tmp_path: Path) -> Artifacts:
    """A model of TEXT's characters that says that it was trained."""
    tokenizer = CharTokenizer.of_text(TEXT)
    random = seeded_checkpoint(replace(SEEDED["tiny"], vocab_size=tokenizer.vocab_size))
    save_checkpoint(tmp_path / "ckpt.pt", replace(random, step=1, tokenizer=tokenizer.to_json()))
    (tmp_path / "input.txt").write_text(TEXT)
    return Artifacts(tmp_path)


def test_it_is_torchs_cross_entropy() -> None:
    logits, targets = torch.randn(300, 31), torch.randint(31, (300,))
    assert nats_of(logits.numpy(), targets.numpy()) == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-6)


def test_large_logits_do_not_overflow() -> None:
    assert nats_of(np.array([[1e4, 0.0]], np.float32), np.array([0])) == 0
    assert nats_of(np.array([[1e4, 0.0]], np.float32), np.array([1])) == 1e4


@pytest.mark.parametrize(("count", "expected"), [(17, 1), (32, 1), (33, 2), (100_000, TOKENS // 16)])
def test_windows_do_not_overlap_and_reach_over_the_text(count: int, expected: int) -> None:
    windows = windows_of(np.arange(count), 16)
    assert windows.shape == (expected, 17)
    assert (np.diff(windows) == 1).all()
    assert (np.diff(windows[:, 0]) >= 16).all()
    if count > 16 * TOKENS:
        assert windows[-1, -1] > 0.99 * count


@pytest.mark.slow
def test_an_engines_loss_is_the_one_of_training(trained: Artifacts) -> None:
    held_out = find_held_out(trained, trained.folder / "input.txt")
    val = load_corpus(trained.folder / "input.txt").val
    assert (held_out.windows[0] == val.read(0, 71)).all()
    assert held_out.words.startswith(f"the last tenth of {trained.folder / 'input.txt'}, 350 tokens in 5 windows of 70")
    checkpoint = load_checkpoint(trained.checkpoint)
    windows = torch.from_numpy(held_out.windows)
    with torch.inference_mode():
        expected = loss_of(checkpoint.build()(windows[:, :-1]), windows[:, 1:]).item()
    [eager] = find_candidates(["eager"])
    with Worker(eager.factory, threads=1) as worker:
        worker.call("load", trained, checkpoint.config, 1, "")
        assert worker.call("loss", held_out.windows) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_a_random_model_has_no_loss(tiny: Artifacts) -> None:
    found = find_held_out(tiny, None)
    assert (found.windows, found.words) == (None, "no trained model: no loss")


@pytest.mark.slow
def test_a_text_that_would_not_be_read_is_an_error(tiny: Artifacts, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--text .*: would not be read: no trained model"):
        find_held_out(tiny, tmp_path / "input.txt")
    with pytest.raises(UserError, match="would not be read: no checkpoint"):
        find_held_out(Artifacts(tmp_path), tmp_path / "input.txt")


def test_an_unknown_corpus_is_said_to_be(trained: Artifacts) -> None:
    assert "--text gives a text" in find_held_out(trained, None).words


def test_the_default_corpus_is_known(tmp_path: Path) -> None:
    tokenizer = load_corpus(None).tokenizer
    random = seeded_checkpoint(replace(SEEDED["tiny"], vocab_size=tokenizer.vocab_size))
    save_checkpoint(tmp_path / "ckpt.pt", replace(random, step=1, tokenizer=tokenizer.to_json()))
    found = find_held_out(Artifacts(tmp_path), None)
    assert found.windows.shape == (TOKENS // 70, 71)
    assert "Python's own sources" in found.words


@pytest.mark.parametrize(
    ("text", "says"), [("Ω" * 400, "the character 'Ω'"), ("the cat", "has 1 tokens, and block_size=70")]
)
def test_a_text_that_does_not_fit_is_an_error(trained: Artifacts, text: str, says: str) -> None:
    (trained.folder / "other.txt").write_text(text)
    with pytest.raises(UserError, match=says):
        find_held_out(trained, trained.folder / "other.txt")
