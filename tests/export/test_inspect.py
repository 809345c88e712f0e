"""python -m export.inspect on files of ours; tests/export/test_foreign.py has others'."""

import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from export.artifact import ExportedModel
from export.graph import GraphReader
from export.inspect import describe
from export.onnx import export_onnx
from gpt.checkpoint import Checkpoint, save_checkpoint, seeded_checkpoint
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.costs import matmul_parameters, prefill_flops_per_token

ROOT = Path(__file__).parents[2]


def test_the_command_shows_all(exported: ExportedModel, checkpoint: Checkpoint) -> None:
    command = [sys.executable, "-m", "export.inspect", str(exported.path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    config = checkpoint.config
    for line in (
        "config: block_size=32, vocab_size=211, n_layer=2",
        "tokenizer: characters, 211: 'ÀÁ",
        "dtype: float32",
        f"exporter: {exported.exporter}",
        "entry point: forward",
        '  input  ids: int64 ["B", "T"]',
        '  output logits: float32 ["B", "T", 211]',
        f"made from the file with sha256 {exported.checkpoint_sha256}",
        f"sha256 {exported.sha256}",
        "input   ids: int64 [B, T]",
        f"FLOPs per token: {2 * matmul_parameters(config):,} for the {matmul_parameters(config):,} weights",
        f"  with attention over T = 32 tokens, causal: {prefill_flops_per_token(config, 32):,.0f}",
    ):
        assert f"\n{line}" in done.stdout
    assert "Attention 2" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        GPTConfig(block_size=16, vocab_size=31, n_layer=1, n_head=2, n_embd=32, bias=False, activation="relu"),
        GPTConfig(block_size=8, vocab_size=40, n_layer=3, n_head=4, n_embd=32, tied_head=False, activation="gelu"),
    ],
    ids=str,
)
@pytest.mark.parametrize("opset", [18, 23])
def test_the_graph_alone_tells_the_config(config: GPTConfig, opset: int, tmp_path: Path) -> None:
    """What is read of others' files is right of ours, where it is known."""
    save_checkpoint(tmp_path / "ckpt.pt", seeded_checkpoint(config))
    exported = export_onnx(tmp_path / "ckpt.pt", tmp_path / "model.onnx", opset)
    reader = GraphReader(onnx.load(exported.path))
    assert reader.config() == config
    parameters = sum(tensor.numel() for tensor in seeded_checkpoint(config).build().parameters())
    assert reader.flops_per_token == 2 * matmul_parameters(config)
    assert 4 * parameters <= reader.parameter_bytes < 4 * parameters + 10_000


def test_a_damaged_file_of_ours_is_an_error(exported: ExportedModel, tmp_path: Path) -> None:
    proto = onnx.load(exported.path)
    proto.graph.node[0].name = "changed"
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(UserError, match="does not match its own hash"):
        list(describe(tmp_path / "model.onnx"))


def test_ours_without_its_metadata_is_as_anybodys(exported: ExportedModel, tmp_path: Path) -> None:
    proto = onnx.load(exported.path)
    proto.ClearField("metadata_props")
    onnx.save(proto, tmp_path / "model.onnx")
    *_, bench, _ = describe(tmp_path / "model.onnx")
    assert bench.startswith("python -m bench --onnx")
