import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.files import sha256_file
from gpt.version import project_version
from tvm_frontend import artifact as artifact_module
from tvm_frontend import target as target_module
from tvm_frontend.artifact import load_compiled
from tvm_frontend.compile import compile_model
from tvm_frontend.options import CompileOptions
from tvm_frontend.runtime import open_session

ROOT = Path(__file__).parents[2]
# Against float64. Logits of up to 3 in float32, each behind some hundred roundings of 6e-8; one row or key too few,
# another mask, epsilon or GELU is off by more than 1e-3.
TOLERANCE = 2e-5
SHAPES = [(1, 1), (1, 2), (3, 17), (2, 31), (1, 32), (1, 33), (1, 64), (5, 13), (4, 65), (1, 70), (7, 70)]


def random_ids(config, B, T):
    return np.random.default_rng([B, T]).integers(0, config.vocab_size, (B, T))


@pytest.mark.slow
@pytest.mark.parametrize(("B", "T"), SHAPES)
def test_one_artifact_serves_every_batch_and_length(session, checkpoint, eager, B, T):
    ids = random_ids(checkpoint.config, B, T)
    logits = session.prefill(ids)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, eager(checkpoint, ids), rtol=0, atol=TOLERANCE)


OTHERS = {
    "no bias, exact gelu": GPTConfig(
        block_size=8, vocab_size=37, n_layer=2, n_head=3, n_embd=21, bias=False, activation="gelu"
    ),
    "block_size 1": GPTConfig(block_size=1, vocab_size=5, n_layer=1, n_head=1, n_embd=8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_models(export, eager, name):
    checkpoint, exported = export(OTHERS[name])
    session = open_session(compile_model(exported.path), threads=2)
    for B, T in [(1, 1), (3, checkpoint.config.block_size)]:
        ids = random_ids(checkpoint.config, B, T)
        np.testing.assert_allclose(session.prefill(ids), eager(checkpoint, ids), rtol=0, atol=TOLERANCE)


def test_it_knows_what_it_came_from(compiled, exported, checkpoint):
    assert compiled == load_compiled(compiled.path)
    assert compiled.path == exported.path.with_name("tvm-llvm-O3")
    assert (compiled.config, compiled.tokenizer) == (checkpoint.config, checkpoint.tokenizer)
    assert (compiled.dtype, compiled.opt_level, compiled.target["kind"]) == ("float32", 3, "llvm")
    assert compiled.pipeline == list(compiled.phases_s)
    assert compiled.exported_sha256 == sha256_file(exported.path)
    assert compiled.versions["gpt-frontend"] == project_version()
    assert compiled.checkpoint_sha256 == exported.checkpoint_sha256


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (np.full((1, 3), 211), r"token id 211: must be in 0 … 210"),
        (np.array([[0, -1]]), "token id -1: must be in"),
        (np.zeros((1, 71), "int64"), r"\[1, 71\]: must be \[B, T\] with T from 1 to 70"),
        (np.zeros((1, 0), "int64"), r"\[1, 0\]: must be"),
        (np.zeros((0, 4), "int64"), "no token ids"),
        (np.zeros(4, "int64"), r"\[4\]: must be"),
        (np.zeros((1, 2, 3), "int64"), r"\[1, 2, 3\]: must be"),
        (np.zeros((1, 4), "float32"), "whole numbers"),
    ],
)
def test_what_is_no_prompt_is_refused(session, ids, said):
    with pytest.raises(UserError, match=said):
        session.prefill(ids)


def test_a_list_and_narrow_integers_are_ids_too(session):
    expected = session.prefill(np.array([[1, 2, 3]]))
    np.testing.assert_array_equal(session.prefill([[1, 2, 3]]), expected)
    np.testing.assert_array_equal(session.prefill(np.array([[1, 2, 3]], "uint8")), expected)
    np.testing.assert_array_equal(session.prefill(np.array([[3, 2, 1]])[:, ::-1]), expected)


