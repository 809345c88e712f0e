"""Tests the choice of the model to compare, and that each of its files is built from its source."""

import gc
import re
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.backends import Candidate, find_candidates
from bench.correctness.agreement import compare_logits, random_ids
from bench.correctness.reference import allowed_of
from bench.harness.worker import Worker
from bench.models.artifacts import EXPORTED, Artifacts
from bench.models.build import BUILD_RULES, SEEDED, choose_artifacts, prepare, remake_stale
from gpt.checkpoint import load_checkpoint, save_checkpoint, seeded_checkpoint
from gpt.cli import UserError
from gpt.files import sha256_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def candidates() -> list[Candidate]:
    """Provide engines that together need every file."""
    return find_candidates(["eager", "onnxruntime", "openvino", "tvm"])


@pytest.fixture
def copied(copy_tiny: Callable[[Path], Artifacts], tmp_path: Path) -> Artifacts:
    """Copy the model's files to a folder that a test may change."""
    return copy_tiny(tmp_path)


def replace_checkpoint(artifacts: Artifacts) -> None:
    """Replace the checkpoint by another model of the same shape."""
    save_checkpoint(artifacts.checkpoint, seeded_checkpoint(SEEDED["tiny"], seed=1))


def test_a_bigram_walks_the_chain_and_is_exact(tmp_path: Path, candidates: list[Candidate]) -> None:
    """A bigram is exported and compiled at both levels as any model; then each engine returns rows of its table."""
    artifacts, _ = choose_artifacts(tmp_path, "bigram")
    config = prepare(artifacts, candidates)
    ids = random_ids(config, 3, 17, seed=0)
    table = load_checkpoint(artifacts.checkpoint).state["table.weight"].numpy()
    for candidate in candidates:
        with Worker(candidate.factory, threads=1) as worker:
            worker.call("load", artifacts, config, 1, candidate.variant)
            logits = worker.call("prefill", ids)
        assert compare_logits(
            table[ids].astype("float64"), logits, allowed_of(load_checkpoint(artifacts.checkpoint), "fp32")
        ).agrees
        assert np.array_equal(logits, table[ids])


def test_the_chain_is_made_once(tiny: Artifacts, candidates: list[Candidate]) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny.folder.rglob("*")}
    needed = {file for candidate in find_candidates() if not candidate.static for _, file in candidate.files}
    assert {path.name for path in tiny.folder.iterdir()} == needed
    assert prepare(tiny, candidates) == SEEDED["tiny"]
    assert {path: path.stat().st_mtime_ns for path in tiny.folder.rglob("*")} == before


def test_only_what_is_needed_is_made(tmp_path: Path) -> None:
    artifacts, _ = choose_artifacts(tmp_path, "tiny")
    prepare(artifacts, find_candidates(["eager"]))
    assert [path.name for path in artifacts.folder.iterdir()] == ["ckpt.pt"]


def test_only_what_a_phase_needs_is_made(tmp_path: Path) -> None:
    artifacts, _ = choose_artifacts(tmp_path, "tiny")
    prepare(artifacts, find_candidates(["onnxruntime"]), ["generate"])
    assert {path.name for path in artifacts.folder.iterdir()} == {"ckpt.pt", "model-cache.onnx"}


def test_a_compiled_file_brings_what_it_is_compiled_from(tiny: Artifacts) -> None:
    for name, rule in ((name, rule) for name, rule in BUILD_RULES.items() if (tiny.folder / name).exists()):
        assert (tiny.folder / rule.source).exists(), name
        assert rule.origin(tiny.folder / name) == sha256_file(tiny.folder / rule.source)


def test_an_export_of_another_checkpoint_is_an_error(copied: Artifacts, candidates: list[Candidate]) -> None:
    replace_checkpoint(copied)
    with pytest.raises(UserError) as error:
        prepare(copied, candidates)
    [first, stale, command] = re.split(", and with it are stale: |; remake them all with ", str(error.value))
    assert first == f"{copied.exported} was not exported from {copied.checkpoint}"
    made = {path.name for path in copied.folder.iterdir()} - {"ckpt.pt", "model.onnx"}
    assert set(stale.split(", ")) == made
    assert command == f"python -m bench --seeded tiny --artifacts {copied.folder.parent} --remake"


