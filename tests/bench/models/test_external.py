"""Tests python -m bench --onnx: a file that others wrote, as it is, its reference, and the engines that run it."""

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import bench.__main__
from bench.__main__ import those_that_can
from bench.backends import candidates_of, find_candidates, refuse_absent
from bench.correctness.agreement import calibration_shapes
from bench.harness.plan import works_of
from bench.harness.work import PHASES, phases_of
from bench.models import external
from bench.models.artifacts import CACHED, COMPILED_CACHED, COMPILED_O3, EXPORTED, PAST, Artifacts
from bench.models.build import CannotMake, choose_artifacts, prepare
from bench.models.external import Reference, read_external, that_can
from export.onnx import export_onnx
from gpt.checkpoint import save_checkpoint, seeded_checkpoint
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.files import sha256_file

Run = Callable[..., CompletedProcess]
V, C, LONGEST = 37, 8, 16  # of the file that `foreign_file` writes
IDS = np.random.default_rng(0).integers(0, V, (2, 9))


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


@pytest.mark.slow
def test_the_whole_comparison(python: Run, theirs: Path, tmp_path: Path) -> None:
    before = sha256_file(theirs)
    done = python("bench", "--onnx", theirs, "--minutes", "0.02", "--shapes", "2x16", "--threads", "1")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "artifacts" / "onnx-gpt2"
    results = json.loads((folder / "results.json").read_text())
    rows = {row["label"]: row for row in results["rows"]}
    for engine in ("onnxruntime", "openvino", "tvm O0", "tvm O3"):
        assert rows[engine]["agrees"], rows[engine]
        assert rows[engine]["median_ms"] > 0
    assert results["model"]["source"] == "ONNX file"
    assert results["model"]["sha256"] == before == sha256_file(theirs)
    assert results["text"] == "no checkpoint, so no tokenizer: no loss"
    for engine in ("eager", "sdpa", "inductor", "ctranslate2"):
        assert rows[engine]["status"] == "absent"
        assert rows[engine]["reason"] == "needs the model's checkpoint, and an ONNX file is all there is"
    assert results["baselines"] == {"fp32": "onnxruntime"}
    assert len(results["checks"]) >= 8
    assert not list(folder.glob("*.onnx"))  # the engines read the user's own
    page = (folder / "report.md").read_text()
    assert "All 4 agree with the file in float64: the largest error is" in page
    assert f"Model: the model in {theirs}: 2 layers, 2 heads, 32 wide, block 16, vocabulary 31." in page
    html = (folder / "report.html").read_text()
    assert "float32 is compared with the file in float64; the measure is the file as it is written" in html
    assert "PyTorch itself" not in html


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--engine", "eager"], "engine 'eager' was asked for and is absent: needs the model's checkpoint"),
        (["--phases", "decode"], "phase 'decode': must be one of prefill with this model"),
        (["--shapes", "1x17"], "shape '1x17': must be BxT, as 1x64, with B at least 1 and T in 1 … 16"),
        (["--seeded", "tiny"], "seeded 'tiny' and "),
    ],
)
def test_what_cannot_be_is_one_line(python: Run, theirs: Path, arguments: list[str], says: str) -> None:
    done = python("bench", "--onnx", theirs, *arguments)
    assert done.returncode == 2
    assert f"error: {says}" in done.stderr.splitlines()[-1]


def artifacts_of(path: Path) -> Artifacts:
    return choose_artifacts(path.parent / "artifacts", None, path)[0]


def reference_of(path: Path) -> Reference:
    reference = Reference()
    reference.load(artifacts_of(path), read_external(path).shape, 1, "")
    return reference


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "tvm"])
def test_each_engine_goes_on_from_the_files_own_past(engine: str, foreign_file: Callable, tmp_path: Path) -> None:
    """The last position's logits, as in this file each position sees the later ones too."""
    path = foreign_file(tmp_path / "theirs.onnx")
    artifacts, reference = artifacts_of(path), reference_of(path)
    [candidate] = [each for each in find_candidates([engine]) if "decode" in each.phases]
    able = that_can(candidate, artifacts)
    assert (able.absent, able.phases) == (None, ("prefill", "decode", "generate"))
    shape = prepare(artifacts, [able])
    module, name = able.factory.split(":")
    loaded = getattr(importlib.import_module(module), name)()
    loaded.load(artifacts, shape, 1, able.variant)

    def is_right(found: np.ndarray, tokens: np.ndarray) -> bool:
        expected = reference.logits(tokens)
        expected = expected if found.ndim == 3 else expected[:, -1]
        return found.dtype == np.float32 and np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()

    assert is_right(loaded.prefill(IDS), IDS)
    assert is_right(loaded.fill(IDS[:, :6]), IDS[:, :6])
    # The next, the same again, the one behind it, one that is long before, and from there on.
    for context in (6, 6, 7, 2, 2, 3):
        assert is_right(loaded.decode(IDS[:, context : context + 1], context), IDS[:, : context + 1])
    assert is_right(loaded.fill(IDS[:1, :3]), IDS[:1, :3])
    assert is_right(loaded.decode(IDS[:1, 3:4], 3), IDS[:1, :4])


