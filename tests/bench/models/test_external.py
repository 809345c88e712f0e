"""Tests python -m bench --onnx: an external file, its reference, and the engines that cannot run it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import bench.__main__
from bench.__main__ import those_that_can
from bench.backends import find_candidates, refuse_absent
from bench.models.artifacts import Artifacts
from bench.models.build import CannotMake
from bench.models.external import evaluator_of, in_float64
from export.onnx import export_onnx
from gpt.checkpoint import Checkpoint, save_checkpoint, seeded_checkpoint
from gpt.cli import UserError
from gpt.config import GPTConfig

pytestmark = pytest.mark.slow

Run = Callable[..., CompletedProcess]
CONFIG = GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=32)


def checkpoint_of(**settings: object) -> Checkpoint:
    random = seeded_checkpoint(replace(CONFIG, **settings))
    return replace(random, state={name: 4 * tensor for name, tensor in random.state.items()})


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export transformers' GPT-2 with random weights by torch.onnx."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"n_positions": 16, "vocab_size": 31, "n_layer": 2, "n_head": 2, "n_embd": 32}
    settings = transformers.GPT2Config(**shape, use_cache=False, bos_token_id=0, eos_token_id=0)
    path = tmp_path_factory.mktemp("theirs") / "gpt2.onnx"
    torch.onnx.export(
        transformers.GPT2LMHeadModel(settings).eval(),
        (torch.zeros(2, 8, dtype=torch.int64),),
        path,
        input_names=["input_ids"],
        output_names=["logits"],
        opset_version=23,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},),
        verbose=False,
    )
    return path


def test_the_whole_comparison(python: Run, theirs: Path, tmp_path: Path) -> None:
    done = python("bench", "--onnx", theirs, "--minutes", "0.02", "--shapes", "2x16", "--threads", "1")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "artifacts" / "onnx-gpt2" / "results.json").read_text())
    rows = {row["label"]: row for row in results["rows"]}
    for engine in ("onnxruntime", "openvino", "tvm O0", "tvm O3"):
        assert rows[engine]["agrees"], rows[engine]
        assert rows[engine]["median_ms"] > 0
    assert results["model"]["source"] == "ONNX file"
    assert results["text"] == "no checkpoint, so no tokenizer: no loss"
    for engine in ("eager", "sdpa", "inductor", "ctranslate2"):
        assert rows[engine]["status"] == "absent"
        assert rows[engine]["reason"] == "needs the model's checkpoint, and an ONNX file is all there is"
    assert results["truth"] == "ONNX's reference evaluator in float64"
    assert len(results["checks"]) >= 8


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--engine", "eager"], "engine 'eager' was asked for and is absent: needs the model's checkpoint"),
        (["--phases", "decode"], "phase 'decode': must be prefill with an ONNX file"),
        (["--seeded", "tiny"], "seeded 'tiny' and "),
    ],
)
def test_what_cannot_be_is_one_line(python: Run, theirs: Path, arguments: list[str], says: str) -> None:
    done = python("bench", "--onnx", theirs, *arguments)
    assert done.returncode == 2
    assert f"error: {says}" in done.stderr.splitlines()[-1]


def test_a_file_that_cannot_be_used_says_why(python: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no")
    done = python("bench", "--onnx", "broken.onnx")
    assert done.returncode == 2
    assert "error: broken.onnx: not a readable ONNX file" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu"])
@pytest.mark.parametrize("opset", [18, 23])
def test_the_reference_is_eager_in_float64(tmp_path: Path, activation: str, opset: int) -> None:
    checkpoint = checkpoint_of(activation=activation)
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint)
    exported = export_onnx(tmp_path / "ckpt.pt", tmp_path / "model.onnx", opset)
    ids = np.random.default_rng(0).integers(0, 31, (2, 13))
    with torch.inference_mode():
        expected = checkpoint.build().double()(torch.from_numpy(ids)).numpy()
    (logits,) = evaluator_of(in_float64(onnx.load(exported.path))).run(["logits"], {"ids": ids})
    assert logits.dtype == np.float64
    # The rest is due to float32 constants in the file: epsilon, the scale, those of a decomposed GELU.
    assert np.abs(logits - expected).max() < 1e-8 * np.abs(expected).max()


def test_the_plain_evaluator_would_round_the_error_function() -> None:
    """ONNX's own Erf rounds to float32, which is why the evaluator replaces it."""
    node = onnx.helper.make_node("Erf", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, ["N"]) for name in "xy")
    proto = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y]))
    given = {"x": np.array([0.3])}
    assert abs(ReferenceEvaluator(proto).run(None, given)[0] - 0.3286267594591274) > 1e-9
    assert abs(evaluator_of(proto).run(None, given)[0] - 0.3286267594591274) < 1e-15


def test_an_engine_that_lacks_an_operator_is_absent_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*_: object) -> None:
        raise CannotMake("operator Expand is not supported")

    monkeypatch.setattr(bench.__main__, "prepare", make)
    candidates = find_candidates(["onnxruntime"])
    [found] = those_that_can(candidates, Artifacts(Path()), ("prefill",), onnx_alone=True)
    assert (found.absent, found.phases) == ("operator Expand is not supported", ("prefill",))
    with pytest.raises(UserError, match="'onnxruntime' was asked for and is absent: operator Expand"):
        refuse_absent(["onnxruntime"], [found])


def test_a_file_of_another_model_is_an_error_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*_: object) -> None:
        raise UserError("model.onnx was not exported from ckpt.pt")

    monkeypatch.setattr(bench.__main__, "prepare", make)
    with pytest.raises(UserError, match="was not exported"):
        those_that_can(find_candidates(["onnxruntime"]), Artifacts(Path()), ("prefill",))
