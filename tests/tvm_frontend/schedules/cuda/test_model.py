import numpy as np
import pytest

from bench.agreement import tolerance_of
from gpt.config import GPTConfig
from tvm_frontend import pipeline
from tvm_frontend.compile import compile_model
from tvm_frontend.schedules.cuda import CudaKernels

CONFIG = GPTConfig(block_size=150, vocab_size=211, n_layer=2, n_head=2, n_embd=64)


@pytest.fixture
def compiled(export, emulated, tmp_path, monkeypatch):
    """Compile for the CPU with the kernels and casts of a GPU, which the model of one runs."""

    def compile_form(form, precision):
        checkpoint, exported = export(CONFIG, form)
        kernels = CudaKernels(precision, emulated)
        monkeypatch.setattr(pipeline, "kernels_for", lambda target, precision: kernels)
        model = compile_model(exported.path, tmp_path / form, dump_ir=tmp_path / "ir")
        emulated.load(tmp_path)
        return checkpoint, model

    return compile_form


def close(found, expected, precision):
    # float16 and tf32 have 11 bits, of which bfloat16 has 8
    tolerance = tolerance_of("bf16", CONFIG) / (1 if precision == "bf16" else 8)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_the_whole_model(compiled, eager, precision):
    checkpoint, model = compiled("forward", precision)
    session = model.start(2)
    for B, T in [(1, 1), (3, 17), (1, 150)]:
        ids = np.random.default_rng().integers(0, CONFIG.vocab_size, (B, T))
        close(session.prefill(ids), eager(checkpoint, ids), precision)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_step_by_step_over_a_cache(compiled, eager, precision):
    checkpoint, model = compiled("cached", precision)
    session = model.start(2)
    ids = np.random.default_rng().integers(0, CONFIG.vocab_size, (2, 140))
    expected = eager(checkpoint, ids)
    session.begin(2)
    for first, last in [(0, 20), (20, 21), (21, 138), (138, 139), (139, 140)]:
        close(session.step(ids[:, first:last], np.full(2, first)), expected[:, first:last], precision)


def test_what_passes_between_the_kernels_of_a_layer_is_narrow(compiled, tmp_path):
    compiled("forward", "bf16")
    (last,) = (path for path in (tmp_path / "ir").iterdir() if "cancel_casts" in path.name)
    text = last.read_text()
    assert "astype" not in text
    assert text.count("R.call_tir") == 7 * CONFIG.n_layer + 3  # and the embedding, the last LayerNorm, the head
