import math

import numpy as np
import pytest

from gpt.cli import UserError
from gpt.config import GPTConfig
from tvm_frontend import pipeline
from tvm_frontend.compile import compile_model
from tvm_frontend.kernels.cuda import CudaKernels
from tvm_frontend.options import CompileOptions
from tvm_frontend.passes.add_choice import add_choice
from tvm_frontend.runtime import open_session
from tvm_frontend.runtime.device_session import DeviceSession

CONFIG = GPTConfig(block_size=150, vocab_size=211, n_layer=2, n_head=2, n_embd=64)


@pytest.fixture
def compiled(export, emulated, tmp_path, monkeypatch):
    """Compile for the CPU with the kernels and casts of a GPU, which the emulator runs."""

    def compile_form(form, precision, **how):
        checkpoint, exported = export(CONFIG, form)
        kernels = CudaKernels(precision, emulated)
        monkeypatch.setattr(pipeline, "kernels_for", lambda target, precision: kernels)
        model = compile_model(exported.path, tmp_path / form, CompileOptions(dump_ir=tmp_path / "ir", **how))
        emulated.load(tmp_path)
        return checkpoint, model

    return compile_form


def close(found, expected, precision):
    # A product is off by a unit roundoff of its size, and products that follow one another add as a random walk; three
    # times that is allowed. float16 and tf32 have 11 bits, bfloat16 8.
    unit_roundoff = 2.0**-8 if precision == "bf16" else 2.0**-11
    tolerance = 3 * unit_roundoff * math.sqrt(4 * CONFIG.n_layer + 1)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_the_whole_model(compiled, eager, precision):
    checkpoint, model = compiled("forward", precision)
    session = open_session(model, 2)
    for B, T in [(1, 1), (3, 17), (1, 150)]:
        ids = np.random.default_rng().integers(0, CONFIG.vocab_size, (B, T))
        close(session.prefill(ids), eager(checkpoint, ids), precision)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_step_by_step_over_a_cache(compiled, eager, precision):
    checkpoint, model = compiled("cached", precision)
    session = open_session(model, 2)
    ids = np.random.default_rng().integers(0, CONFIG.vocab_size, (2, 140))
    expected = eager(checkpoint, ids)
    session.begin(2)
    for first, last in [(0, 20), (20, 21), (21, 138), (138, 139), (139, 140)]:
        close(session.step(ids[:, first:last], np.full(2, first)), expected[:, first:last], precision)


@pytest.fixture
def choosing(monkeypatch):
    """Make models that are compiled for the CPU sample tokens themselves, as on a GPU."""
    bundle = pipeline.bundle_weights
    monkeypatch.setattr(
        pipeline, "bundle_weights", lambda graph: bundle(add_choice(graph, pipeline.kernels_for(None, "")))
    )


@pytest.fixture
def device_session(compiled, choosing):
    """A session of a model with a cache, on the CPU, with the sampling kernel."""
    _, model = compiled("cached", "bf16")
    session = open_session(model, 2)
    assert isinstance(session, DeviceSession)
    return session


def test_without_a_head_of_its_own_nothing_is_chosen_on_the_device(compiled, choosing):
    """Prompts are padded, and the head is what takes the row that the next token is sampled from."""
    _, model = compiled("cached", "bf16", without=["split_head"])
    assert not isinstance(open_session(model, 2), DeviceSession)


def test_tokens_are_chosen_on_the_device(device_session):
    """Equal to the argmax taken step by step; with prompts of different length, and again over a filled cache."""
    lengths = np.array([17, 5])
    for _ in range(2):
        ids = np.random.default_rng().integers(0, CONFIG.vocab_size, (2, 17))
        found = device_session.clone().generate(ids, 4, lengths=lengths)
        np.testing.assert_array_equal(device_session.generate(ids, 4, lengths=lengths), found)
        with pytest.raises(UserError, match=r"the cache holds \[20, 8\] of each sequence"):
            device_session.decode(ids[:, :1], lengths + 4)
        logits, expected = device_session.fill(ids, lengths), []
        for i in range(4):
            expected.append(logits.argmax(-1))
            logits = device_session.decode(expected[-1][:, None], lengths + i)
        np.testing.assert_array_equal(found, np.stack(expected, axis=1))


def test_draws_are_of_the_likeliest_and_of_the_seed(device_session):
    ids = np.random.default_rng().integers(0, CONFIG.vocab_size, (1, 9))
    logits = device_session.fill(ids)[0]
    drawn = [int(device_session.generate(ids, 1, top_k=3, temperature=5.0, seed=seed)[0, 0]) for seed in range(20)]
    assert len(set(drawn)) > 1
    assert set(drawn) <= set(np.argsort(-logits)[:3].tolist())
    assert drawn[7] == device_session.generate(ids, 1, top_k=3, temperature=5.0, seed=7)[0, 0]


def test_what_cannot_be_generated_is_refused(device_session):
    """In one test, as a session takes seconds to make."""
    for arguments, said in (
        ({"tokens": 0}, "tokens=0: must be 1 to 142"),
        ({"tokens": 143}, "tokens=143: must be 1 to 142"),
        ({"tokens": 1, "top_k": 0}, "top_k=0, .* must be 1 to 211"),
        ({"tokens": 1, "temperature": -1.0}, "temperature=-1.0"),
        ({"tokens": 1, "temperature": float("nan")}, "temperature=nan"),
        ({"tokens": 1.5}, "tokens=1.5"),
        ({"tokens": 1, "top_k": 1.5}, "top_k=1.5"),
        ({"tokens": 1, "lengths": np.array([10])}, "must be 1 whole numbers from 1 to 9"),
    ):
        with pytest.raises(UserError, match=said):
            device_session.generate(np.zeros((1, 9), np.int64), **arguments)


def test_what_passes_between_the_kernels_of_a_layer_is_narrow(compiled, tmp_path):
    compiled("forward", "bf16")
    (last,) = (path for path in (tmp_path / "ir").iterdir() if "cancel_casts" in path.name)
    text = last.read_text()
    assert "astype" not in text
    assert text.count("R.call_tir") == 7 * CONFIG.n_layer + 3  # and the embedding, the last LayerNorm, the head
