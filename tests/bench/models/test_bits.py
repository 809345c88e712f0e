"""One bit flipped in any file of any artifact is found before an engine runs it."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import export.storage
from bench.models.artifacts import Artifacts
from bench.models.build import BUILD_RULES
from export.artifact import UNSEALED, load_exported, write_exported
from export.ctranslate2 import read_files
from export.huggingface import export_huggingface
from export.quantize import read_openvino
from gpt.checkpoint import load_checkpoint
from gpt.cli import UserError
from gpt.corpus import CorpusConfig, build_corpus, verify_corpus
from gpt.files import sha256_file
from gpt.pretrained import load_pretrained

pytestmark = pytest.mark.slow

PLACES = 40  # a file: its first and last bytes, and others between them


def flips(path: Path) -> Iterator[str]:
    """Flip one bit of a file after the other, each taken back before the next; yields what was flipped."""
    content = path.read_bytes()
    random = np.random.default_rng(len(content))
    ends = [place for place in (0, 1, 2, len(content) - 2, len(content) - 1) if 0 <= place < len(content)]
    for place in [*ends, *random.integers(0, len(content), PLACES - len(ends)).tolist()]:
        bit = int(random.integers(8))
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :])
        yield f"{path.name}: bit {bit} of byte {place} of {len(content)}"
    path.write_bytes(content)


def refused(read: Callable[[], object]) -> bool:
    try:
        read()
    except UserError as error:
        return "\n" not in str(error)
    return False


def check_all(folder: Path, read: Callable[[], object]) -> None:
    """Every flip in every file of a folder, or in one file, is a UserError of one line; without one it is read."""
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else [folder]
    assert files
    for path in files:
        for flipped in flips(path):
            assert refused(read), f"not found: {flipped}"
    read()


@pytest.fixture
def copied(tiny: Artifacts, tmp_path: Path) -> Artifacts:
    """A copy of the model's files that may be damaged."""
    shutil.copytree(tiny.folder, tmp_path / "tiny")
    return Artifacts(tmp_path / "tiny")


@pytest.mark.parametrize(
    "name",
    [
        *("model.onnx", "model-cache.onnx", "model-past.onnx", "model-int8.onnx", "ctranslate2"),
        *("model-openvino-int8", "model-past-openvino-int4", "tvm-llvm-O3", "tvm-llvm-O3-cache"),
    ],
)
def test_in_what_was_made_of_a_model(copied: Artifacts, name: str) -> None:
    rule, path = BUILD_RULES[name], copied.folder / name
    if not path.exists():
        rule.make(copied.folder / rule.source, path)
    check_all(path, lambda: rule.origin(path))


def test_in_a_checkpoint(copied: Artifacts) -> None:
    check_all(copied.checkpoint, lambda: load_checkpoint(copied.checkpoint))


def test_in_the_weights_beside_a_graph(copied: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.storage, "INLINE_BYTES", 0)
    folder = copied.folder / "two"
    folder.mkdir()
    proto = onnx.load(copied.exported)
    onnx.external_data_helper.convert_model_to_external_data(proto, location="weights", size_threshold=1024)
    onnx.external_data_helper.write_external_data_tensors(proto, str(folder))
    weights = export.storage.settle_weights(proto, folder / "weights", folder / "model.onnx")
    assert weights is not None
    known = {prop.key: prop.value for prop in proto.metadata_props}
    about = f'{{"file": "{weights.name}", "bytes": {weights.stat().st_size}, "sha256": "{sha256_file(weights)}"}}'
    known |= {"gpt_frontend.weights": about, "gpt_frontend.content_sha256": UNSEALED}
    onnx.helper.set_model_props(proto, known)
    write_exported(proto, folder / "model.onnx")
    check_all(folder, lambda: load_exported(folder / "model.onnx"))


def test_in_a_folder_of_hugging_faces_that_is_ours(copied: Artifacts, tmp_path: Path) -> None:
    folder = export_huggingface(copied.checkpoint, tmp_path / "huggingface")
    check_all(folder, lambda: load_pretrained(str(folder)))


def test_in_the_token_files_of_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 200)
    config = CorpusConfig(str(tmp_path / "text.txt"), tmp_path / "corpus", tokenizer="characters")
    build_corpus(config)
    for path in (tmp_path / "corpus").glob("*.bin"):
        check_all(path, lambda: verify_corpus(tmp_path / "corpus"))


def test_what_was_checked_is_what_is_run(copied: Artifacts) -> None:
    """The bytes that an engine gets are read once: a file that changes after that is not run."""
    files = read_files(copied.folder / "ctranslate2")
    folder = copied.folder / "model-openvino-int8"
    rule = BUILD_RULES[folder.name]
    if not folder.exists():
        rule.make(copied.folder / rule.source, folder)
    graph, weights = read_openvino(folder)
    for path, content in (
        (copied.folder / "ctranslate2" / "model.bin", files["model.bin"]),
        (folder / "model.xml", graph),
        (folder / "model.bin", weights),
    ):
        assert path.read_bytes() == content
        path.write_bytes(b"")
    with pytest.raises(UserError, match="it does not match its hash"):
        read_files(copied.folder / "ctranslate2")
    with pytest.raises(UserError, match="it does not match its hash"):
        read_openvino(folder)


def test_a_hash_that_was_damaged_is_no_hash(copied: Artifacts) -> None:
    """A checkpoint without a hash is one from before there were any; damage cannot make one look like that."""
    checkpoint = load_checkpoint(copied.checkpoint)
    content = copied.checkpoint.read_bytes()
    copied.checkpoint.write_bytes(content[:-84])  # the hash is cut off, but not the length of the comment
    with pytest.raises(UserError, match="it does not match its hash"):
        load_checkpoint(copied.checkpoint)
    older = content[:-86] + b"\0\0"  # as torch.save writes it
    copied.checkpoint.write_bytes(older)
    assert replace(load_checkpoint(copied.checkpoint), state={}).config == checkpoint.config
