import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

import export.onnx
from export.artifact import load_exported
from export.onnx import Request, export_onnx
from gpt.checkpoint import load_checkpoint, save_checkpoint, seeded_checkpoint
from gpt.cli import UserError, run_command
from gpt.config import GPTConfig
from gpt.files import sha256_file

ROOT = Path(__file__).parents[2]


def operators(path):
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def logits_of(path, ids):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": ids})[0]


def test_all_that_the_next_room_needs_travels_with_the_file(exported, checkpoint, checkpoint_path):
    assert exported == load_exported(exported.path)
    assert exported.config == checkpoint.config
    assert exported.tokenizer == checkpoint.tokenizer
    assert exported.opset == 23
    assert exported.dtype == "float32"
    assert exported.entry_points["forward"]["inputs"] == {"ids": ["int64", ["B", "T"]]}
    assert exported.entry_points["forward"]["outputs"] == {"logits": ["float32", ["B", "T", 211]]}
    assert torch.__version__ in exported.exporter
    assert exported.checkpoint_sha256 == sha256_file(checkpoint_path)
    assert exported.sha256 == sha256_file(exported.path)


def test_from_opset_23_attention_gelu_and_layer_norm_are_single_nodes(exported):
    found = operators(exported.path)
    assert (found["Attention"], found["Gelu"], found["LayerNormalization"]) == (2, 2, 5)
    assert not {"Softmax", "Tanh", "Erf", "Pow", "ReduceMean", "Where", "Trilu"} & found.keys()


def test_the_tied_embedding_and_head_are_one_weight(exported, checkpoint):
    weights = onnx.load(exported.path).graph.initializer
    assert [list(weight.dims) for weight in weights].count([211, 40]) == 1
    assert not any(list(weight.dims) == [40, 211] for weight in weights)
    floats = sum(numpy_helper.to_array(weight).size for weight in weights if weight.data_type == onnx.TensorProto.FLOAT)
    assert floats == checkpoint.build().parameter_count()


def test_batch_and_length_are_dynamic_and_named(exported):
    graph = onnx.load(exported.path).graph
    assert [dim.dim_param for dim in graph.input[0].type.tensor_type.shape.dim] == ["B", "T"]
    assert [dim.dim_param or dim.dim_value for dim in graph.output[0].type.tensor_type.shape.dim] == ["B", "T", 211]


@pytest.mark.parametrize("shape", [(1, 1), (5, 2), (2, 31), (3, 32)])
def test_the_file_computes_what_eager_does(exported, checkpoint, shape):
    ids = np.random.default_rng(1).integers(0, 211, shape)
    with torch.inference_mode():
        expected = checkpoint.build().double()(torch.from_numpy(ids)).numpy()
    # Logits of up to 3 in float32, some hundred roundings of 6e-8 each.
    np.testing.assert_allclose(logits_of(exported.path, ids), expected, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 20, 25])
def test_other_opsets_are_what_they_say_and_proven(checkpoint_path, tmp_path, opset):
    found = export_onnx(checkpoint_path, tmp_path / "model.onnx", opset)
    assert found.opset == opset
    assert [entry.version for entry in onnx.load(found.path).opset_import if entry.domain == ""] == [opset]
    assert operators(found.path)["Attention"] == (2 if opset >= 23 else 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        GPTConfig(block_size=1, vocab_size=5, n_layer=1, n_head=1, n_embd=8),
        GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=3, n_embd=12, bias=False, activation="gelu"),
    ],
    ids=["block_size 1", "no bias, exact gelu"],
)
def test_other_models(tmp_path, config):
    save_checkpoint(tmp_path / "ckpt.pt", seeded_checkpoint(config))
    found = export_onnx(tmp_path / "ckpt.pt", tmp_path / "model.onnx")
    assert found.config == config
    assert found.tokenizer == {"kind": "none"}
    gelu = next(node for node in onnx.load(found.path).graph.node if node.op_type == "Gelu")
    approximate = {attribute.name: attribute.s for attribute in gelu.attribute}.get("approximate", b"none")
    assert approximate == (b"none" if config.activation == "gelu" else b"tanh")