def test_what_is_known_of_a_file(foreign_file: Callable, tmp_path: Path) -> None:
    known = read_external(foreign_file(tmp_path / "theirs.onnx"))
    shape = known.shape
    assert (shape.block_size, shape.vocab_size, shape.fixed, known.ours) == (LONGEST, V, (None, None), False)
    assert (shape.weights, shape.weight_bytes, shape.width) == (C * V, 4 * C * V, C)
    assert phases_of(shape) == tuple(PHASES)
    assert shape.about == "no GPT-2 that could be recognised"
    without = read_external(foreign_file(tmp_path / "without.onnx", past=False)).shape
    assert phases_of(without) == ("prefill",)
    assert without.kept_bytes is None


def test_all_that_is_made_of_a_file_lies_in_a_folder_of_its_own(foreign_file: Callable, tmp_path: Path) -> None:
    path = foreign_file(tmp_path / "theirs.onnx")
    artifacts = artifacts_of(path)
    assert {artifacts.path(name) for name in (EXPORTED, CACHED, PAST)} == {path}
    assert artifacts.path(COMPILED_O3) == artifacts.path(COMPILED_CACHED)
    assert artifacts.path(COMPILED_O3) == tmp_path / "artifacts" / "onnx-theirs" / COMPILED_O3


def changed(path: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    """Write a file anew with a change, under another name."""
    proto = onnx.load(path)
    change(proto)
    onnx.save(proto, path.with_name("changed.onnx"))
    return path.with_name("changed.onnx")


def fix_shapes(proto: onnx.ModelProto) -> None:
    sizes = {"b": 2, "t": 7, "all": 7}
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]


def test_a_file_of_one_shape_is_compared_at_that(foreign_file: Callable, tmp_path: Path) -> None:
    path = changed(foreign_file(tmp_path / "theirs.onnx", past=False), fix_shapes)
    shape = read_external(path).shape
    assert (shape.fixed, shape.block_size, phases_of(shape)) == ((2, 7), 7, ("prefill",))
    works = works_of(shape)
    assert [(work.B, work.T) for work in (*works, *works[0].checked(shape))] == [(2, 7)] * 2
    assert calibration_shapes(shape) == [(2, 7)]
    with pytest.raises(UserError, match="shape '1x7': the file's inputs are 2x7"):
        works_of(shape, (), ["1x7"])
    reference = reference_of(path)
    ids = IDS[:, :7]
    assert np.array_equal(reference.logits(ids[:1]), reference.logits(ids)[:1])  # alone, as it is measured
    assert reference.allowed("fp32", None, 0).worst > 0


def test_a_file_in_half_precision_may_be_off_by_as_much(foreign_file: Callable, tmp_path: Path) -> None:
    def halve(proto: onnx.ModelProto) -> None:
        for tensor in proto.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT:
                array = np.maximum(numpy_helper.to_array(tensor), -6e4).astype(np.float16)
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        for value in (*proto.graph.input, *proto.graph.output):
            if value.type.tensor_type.elem_type == TensorProto.FLOAT:
                value.type.tensor_type.elem_type = TensorProto.FLOAT16

    path = foreign_file(tmp_path / "theirs.onnx")
    half = changed(path, halve)
    assert reference_of(half).logits(IDS).dtype == np.float64
    assert reference_of(half).allowed("fp32", None, 0).rms > 100 * reference_of(path).allowed("fp32", None, 0).rms
    engine = find_candidates(["onnxruntime"])[0].factory.split(":")
    loaded = importlib.import_module(engine[0]).Engine()
    loaded.load(artifacts_of(half), read_external(half).shape, 1, "")
    logits, expected = loaded.prefill(IDS), reference_of(half).logits(IDS)
    assert logits.dtype == np.float32
    assert np.abs(logits - expected).max() < 1e-2 * np.abs(expected).max()


def ask_for_more(proto: onnx.ModelProto) -> None:
    proto.graph.input.append(helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["B", 3]))


def give_nothing(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].name = proto.graph.node[-1].output[0] = "states"
    proto.graph.output[0].type.tensor_type.shape.dim.pop()


def call_others(proto: onnx.ModelProto) -> None:
    proto.graph.node[-1].domain = "com.others"
    proto.opset_import.append(helper.make_opsetid("com.others", 1))


