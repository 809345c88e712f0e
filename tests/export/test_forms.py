"""The forms with a KV cache: what their files promise and compute."""

from collections.abc import Sequence

import numpy as np
import onnxruntime
import pytest
import torch

from export.artifact import ExportedModel
from export.onnx import export_onnx
from gpt.checkpoint import Checkpoint, save_checkpoint, seeded_checkpoint
from gpt.cli import UserError
from gpt.config import GPTConfig

CHUNKS = (20, 1, 1, 7, 1, 2)  # 32 tokens, the tiny model's block_size


def session_of(exported: ExportedModel) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(exported.path), options, providers=["CPUExecutionProvider"])


def empty_caches(exported: ExportedModel, B: int) -> dict[str, np.ndarray]:
    """Each cache of a file, of zeros: of block_size rows, or of none where it grows."""
    sizes = {"B": B, "P": 0}
    described = exported.entry_points[exported.form]["inputs"]
    return {
        name: np.zeros([sizes.get(dim, dim) for dim in dims], dtype)
        for name, (dtype, dims) in described.items()
        if len(dims) == 4
    }


def step(session: onnxruntime.InferenceSession, feed: dict[str, np.ndarray]) -> tuple[np.ndarray, dict]:
    """The logits of one call and the feed of the next, ids aside."""
    names = [value.name for value in session.get_outputs()]
    found = dict(zip(names, session.run(names, feed), strict=True))
    logits = found.pop("logits")
    return logits, {
        name.replace("_out", "").replace("present", "past_key_values"): each for name, each in found.items()
    }


def by_chunks(exported: ExportedModel, ids: np.ndarray, chunks: Sequence[int]) -> np.ndarray:
    """Logits [B, T, V] of ids [B, T], run a chunk at a time."""
    session, logits, at = session_of(exported), [], 0
    kept = empty_caches(exported, len(ids)) | (
        {"pos": np.zeros(len(ids), np.int64)} if exported.form == "cached" else {}
    )
    for T in chunks:
        name = "ids" if exported.form == "cached" else "input_ids"
        found, kept = step(session, {name: ids[:, at : at + T], **kept})
        logits.append(found)
        at += T
    return np.concatenate(logits, axis=1)


def plain(checkpoint: Checkpoint, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return checkpoint.build().double()(torch.from_numpy(ids)).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("form", ["cached", "past"])
def test_chunks_give_the_logits_of_the_whole(form, B, checkpoint, request):
    ids = np.random.default_rng(B).integers(0, 211, (B, 32))
    found = by_chunks(request.getfixturevalue(form), ids, CHUNKS)
    np.testing.assert_allclose(found, plain(checkpoint, ids), rtol=0, atol=2e-5)


def test_sequences_of_different_length_share_a_batch(cached, checkpoint):
    """Two prompts of 5 and 11 tokens, padded at the right; then each goes on from its own length."""
    random, lengths, session = np.random.default_rng(0), np.array([5, 11]), session_of(cached)
    ids = random.integers(0, 211, (2, 20))
    logits, kept = step(session, {"ids": ids[:, :11], "pos": np.zeros(2, np.int64), **empty_caches(cached, 2)})
    for b, length in enumerate(lengths):
        np.testing.assert_allclose(logits[b, :length], plain(checkpoint, ids[b : b + 1, :length])[0], atol=2e-5)
    for T in (1, 3, 1):
        new = np.stack([ids[b, length : length + T] for b, length in enumerate(lengths)])
        logits, kept = step(session, {**kept, "ids": new, "pos": lengths})
        lengths = lengths + T
        assert kept["pos"].tolist() == lengths.tolist()
        for b, length in enumerate(lengths):
            expected = plain(checkpoint, ids[b : b + 1, :length])[0, -T:]
            np.testing.assert_allclose(logits[b], expected, rtol=0, atol=2e-5)


def test_the_names_and_shapes_of_a_static_cache(cached):
    cache = ["float32", ["B", 2, 32, 20]]
    assert (cached.form, cached.opset, cached.precision) == ("cached", 24, "fp32")
    assert list(cached.entry_points["cached"]["inputs"].items()) == [
        ("ids", ["int64", ["B", "T"]]),
        ("pos", ["int64", ["B"]]),
        *((f"cache.{i}.{part}", cache) for i in (0, 1) for part in ("key", "value")),
    ]
    assert list(cached.entry_points["cached"]["outputs"].items()) == [
        ("logits", ["float32", ["B", "T", 211]]),
        ("pos_out", ["int64", ["B"]]),
        *((f"cache_out.{i}.{part}", cache) for i in (0, 1) for part in ("key", "value")),
    ]


@pytest.mark.slow
def test_the_names_and_shapes_of_past_and_present(past):
    assert (past.form, past.opset) == ("past", 23)
    inputs, outputs = (past.entry_points["past"][part] for part in ("inputs", "outputs"))
    assert list(inputs)[:3] == ["input_ids", "past_key_values.0.key", "past_key_values.0.value"]
    assert inputs["past_key_values.1.value"] == ["float32", ["B", 2, "P", 20]]
    assert list(outputs)[:3] == ["logits", "present.0.key", "present.0.value"]
    assert outputs["present.1.value"] == ["float32", ["B", 2, "P+T", 20]]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["cached", "past"])
@pytest.mark.parametrize(
    "config",
    [
        GPTConfig(block_size=1, vocab_size=5, n_layer=1, n_head=1, n_embd=8, tied_head=False),
        GPTConfig(block_size=3, vocab_size=7, n_layer=1, n_head=2, n_embd=2, bias=False, activation="gelu"),
    ],
    ids=["block_size 1, a head of its own", "head size 1, no bias"],
)
def test_other_models_have_these_forms_too(tmp_path, form, config):
    save_checkpoint(tmp_path / "ckpt.pt", seeded_checkpoint(config))
    found = export_onnx(tmp_path / "ckpt.pt", tmp_path / "model.onnx", form=form, last=True)
    assert (found.form, found.config) == (form, config)


def test_a_cache_of_a_bigram_is_refused(tmp_path):
    save_checkpoint(tmp_path / "ckpt.pt", seeded_checkpoint(GPTConfig.bigram(vocab_size=7, block_size=5)))
    for form in ("cached", "past"):
        with pytest.raises(UserError, match="of a bigram: it has no keys and values to keep"):
            export_onnx(tmp_path / "ckpt.pt", tmp_path / "model.onnx", form=form)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