@pytest.mark.slow
def test_it_runs_where_torch_and_onnx_are_not_installed(compiled, session, tmp_path):
    ids = random_ids(compiled.config, 2, 9)
    np.save(tmp_path / "ids.npy", ids)
    code = """
import sys
for name in ("torch", "onnx", "onnxruntime", "onnxscript"):
    sys.modules[name] = None  # importing it fails
import numpy as np
from tvm_frontend.artifact import load_compiled
from tvm_frontend.runtime import open_session
np.save("logits.npy", open_session(load_compiled(sys.argv[1]), threads=1).prefill(np.load("ids.npy")))
"""
    subprocess.run(
        [sys.executable, "-c", code, str(compiled.path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), session.prefill(ids))


@pytest.fixture
def copy(compiled, tmp_path):
    return Path(shutil.copytree(compiled.path, tmp_path / "copy"))


def flip_a_bit(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def refused(path, said):
    with pytest.raises(UserError, match=said) as caught:
        load_compiled(path)
    assert str(caught.value).startswith(f"{path}")
    assert "python -m tvm_frontend.compile" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["library.so", "weights.bin"])
def test_a_damaged_or_missing_file_is_found_and_named(copy, name):
    flip_a_bit(copy / name, 5000)
    refused(copy, rf"{re.escape(name)}: missing or damaged")
    flip_a_bit(copy / name, 5000)
    load_compiled(copy)
    os.truncate(copy / name, (copy / name).stat().st_size - 1)
    refused(copy, rf"{re.escape(name)}: missing or damaged")
    (copy / name).unlink()
    refused(copy, rf"{re.escape(name)}: missing or damaged")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"format": 1}', "\udcff"])
def test_a_description_that_is_none_is_refused(copy, text):
    (copy / "model.json").write_text(text, errors="surrogateescape")
    refused(copy, r"model\.json: damaged")


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content["config"].update(block_size=140),
        lambda content: content.update(opt_level=0),
        lambda content: content["files_crc32"].pop("library.so"),
        lambda content: content.update(format=1),
    ],
)
def test_an_edited_description_is_found(copy, edit):
    content = json.loads((copy / "model.json").read_text())
    edit(content)
    (copy / "model.json").write_text(json.dumps(content))
    refused(copy, r"model\.json: damaged or edited")


def test_what_is_no_compiled_model_is_refused(tmp_path):
    refused(tmp_path / "none", "no compiled model there")
    refused(tmp_path, "no compiled model there")


def test_a_lesser_cpu_is_refused_before_its_code_is_loaded(compiled, monkeypatch):
    lacking = sorted(compiled.target["features"])[0]
    here = target_module._host_features() - {lacking}
    monkeypatch.setattr(target_module, "_host_features", lambda: here)
    with pytest.raises(UserError, match=f"lacks {re.escape(lacking)}: compile it here"):
        open_session(compiled)


def test_weights_are_views_of_the_file_that_kernels_can_take(compiled):
    weights = compiled.map_weights()
    assert len({id(weight.base) for weight in weights}) == 1
    assert all(weight.__array_interface__["data"][0] % 64 == 0 for weight in weights)
    assert sum(weight.nbytes for weight in weights) <= (compiled.path / "weights.bin").stat().st_size


def rehash(path, edit):
    """Edit the description of an artifact, and make its hash and checksums match again."""
    content = json.loads((path / "model.json").read_text())
    del content["sha256"]
    edit(content)
    content["files_crc32"] = {
        name: artifact_module._crc32(path / name) if (path / name).is_file() else crc32
        for name, crc32 in content["files_crc32"].items()
    }
    (path / "model.json").write_text(json.dumps(content | {"sha256": artifact_module._sha256(content)}))
    return content


def test_a_recorded_instruction_that_this_cpu_lacks_is_an_error_before_the_library_is_loaded(copy):
    """On any machine: the artifact is made for another, and its library could not be loaded."""
    content = rehash(copy, lambda content: content["target"]["features"].append("a-feature-of-tomorrow"))
    (copy / "library.so").write_bytes(b"no library" + artifact_module._seal(content, "library.so"))
    rehash(copy, lambda _: None)
    with pytest.raises(UserError, match="lacks a-feature-of-tomorrow: compile it here") as caught:
        open_session(load_compiled(copy))
    assert "\n" not in str(caught.value)