def hold_nan(proto: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "head")
    tensor.CopyFrom(numpy_helper.from_array(np.full((C, V), np.nan, np.float32), "head"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (ask_for_more, r"changed.onnx: input pixels: nothing is known to give it; python -m export.inspect .* shows"),
        (give_nothing, r"changed.onnx: no output of logits, of floating numbers \[B, T, V\], could be told"),
        (
            call_others,
            r"changed.onnx: no float64 reference: operator MatMul of domain com.others is not defined in ONNX",
        ),
        (hold_nan, r"changed.onnx: weight 'head' holds NaN or infinity"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_made(
    foreign_file: Callable, tmp_path: Path, change: Callable[[onnx.ModelProto], None], says: str
) -> None:
    path = changed(foreign_file(tmp_path / "theirs.onnx"), change)
    with pytest.raises(UserError, match=says):
        artifacts_of(path)
    assert not (tmp_path / "artifacts").exists()


def test_a_file_that_is_none_says_why(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no")
    with pytest.raises(UserError, match=r"broken.onnx: not a readable ONNX file"):
        artifacts_of(tmp_path / "broken.onnx")


@pytest.mark.slow
def test_exports_of_ours_are_compared_too(tmp_path: Path) -> None:
    config = GPTConfig(block_size=16, vocab_size=31, n_layer=1, n_head=2, n_embd=32)
    save_checkpoint(tmp_path / "ckpt.pt", seeded_checkpoint(config))
    for form, phases in (("forward", ("prefill",)), ("past", tuple(PHASES))):
        path = export_onnx(tmp_path / "ckpt.pt", tmp_path / f"{form}.onnx", form=form, proof=False).path
        known = read_external(path)
        assert known.ours
        assert (phases_of(known.shape), known.shape.about) == (phases, "1 layers, 2 heads, 32 wide")
        artifacts = artifacts_of(path)
        [able] = [that_can(each, artifacts) for each in find_candidates(["tvm"]) if each.variant == "O3"]
        prepare(artifacts, [able])
        prepare(artifacts, [able])  # what was compiled is of the file, by the hash that it records
    path = export_onnx(tmp_path / "ckpt.pt", tmp_path / "cached.onnx", form="cached", proof=False).path
    with pytest.raises(UserError, match=r"preallocated cache, which is compared where its checkpoint is"):
        artifacts_of(path)


@pytest.mark.slow
def test_what_was_made_of_another_file_is_stale(foreign_file: Callable, tmp_path: Path) -> None:
    path = foreign_file(tmp_path / "theirs.onnx")
    artifacts = artifacts_of(path)
    [able] = [that_can(each, artifacts) for each in find_candidates(["tvm"]) if each.variant == "O0"]
    prepare(artifacts, [able])
    foreign_file(path, past=False)
    read_external.cache_clear()  # as in another process
    with pytest.raises(UserError, match=r"tvm-llvm-O0 was not compiled from .*theirs.onnx: remake it with"):
        prepare(artifacts, [able])


def test_tools_that_know_our_exports_alone_are_absent_with_words(foreign_file: Callable, tmp_path: Path) -> None:
    artifacts = artifacts_of(foreign_file(tmp_path / "theirs.onnx"))
    for engine, precision in (("onnxruntime", "int8"), ("openvino", "int4")):
        [candidate] = find_candidates([engine], [precision])
        assert (
            that_can(candidate, artifacts).absent == "its tool for fewer bits is given this project's own exports alone"
        )
    for candidate in (*candidates_of("eager"), *candidates_of("ctranslate2")):
        assert that_can(replace(candidate, absent=None), artifacts).absent == external.NEEDS


def test_an_engine_that_lacks_an_operator_is_absent_with_its_words(
    monkeypatch: pytest.MonkeyPatch, foreign_file: Callable, tmp_path: Path
) -> None:
    def make(*_: object) -> None:
        raise CannotMake("operator Expand is not supported")

    artifacts = artifacts_of(foreign_file(tmp_path / "theirs.onnx"))
    monkeypatch.setattr(bench.__main__, "prepare", make)
    [found] = those_that_can(find_candidates(["onnxruntime"]), artifacts, ("prefill",))
    assert found.absent == "operator Expand is not supported"
    with pytest.raises(UserError, match="'onnxruntime' was asked for and is absent: operator Expand"):
        refuse_absent(["onnxruntime"], [found])


def test_what_a_tool_has_not_foreseen_in_a_file_is_its_own_fault(
    monkeypatch: pytest.MonkeyPatch, foreign_file: Callable, tmp_path: Path
) -> None:
    def crash(*_: object) -> None:
        raise IndexError("list index out of range\nand more")

    artifacts = artifacts_of(foreign_file(tmp_path / "theirs.onnx"))
    monkeypatch.setattr("tvm_frontend.compile.compile_model", crash)
    [found, _] = those_that_can(find_candidates(["tvm"]), artifacts, ("prefill",))
    assert found.absent == "IndexError: list index out of range"


def test_a_file_of_another_model_is_an_error_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*_: object) -> None:
        raise UserError("model.onnx was not exported from ckpt.pt")

    monkeypatch.setattr(bench.__main__, "prepare", make)
    with pytest.raises(UserError, match="was not exported"):
        those_that_can(find_candidates(["onnxruntime"]), Artifacts(Path()), ("prefill",))