@pytest.mark.slow
def test_relu_and_a_head_of_its_own_are_exported(tmp_path):
    # torch.onnx folds the transpose of a head of up to 8192 numbers into a weight of its own; this one is larger
    config = GPTConfig(block_size=8, vocab_size=300, n_layer=2, n_head=2, n_embd=32, activation="relu", tied_head=False)
    save_checkpoint(tmp_path / "ckpt.pt", seeded_checkpoint(config))
    found = export_onnx(tmp_path / "ckpt.pt", tmp_path / "model.onnx")
    assert found.config == config
    assert (operators(found.path)["Relu"], operators(found.path)["Gelu"]) == (2, 0)
    weights = [list(each.dims) for each in onnx.load(found.path).graph.initializer]
    assert weights.count([300, 32]) + weights.count([32, 300]) == 2


def test_a_bigram_is_one_gather(tmp_path):
    config = GPTConfig.bigram(vocab_size=7, block_size=5)
    save_checkpoint(tmp_path / "ckpt.pt", seeded_checkpoint(config))
    found = export_onnx(tmp_path / "ckpt.pt", tmp_path / "model.onnx")
    assert found.config == config
    assert operators(found.path) == {"Gather": 1}


def test_nothing_of_this_machine_is_in_the_file(exported):
    content = exported.path.read_bytes()
    for trace in (str(ROOT), str(exported.path.parent), sys.prefix, os.path.expanduser("~"), "site-packages", ".py"):
        assert trace.encode() not in content, trace


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"opset": 0}, "opset 0: must be 18 to 25 with the dynamo exporter"),
        ({"opset": 17}, "opset 17: must be 18 to 25"),
        ({"opset": 26}, "opset 26: must be 18 to 25"),
        ({"opset": 21, "exporter": "torchscript"}, "opset 21: must be 18 to 20 with the torchscript exporter"),
        ({"opset": 23, "form": "cached"}, "opset 23: a static cache needs 24 or later"),
        ({"opset": 22, "form": "past"}, "opset 22: a past needs 23 or later"),
        ({"exporter": "torchscript", "form": "cached"}, "it needs opset 24, this exporter writes up to 20"),
        ({"exporter": "torchscript", "form": "past", "opset": 20}, "it needs opset 23, this exporter writes up to 20"),
        ({"exporter": "torchscript", "precision": "bf16", "opset": 19}, "ConstantOfShape, which knows no bfloat16"),
        ({"exporter": "tflite"}, "exporter='tflite': must be one of dynamo, torchscript"),
        ({"precision": "int8"}, "precision='int8': must be one of fp32, fp16, bf16"),
        ({"form": "decode"}, "form='decode': must be one of forward, cached, past"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(checkpoint_path, tmp_path, wanted, said):
    with pytest.raises(UserError, match=re.escape(said)):
        export_onnx(checkpoint_path, tmp_path / "model.onnx", **wanted)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("request_", "name", "opset"),
    [
        (Request(), "model.onnx", 23),
        (Request("cached"), "model-cache.onnx", 24),
        (Request("past"), "model-past.onnx", 23),
        (Request(exporter="torchscript"), "model.onnx", 20),
        (Request("cached", precision="bf16"), "model-cache-bf16.onnx", 24),
        (Request("past", last=True, precision="fp16"), "model-past-last-fp16.onnx", 23),
    ],
    ids=str,
)
def test_each_kind_has_a_name_and_an_opset_of_its_own(request_, name, opset):
    assert (request_.default_name, request_.written_opset) == (name, opset)


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.pt.*python -m gpt\.train"):
        export_onnx(tmp_path / "none.pt", tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_refused(checkpoint_path, tmp_path):
    damaged = tmp_path / "ckpt.pt"
    damaged.write_bytes(checkpoint_path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="truncated or damaged"):
        export_onnx(damaged, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == [damaged]


def test_an_output_that_cannot_be_written_is_refused_before_the_work(checkpoint_path, tmp_path, monkeypatch):
    monkeypatch.setattr(export.onnx, "trace", lambda *_: pytest.fail("worked before looking at the output"))
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "model.onnx", tmp_path):
        with pytest.raises(UserError, match=f"cannot write {re.escape(str(output))}"):
            export_onnx(checkpoint_path, output)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_checkpoint_is_not_written_on(checkpoint_path, tmp_path):
    (tmp_path / "link.pt").symlink_to(checkpoint_path)
    content = checkpoint_path.read_bytes()
    for output in (checkpoint_path, tmp_path / "link.pt"):
        with pytest.raises(UserError, match="is read from there; choose another place with -o"):
            export_onnx(checkpoint_path, output)
    assert checkpoint_path.read_bytes() == content


def add_to_a_weight(graph, amount):
    (weight,) = (each for each in graph.initializer if each.name.endswith("ln_f.weight"))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + np.float32(amount), weight.name))


