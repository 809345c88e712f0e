"""Which model is compared, and that its files come from each other."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.backends import Contender, find_contenders
from bench.correctness.agreement import compare_logits, random_ids, tolerance_of
from bench.harness.worker import Worker
from bench.models.artifacts import EXPORTED, Artifacts
from bench.models.build import MAKINGS, SEEDED, choose_artifacts, prepare
from gpt.checkpoint import load_checkpoint, save_checkpoint, seeded_checkpoint
from gpt.cli import UserError
from gpt.files import sha256_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def contenders() -> list[Contender]:
    """Engines that need every file between them."""
    return find_contenders(["eager", "onnxruntime", "openvino", "tvm"])


@pytest.fixture
def copied(copy_tiny: Callable[[Path], Artifacts], tmp_path: Path) -> Artifacts:
    """The model's files in a folder that a test may spoil."""
    return copy_tiny(tmp_path)


def replace_checkpoint(artifacts: Artifacts) -> None:
    """Another model of the same shape in the checkpoint's place."""
    save_checkpoint(artifacts.checkpoint, seeded_checkpoint(SEEDED["tiny"], seed=1))


def test_a_bigram_walks_the_chain_and_is_exact(tmp_path: Path, contenders: list[Contender]) -> None:
    """As any model of the zoo: checkpoint, ONNX, TVM at both levels; then each engine gives rows of the table."""
    artifacts, _ = choose_artifacts(tmp_path, "bigram")
    config = prepare(artifacts, contenders)
    ids = random_ids(config, 3, 17, seed=0)
    table = load_checkpoint(artifacts.checkpoint).state["table.weight"].numpy()
    for contender in contenders:
        with Worker(contender.factory, threads=1) as worker:
            worker.call("load", artifacts, config, 1, contender.variant)
            logits = worker.call("prefill", ids)
        assert compare_logits(table[ids].astype("float64"), logits, tolerance_of("fp32", config)).agrees
        assert np.array_equal(logits, table[ids])


def test_the_chain_is_made_once(tiny: Artifacts, contenders: list[Contender]) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny.folder.rglob("*")}
    needed = {file for contender in find_contenders() if not contender.static for _, file in contender.files}
    assert {path.name for path in tiny.folder.iterdir()} == needed
    assert prepare(tiny, contenders) == SEEDED["tiny"]
    assert {path: path.stat().st_mtime_ns for path in tiny.folder.rglob("*")} == before


def test_only_what_is_needed_is_made(tmp_path: Path) -> None:
    artifacts, _ = choose_artifacts(tmp_path, "tiny")
    prepare(artifacts, find_contenders(["eager"]))
    assert [path.name for path in artifacts.folder.iterdir()] == ["ckpt.pt"]


def test_only_what_a_phase_needs_is_made(tmp_path: Path) -> None:
    artifacts, _ = choose_artifacts(tmp_path, "tiny")
    prepare(artifacts, find_contenders(["onnxruntime"]), ["generate"])
    assert {path.name for path in artifacts.folder.iterdir()} == {"ckpt.pt", "model-cache.onnx"}


def test_a_compiled_file_brings_what_it_is_compiled_from(tiny: Artifacts) -> None:
    for name, making in ((name, making) for name, making in MAKINGS.items() if (tiny.folder / name).exists()):
        assert (tiny.folder / making.source).exists(), name
        assert making.origin(tiny.folder / name) == sha256_file(tiny.folder / making.source)


def test_an_export_of_another_checkpoint_is_an_error(copied: Artifacts, contenders: list[Contender]) -> None:
    replace_checkpoint(copied)
    with pytest.raises(UserError) as error:
        prepare(copied, contenders)
    command = f"python -m export.onnx {copied.checkpoint} -o {copied.exported}"
    assert str(error.value) == f"{copied.exported} was not exported from {copied.checkpoint}: remake it with {command}"


@pytest.mark.parametrize(
    ("engine", "form", "name"), [("onnxruntime", "static", "model-cache.onnx"), ("openvino", "past", "model-past.onnx")]
)
def test_an_export_with_a_cache_of_another_checkpoint_is_an_error(
    copied: Artifacts, engine: str, form: str, name: str
) -> None:
    replace_checkpoint(copied)
    with pytest.raises(UserError, match=rf"{name} was not exported from .*ckpt\.pt: remake it with .* --cache {form}"):
        prepare(copied, find_contenders([engine]), ["decode"])


def test_a_library_of_another_export_is_an_error(copied: Artifacts, contenders: list[Contender]) -> None:
    replace_checkpoint(copied)
    copied.exported.unlink()  # so that it is made again
    with pytest.raises(UserError, match=r"tvm-llvm-O0 was not compiled from .*model\.onnx: remake it with .*-level 0"):
        prepare(copied, contenders, ["prefill"])


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
    """A graph that holds weights and itself, as those of torch, ONNX and TVM do, is gone when its file is there."""
    left = []

    class Graph:
        def __init__(self) -> None:
            self.itself = self

    def make(source: Path, path: Path) -> None:
        left.append(weakref.ref(Graph()))
        path.write_bytes(source.read_bytes())

    copied.exported.unlink()
    monkeypatch.setitem(MAKINGS, EXPORTED, replace(MAKINGS[EXPORTED], make=make))
    gc.disable()
    try:
        prepare(copied, find_contenders(["onnxruntime"]), ["prefill"])
    finally:
        gc.enable()
    assert [graph() for graph in left] == [None]
