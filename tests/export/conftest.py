"""What the tests of `export` share: one tiny checkpoint and its export."""

from dataclasses import replace
from pathlib import Path

import pytest

from export.artifact import ExportedModel
from export.onnx import export_onnx
from gpt.checkpoint import Checkpoint, save_checkpoint, seeded_checkpoint
from gpt.config import GPTConfig
from gpt.tokenizer import CharTokenizer


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    """Random weights, large enough that every part of the model moves the logits, and a tokenizer."""
    # torch.onnx folds the transpose of a tied head of up to 8192 numbers into a second weight; this one is larger.
    config = GPTConfig(block_size=32, vocab_size=211, n_layer=2, n_head=2, n_embd=40)
    random = seeded_checkpoint(config)
    state = {name: 6 * tensor if tensor.dim() == 2 else tensor for name, tensor in random.state.items()}
    characters = "".join(chr(ord("À") + index) for index in range(config.vocab_size))
    return replace(random, state=state, tokenizer=CharTokenizer(characters).to_json())


@pytest.fixture(scope="session")
def checkpoint_path(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "ckpt.pt"
    save_checkpoint(path, checkpoint)
    return path


@pytest.fixture(scope="session")
def exported(checkpoint_path: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    return export_onnx(checkpoint_path, tmp_path_factory.mktemp("exported") / "model.onnx")


@pytest.fixture(scope="session")
def cached(checkpoint_path: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    return export_onnx(checkpoint_path, tmp_path_factory.mktemp("cached") / "model-cache.onnx", form="cached")


@pytest.fixture(scope="session")
def past(checkpoint_path: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    return export_onnx(checkpoint_path, tmp_path_factory.mktemp("past") / "model-past.onnx", form="past")