def set_attribute(graph, operator, name, value):
    for node in graph.node:
        if node.op_type == operator:
            others = [attribute for attribute in node.attribute if attribute.name != name]
            del node.attribute[:]
            node.attribute.extend([*others, onnx.helper.make_attribute(name, value)])


WRONG = {
    "a weight": lambda graph: add_to_a_weight(graph, 0.01),
    "a weight that is NaN": lambda graph: add_to_a_weight(graph, np.nan),
    "the mask": lambda graph: set_attribute(graph, "Attention", "is_causal", 0),
    "the scale": lambda graph: set_attribute(graph, "Attention", "scale", 0.25),
    "the kind of GELU": lambda graph: set_attribute(graph, "Gelu", "approximate", "none"),
    "epsilon": lambda graph: set_attribute(graph, "LayerNormalization", "epsilon", 1e-3),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_computes_something_else_is_never_said_to_be_done(
    exported, checkpoint_path, tmp_path, monkeypatch, wrong
):
    def trace(*_):
        proto = onnx.load(exported.path)
        WRONG[wrong](proto.graph)
        return proto

    monkeypatch.setattr(export.onnx, "trace", trace)
    with pytest.raises(RuntimeError, match="ONNX Runtime and eager disagree"):
        export_onnx(checkpoint_path, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_earlier_file_as_it_was(exported, checkpoint_path, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    (tmp_path / "model.onnx").write_text("earlier")
    monkeypatch.setattr(export.onnx, "trace", lambda *_: onnx.load(exported.path))
    monkeypatch.setattr(export.onnx, "prove", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(checkpoint_path, tmp_path / "model.onnx")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("model.onnx", "earlier")]


@pytest.mark.slow
def test_the_command_prints_the_errors_at_each_shape(checkpoint_path, tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(checkpoint_path.read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "export.onnx", "ckpt.pt"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("  prompt ")]
    assert [(int(B), int(T)) for _, B, T, *_ in rows] == [(1, 1), (3, 1), (1, 17), (3, 17), (1, 32), (3, 32)]
    assert all(0 <= float(error) < 1e-4 for row in rows for error in row[3:5])
    written = tmp_path / "artifacts" / "model.onnx"  # where the compiler looks for it
    size = f"{written.stat().st_size / 1e6:.1f} MB"
    assert f"wrote artifacts/model.onnx (forward, {size}, opset 23, dynamo, fp32" in done.stdout
    assert load_exported(written).checkpoint_sha256 == load_checkpoint(checkpoint_path).sha256
    assert "Traceback" not in done.stderr
    assert "arning" not in done.stderr


@pytest.mark.slow
def test_a_checkpoint_that_is_only_in_artifacts_is_taken_from_there(checkpoint_path, tmp_path, monkeypatch, capsys):
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "ckpt.pt").write_bytes(checkpoint_path.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export.onnx", "ckpt.pt"])
    run_command(export.onnx.main)
    printed = capsys.readouterr()
    assert "wrote artifacts/model.onnx" in printed.out
    assert printed.err.startswith("ckpt.pt is not here: artifacts/ckpt.pt is taken\n")


def test_an_absent_checkpoint_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, make in (("ckpt.pt", "-o ckpt.pt"), ("artifacts/ckpt.pt", "")):
        says = rf"^{path}: cannot be read \(No such file or directory\); make one with: python -m gpt.train ?{make}$"
        with pytest.raises(UserError, match=says):
            export_onnx(Path(path), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "arguments",
    [
        ["none.pt"],
        ["CHECKPOINT", "--opset", "17"],
        ["CHECKPOINT", "-o", "."],
        ["CHECKPOINT", "--with-cache", "--opset", "23"],
        ["CHECKPOINT", "--with-cache", "--cache", "past"],
        ["CHECKPOINT", "--cache", "past", "--exporter", "torchscript"],
    ],
)
def test_the_command_ends_a_users_mistake_in_one_line(checkpoint_path, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    arguments = [str(checkpoint_path) if word == "CHECKPOINT" else word for word in arguments]
    monkeypatch.setattr(sys, "argv", ["export.onnx", *arguments])
    with pytest.raises(SystemExit) as caught:
        run_command(export.onnx.main)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", printed.err)
    assert list(tmp_path.iterdir()) == []
