"""Models too large for one file: the graph and its weights get their names together."""

import errno
import os
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import export.onnx
import export.storage
from export.artifact import load_exported
from export.onnx import export_onnx
from gpt.checkpoint import save_checkpoint, seeded_checkpoint
from gpt.cli import UserError


@pytest.fixture(autouse=True)
def no_room(monkeypatch):
    """As if nothing but small tensors fitted in a graph's own file."""
    monkeypatch.setattr(export.storage, "INLINE_BYTES", 0)


@pytest.fixture(scope="module")
def traced(exported, tmp_path_factory):
    """The graph of `exported` with its weights apart, as `trace` leaves it: a function that puts it into a folder."""

    def put(checkpoint, *_, folder):
        proto = onnx.load(exported.path)
        (positions,) = (tensor for tensor in proto.graph.initializer if tensor.name == "transformer.wpe.weight")
        positions.raw_data = checkpoint.state["transformer.wpe.weight"].numpy().tobytes()
        onnx.external_data_helper.convert_model_to_external_data(proto, location="weights", size_threshold=1024)
        onnx.external_data_helper.write_external_data_tensors(proto, str(folder))
        proto.ClearField("metadata_props")
        return proto

    return lambda *arguments: put(*arguments[:-1], folder=arguments[-1])


@pytest.fixture
def quick(monkeypatch, traced):
    """Exports without tracing and proving."""
    monkeypatch.setattr(export.onnx, "trace", traced)
    monkeypatch.setattr(export.onnx, "prove", lambda *_: [])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def large(checkpoint_path, tmp_path, quick):
    return export_onnx(checkpoint_path, tmp_path / "model.onnx")


@pytest.mark.slow
def test_the_graph_is_small_and_finds_its_weights_beside_it(checkpoint_path, exported, tmp_path):
    found = export_onnx(checkpoint_path, tmp_path / "model.onnx")  # traced and proven
    assert found.path.stat().st_size < 40_000 < exported.path.stat().st_size / 2
    assert re.fullmatch(r"model\.onnx\.[0-9a-f]{16}\.data", found.weights.name)
    assert names(tmp_path) == sorted(["model.onnx", found.weights.name])
    assert found.size_bytes == found.path.stat().st_size + found.weights.stat().st_size
    ids = np.arange(20).reshape(2, 10)
    one, two = (
        onnxruntime.InferenceSession(str(each.path), providers=["CPUExecutionProvider"]).run(None, {"ids": ids})[0]
        for each in (exported, found)
    )
    assert np.array_equal(one, two)


def test_a_tied_head_is_in_the_second_file_once(large, checkpoint):
    proto = onnx.load(large.path, load_external_data=False)
    lengths = {
        tensor.name: int(entry.value)
        for tensor in proto.graph.initializer
        for entry in tensor.external_data
        if entry.key == "length"
    }
    assert sum(lengths.values()) == large.weights.stat().st_size
    parameters = {name: each for name, each in checkpoint.build().named_parameters() if each.nbytes > 1024}
    assert sum(lengths.values()) == sum(each.nbytes for each in parameters.values())


def refused(path, said):
    with pytest.raises(UserError, match=said) as caught:
        load_exported(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "python -m export.onnx" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 1, -1])
def test_truncated_weights_are_found(large, kept):
    large.weights.write_bytes(large.weights.read_bytes()[:kept])
    refused(large.path, r"its weights in .*\.data are truncated: \d+ of \d+ bytes")


def test_one_flipped_bit_of_the_weights_is_found(large):
    content = bytearray(large.weights.read_bytes())
    content[len(content) // 2] ^= 1
    large.weights.write_bytes(content)
    refused(large.path, "do not match their hash, so they were damaged")


def test_missing_weights_are_found(large):
    large.weights.unlink()
    refused(large.path, "the file of its weights is missing")


def test_a_graph_made_to_name_other_weights_is_found(large):
    proto = onnx.load(large.path, load_external_data=False)
    (large.path.parent / "other.data").write_bytes(large.weights.read_bytes())
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "other.data"
    large.path.write_bytes(proto.SerializeToString())
    refused(large.path, "does not match its own hash")


@pytest.fixture
def another(large, tmp_path) -> Path:
    """A checkpoint of the same shape with other weights."""
    save_checkpoint(tmp_path / "another.pt", seeded_checkpoint(large.config, seed=3))
    return tmp_path / "another.pt"


def test_the_next_export_replaces_both_files_and_nobody_elses(large, another, tmp_path):
    (tmp_path / "model.onnx.notes.data").write_text("mine")
    again = export_onnx(another, large.path)
    assert again.weights != large.weights
    assert names(tmp_path) == sorted(["another.pt", "model.onnx", again.weights.name, "model.onnx.notes.data"])
    assert load_exported(large.path) == again


def test_a_model_that_fits_again_leaves_no_second_file(large, another, tmp_path, monkeypatch):
    monkeypatch.setattr(export.storage, "INLINE_BYTES", 10**6)
    assert export_onnx(another, large.path).weights is None
    assert names(tmp_path) == ["another.pt", "model.onnx"]


@pytest.mark.parametrize("moment", ["settle_weights", "prove", "place_weights"])
def test_an_interrupted_export_leaves_the_earlier_pair(large, another, tmp_path, monkeypatch, moment):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = names(tmp_path)
    monkeypatch.setattr(export.onnx, moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(another, large.path)
    assert names(tmp_path) == before
    assert load_exported(large.path) == large


def test_between_the_two_names_the_earlier_pair_is_still_whole(large, another, tmp_path, monkeypatch):
    def place_and_die(data, output):
        export.storage.place_weights(data, output)
        raise KeyboardInterrupt

    monkeypatch.setattr(export.onnx, "place_weights", place_and_die)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(another, large.path)
    assert load_exported(large.path) == large
    monkeypatch.setattr(export.onnx, "place_weights", export.storage.place_weights)
    again = export_onnx(another, large.path)  # takes the orphan away, too
    assert names(tmp_path) == sorted(["another.pt", "model.onnx", again.weights.name])


def test_a_full_disk_is_said_in_one_line(checkpoint_path, tmp_path, monkeypatch, quick):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export.storage.os, "replace", full)
    with pytest.raises(UserError, match=r"cannot write .*model\.onnx: No space left on device; free some space"):
        export_onnx(checkpoint_path, tmp_path / "model.onnx")
    assert names(tmp_path) == []
