from dataclasses import replace

import numpy as np
import pytest

from gpt.cli import UserError
from gpt.config import GPTConfig
from tvm_frontend.compile import compile_model
from tvm_frontend.options import CompileOptions
from tvm_frontend.runtime import open_session

MODELS = {
    "gpt": GPTConfig(block_size=17, vocab_size=37, n_layer=1, n_head=2, n_embd=16, activation="gelu"),
    "bigram": GPTConfig.bigram(block_size=17, vocab_size=37),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_computes_what_eager_does_at_any_shape(export, eager, name):
    checkpoint, exported = export(MODELS[name])
    path = exported.path.with_name("ckpt.pt")
    compiled = compile_model(path, options=CompileOptions(frontend="torch"))
    assert compiled.path == path.with_name("tvm-llvm-O3-torch")
    assert (compiled.frontend, compiled.fixed_shape) == ("torch", None)
    assert compiled.checkpoint_sha256 == exported.checkpoint_sha256
    session = open_session(compiled, threads=2)
    for B, T in [(1, 1), (3, 1), (1, 17), (3, 17), (2, 16)]:
        ids = np.random.default_rng(0).integers(0, 37, (B, T))
        np.testing.assert_allclose(session.prefill(ids), eager(checkpoint, ids), rtol=0, atol=2e-5)


@pytest.mark.slow
def test_an_onnx_file_is_no_checkpoint(exported):
    with pytest.raises(UserError, match=r"model\.onnx: --frontend torch reads a checkpoint"):
        compile_model(exported.path, options=CompileOptions(frontend="torch"))


@pytest.mark.slow
def test_what_tvm_cannot_read_is_one_line(export):
    path = export(replace(MODELS["gpt"], bias=False))[1].path.with_name("ckpt.pt")
    with pytest.raises(UserError, match=r"node 'layer_norm' \(aten\.layer_norm\.default\): KeyError: None$"):
        compile_model(path, options=CompileOptions(frontend="torch"))
