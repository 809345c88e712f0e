"""Exports in fewer bits: of every form, near to float32, and whole or absent."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from export.artifact import load_exported
from export.graph import GraphReader
from export.onnx import export_onnx
from export.quantize import BIN, DESCRIPTION, XML, origin_of, quantize_onnxruntime, quantize_openvino
from gpt.checkpoint import save_checkpoint, seeded_checkpoint
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.costs import matmul_parameters
from tvm_frontend.compile import compile_model
from tvm_frontend.runtime import open_session

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose transposed weights are too large for torch.onnx to fold, exported in each form."""
    path = tmp_path_factory.mktemp("exports")
    config = GPTConfig(block_size=32, vocab_size=211, n_layer=2, n_head=2, n_embd=64, bias=False)
    save_checkpoint(path / "ckpt.pt", seeded_checkpoint(config))
    for form in ("forward", "cached", "past"):
        export_onnx(path / "ckpt.pt", path / f"{form}.onnx", form=form)
    return path


@pytest.mark.parametrize("form", ["forward", "cached", "past"])
def test_onnxruntime_in_8_bits(folder: Path, form: str, tmp_path: Path) -> None:
    source, output = folder / f"{form}.onnx", tmp_path / "int8.onnx"
    losses = quantize_onnxruntime(source, output)
    assert [(loss.B, loss.T) for loss in losses] == [(1, 1), (3, 17), (1, 32)]
    assert all(0 < loss.max_rel_err < 0.05 for loss in losses)
    quantised = load_exported(output)
    assert (quantised.form, quantised.dtype, quantised.config) == (form, "int8", load_exported(source).config)
    assert origin_of(output) == load_exported(source).sha256
    counts = GraphReader(onnx.load(output)).node_counts
    assert counts["MatMulInteger"] == 4 * 2 + 1  # the tied head too
    assert counts["MatMul"] == 0
    assert output.stat().st_size < 0.5 * source.stat().st_size
    assert [file.name for file in tmp_path.iterdir()] == ["int8.onnx"]


@pytest.mark.parametrize(("bits", "least", "most"), [(8, 1e-4, 0.05), (4, 0.01, 0.33)])
@pytest.mark.parametrize("form", ["forward", "past"])
def test_openvino(folder: Path, form: str, bits: int, least: float, most: float, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    output = tmp_path / "quantised"
    losses = quantize_openvino(folder / f"{form}.onnx", output, bits)
    assert all(least < loss.max_rel_err < most for loss in losses[1:])
    assert {file.name for file in output.iterdir()} == {XML, BIN, DESCRIPTION}
    assert origin_of(output) == load_exported(folder / f"{form}.onnx").sha256
    exported = load_exported(folder / f"{form}.onnx")
    table = exported.config.vocab_size * exported.config.n_embd  # the head is a table's copy
    layers = matmul_parameters(exported.config) - table
    assert (output / BIN).stat().st_size < (layers * bits / 8 + 2 * table) * 1.3


@pytest.mark.parametrize("missing", [("nncf",), ("openvino",), ("nncf", "openvino")])
def test_openvinos_quantiser_without_its_packages_says_what_to_install(
    folder: Path, missing: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.quantize.find_spec", lambda name: None if name in missing else name)
    with pytest.raises(UserError, match=f"pip install {' '.join(missing)}$"):
        quantize_openvino(folder / "forward.onnx", tmp_path / "quantised", 8)


def test_what_openvino_cannot_read_is_said(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    with pytest.raises(UserError, match="OpenVINO does not know its operators; export it with --cache past"):
        quantize_openvino(folder / "cached.onnx", tmp_path / "quantised", 8)
    assert not (tmp_path / "quantised").exists()


def test_a_folder_of_something_else_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="exists and is no quantised model"):
        quantize_openvino(folder / "forward.onnx", tmp_path, 8)


def test_a_quantised_export_is_not_quantised_again(folder: Path, tmp_path: Path) -> None:
    quantize_onnxruntime(folder / "forward.onnx", tmp_path / "int8.onnx")
    with pytest.raises(UserError, match="is in int8; quantise an export in fp32"):
        quantize_onnxruntime(tmp_path / "int8.onnx", tmp_path / "again.onnx")


def test_tvm_compiles_it_as_it_is(folder: Path, tmp_path: Path) -> None:
    """Its activations are rounded in both, and one at a tie may be rounded the other way: the check allows for that."""
    quantize_onnxruntime(folder / "forward.onnx", tmp_path / "int8.onnx")
    compiled = compile_model(tmp_path / "int8.onnx", tmp_path / "compiled")
    assert (compiled.form, list(compiled.parts)) == ("graph", [""])
    session, ids = open_session(compiled, threads=2), np.arange(6).reshape(2, 3) % 7
    exact = onnxruntime.InferenceSession(folder / "forward.onnx").run(["logits"], {"ids": ids})[0]
    found = session.prefill(ids)
    assert 0 < np.abs(found - exact).max() < 0.1 * np.abs(exact).max()


def test_a_bigram_has_nothing_to_quantise(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "ckpt.pt", seeded_checkpoint(GPTConfig.bigram(vocab_size=7, block_size=8)))
    export_onnx(tmp_path / "ckpt.pt", tmp_path / "model.onnx")
    with pytest.raises(UserError, match="a bigram has no matrix products"):
        quantize_onnxruntime(tmp_path / "model.onnx", tmp_path / "int8.onnx")


def test_what_was_not_quantised_has_no_origin(folder: Path) -> None:
    with pytest.raises(UserError, match="not a quantised export of ours"):
        origin_of(folder / "forward.onnx")