EDITS = {
    "vocab_size": lambda content: content["config"].update(vocab_size=1000),
    "block_size": lambda content: content["config"].update(block_size=140),
    "n_head": lambda content: content["config"].update(n_head=4),
    "tokenizer": lambda content: content.update(tokenizer={"kind": "none"}),
    "mcpu": lambda content: content["target"].update(mcpu="x86-64", features=[]),
    "archs": lambda content: content["target"].update(kind="cuda", archs=["sm_86"]),
    "precision": lambda content: content.update(precision="bf16"),
    "form": lambda content: content.update(form="cached"),
    "caches": lambda content: content.update(caches=[{"dtype": "float32", "shape": [2, 140, 20]}]),
    "entry_points": lambda content: content.update(entry_points=["forward"]),
    "fixed_shape": lambda content: content.update(fixed_shape=[1, 1000]),
    "frontend": lambda content: content.update(frontend="relay"),
    "opt_level": lambda content: content.update(opt_level=0),
    "checkpoint_sha256": lambda content: content.update(checkpoint_sha256=64 * "0"),
    "weights": lambda content: content["weights"][0].update(offset=64),
    "shape of a weight": lambda content: content["weights"][0].update(shape=[1, 1]),
    "a field more": lambda content: content.update(more=1),
    "a field less": lambda content: content.pop("config"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_only_the_description_that_a_library_was_compiled_with_is_believed(copy, edit):
    rehash(copy, EDITS[edit])
    refused(copy, r"model\.json: edited, or of another model than library\.so")


@pytest.mark.parametrize("files", [{}, None, [], {"weights.bin": 0}, {"library.so/../library.so": 0}])
def test_a_description_without_its_library_is_refused(copy, files):
    content = json.loads((copy / "model.json").read_text())
    del content["sha256"]
    content["files_crc32"] = files
    (copy / "model.json").write_text(json.dumps(content | {"sha256": artifact_module._sha256(content)}))
    refused(copy, r"model\.json: damaged, it names no library")


@pytest.mark.parametrize("name", ["weights.bin", "library.so"])
def test_files_of_two_artifacts_are_no_artifact(copy, compiled, name):
    """Weights of the same shapes, or a library of the same functions, as another checkpoint has them."""
    content = bytearray((copy / name).read_bytes())
    content[5000] ^= 1
    if name == "library.so":
        other = json.loads((copy / "model.json").read_text()) | {"checkpoint_sha256": 64 * "0"}
        del other["sha256"]
        content[-len(artifact_module._seal(other, name)) :] = artifact_module._seal(other, name)
    (copy / name).write_bytes(content)
    rehash(copy, lambda _: None)
    refused(copy, r"model\.json: edited, or of another model than library\.so")


@pytest.mark.slow
def test_a_model_compiled_anew_at_the_same_place_is_the_one_that_runs(export, eager, tmp_path):
    """The linker takes a file that it has loaded for the same, by its name."""
    for activation in ("gelu_tanh", "relu"):
        config = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8, activation=activation)
        checkpoint, exported = export(config)
        session = open_session(compile_model(exported.path, tmp_path / "model"), threads=1)
        ids = np.arange(8)[None]
        np.testing.assert_allclose(session.prefill(ids), eager(checkpoint, ids), rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_phases_can_be_left_out(exported, checkpoint, eager):
    left_out = ("fuse_attention", "fuse_layer_norm", "split_head", "promise_no_alias")
    compiled = compile_model(exported.path, options=CompileOptions(without=left_out))
    assert compiled.path.name == "tvm-llvm-O3-without-fuse_attention-fuse_layer_norm-split_head-promise_no_alias"
    assert "fuse_linear" in compiled.pipeline
    assert not set(left_out) & set(compiled.pipeline)
    session = open_session(compiled, threads=2)
    for B, T in [(1, 1), (3, 17)]:
        ids = random_ids(checkpoint.config, B, T)
        np.testing.assert_allclose(session.prefill(ids), eager(checkpoint, ids), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("opt_level", "phase"), [(3, "lower"), (3, "fuse_everything"), (0, "fuse_linear")])
def test_a_phase_that_is_not_there_or_must_be_is_refused(exported, opt_level, phase):
    with pytest.raises(UserError, match=f"without '{phase}': must be one of (recover_gelu, .*|no phase at all)"):
        compile_model(exported.path, options=CompileOptions(opt_level=opt_level, without=(phase,)))