def keep(artifacts: Artifacts, *names: str) -> None:
    for path in artifacts.folder.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_file_alone_is_named_with_the_command_that_makes_it(copied: Artifacts, candidates: list[Candidate]) -> None:
    keep(copied, "ckpt.pt", "model.onnx")
    replace_checkpoint(copied)
    with pytest.raises(UserError) as error:
        prepare(copied, candidates)
    command = f"python -m export.onnx {copied.checkpoint} -o {copied.exported}"
    assert str(error.value) == f"{copied.exported} was not exported from {copied.checkpoint}: remake it with {command}"


def test_what_is_stale_or_damaged_is_made_again_and_nothing_else(copied: Artifacts) -> None:
    """A bit of the export is flipped: it and what was compiled of it are made again, and nothing else."""
    keep(copied, "ckpt.pt", "model.onnx", "tvm-llvm-O0", "ctranslate2")
    content = bytearray(copied.exported.read_bytes())
    content[len(content) // 2] ^= 1
    copied.exported.unlink()  # it is a link to a file that other tests read
    copied.exported.write_bytes(content)
    engine = find_candidates(["onnxruntime"])
    with pytest.raises(UserError, match=r"model\.onnx: does not match its own hash"):
        prepare(copied, engine, ["prefill"])
    assert remake_stale(copied) == [copied.exported, copied.folder / "tvm-llvm-O0"]
    prepare(copied, engine, ["prefill"])
    assert remake_stale(copied) == []


@pytest.mark.parametrize(("engine", "name"), [("onnxruntime", "model-cache.onnx"), ("openvino", "model-past.onnx")])
def test_an_export_with_a_cache_of_another_checkpoint_is_an_error(copied: Artifacts, engine: str, name: str) -> None:
    replace_checkpoint(copied)
    with pytest.raises(UserError, match=rf"{name} was not exported from .*ckpt\.pt, and with it are stale: "):
        prepare(copied, find_candidates([engine]), ["decode"])


def test_a_library_of_another_export_is_an_error(copied: Artifacts, candidates: list[Candidate]) -> None:
    replace_checkpoint(copied)
    copied.exported.unlink()  # so that it is built again
    with pytest.raises(
        UserError, match=r"tvm-llvm-O0 was not compiled from .*model\.onnx, and with it are stale: .*-O3"
    ):
        prepare(copied, candidates, ["prefill"])


def test_a_users_model_is_taken_where_there_is_one(tmp_path: Path) -> None:
    replace_checkpoint(Artifacts(tmp_path))
    artifacts, words = choose_artifacts(tmp_path, None)
    assert artifacts.folder == tmp_path
    assert words == f"the model in {tmp_path / 'ckpt.pt'}"


def test_a_seeded_model_never_lies_in_the_users_folder(tmp_path: Path) -> None:
    replace_checkpoint(Artifacts(tmp_path))
    assert choose_artifacts(tmp_path, "gpt2")[0].folder == tmp_path / "seeded-gpt2"


def test_without_a_model_it_says_that_it_takes_a_seeded_one(tmp_path: Path) -> None:
    artifacts, words = choose_artifacts(tmp_path, None)
    assert artifacts.folder == tmp_path / "seeded-demo"
    assert words.startswith(f"no {tmp_path / 'ckpt.pt'}, so the seeded model 'demo'")


def test_an_export_whose_checkpoint_is_gone_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    with pytest.raises(UserError, match=r"model\.onnx is there, but not .*ckpt\.pt"):
        choose_artifacts(tmp_path, None)


def test_an_unknown_seeded_model_names_the_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'gpt5': not known; known are bigram, char, demo, gpt2, gpt2-medium"):
        choose_artifacts(tmp_path, "gpt5")


def test_what_making_a_file_leaves_is_given_back(copied: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph in a reference cycle with its weights, as in torch, ONNX and TVM, is freed once its file is built."""
    left = []

    class Graph:
        def __init__(self) -> None:
            self.itself = self

    def make(source: Path, path: Path) -> None:
        left.append(weakref.ref(Graph()))
        path.write_bytes(source.read_bytes())

    copied.exported.unlink()
    monkeypatch.setitem(BUILD_RULES, EXPORTED, replace(BUILD_RULES[EXPORTED], make=make))
    gc.disable()
    try:
        prepare(copied, find_candidates(["onnxruntime"]), ["prefill"])
    finally:
        gc.enable()
    assert [graph() for graph in left] == [None]
