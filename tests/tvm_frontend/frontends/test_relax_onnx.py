import re

import numpy as np
import onnx
import onnx.parser
import pytest

from gpt.cli import UserError
from gpt.config import GPTConfig
from tvm_frontend.compile import compile_model
from tvm_frontend.frontends.relax_onnx import import_by_tvm
from tvm_frontend.options import CompileOptions
from tvm_frontend.runtime import open_session

SMALL = GPTConfig(block_size=17, vocab_size=37, n_layer=1, n_head=2, n_embd=16, bias=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("opset", "exporter", "B", "T", "opt_level"), [(18, "dynamo", 1, 1, 0), (20, "torchscript", 3, 17, 3)]
)
def test_a_model_of_one_shape_computes_what_eager_does(export, eager, opset, exporter, B, T, opt_level):
    checkpoint, exported = export(SMALL, opset=opset, exporter=exporter)
    compiled = compile_model(
        exported.path, options=CompileOptions(frontend="relax-onnx", fixed_shape=(B, T), opt_level=opt_level)
    )
    assert compiled.path.name == f"tvm-llvm-O{opt_level}-relax-onnx"
    assert (compiled.frontend, compiled.fixed_shape) == ("relax-onnx", [B, T])
    session = open_session(compiled, threads=2)
    ids = np.random.default_rng(0).integers(0, 37, (B, T))
    np.testing.assert_allclose(session.prefill(ids), eager(checkpoint, ids), rtol=0, atol=2e-5)
    with pytest.raises(UserError, match=rf"\[2, 5\]: this model was compiled for \[{B}, {T}\] alone"):
        session.prefill(np.zeros((2, 5), np.int64))


@pytest.mark.slow
def test_what_needs_no_shape_takes_any(export, eager):
    checkpoint, exported = export(GPTConfig.bigram(block_size=8, vocab_size=37), opset=18)
    session = open_session(compile_model(exported.path, options=CompileOptions(frontend="relax-onnx")), threads=2)
    for B, T in [(1, 1), (3, 8)]:
        ids = np.random.default_rng(0).integers(0, 37, (B, T))
        np.testing.assert_allclose(session.prefill(ids), eager(checkpoint, ids), rtol=0, atol=2e-5)


REFUSED = {
    "any B and T": (
        {"opset": 18},
        None,
        r"does not know the shape of what relax\.\w+ gives; with --batch and --tokens",
    ),
    "Attention": ({"opset": 23}, (1, 4), r"node '\w+' \(Attention, ai\.onnx opset 23\): KeyError: 'num_heads'$"),
    "a cache": ({"form": "cached"}, (1, 4), r"its form is cached, and --frontend relax-onnx takes the plain"),
    "bf16": ({"precision": "bf16"}, (1, 4), "of bf16, and --frontend relax-onnx takes fp32"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_tvm_cannot_read_is_one_line(export, capsys, case):
    how, fixed_shape, said = REFUSED[case]
    exported = export(SMALL, **how)[1]
    with pytest.raises(UserError, match=said) as caught:
        compile_model(exported.path, options=CompileOptions(frontend="relax-onnx", fixed_shape=fixed_shape))
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_an_operator_that_tvm_does_not_have_is_named():
    proto = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 23]>
        f (float[T] x) => (float[T] y) {
            z = Abs (x)
            [odd] y = RotaryEmbedding (z, z, z)
        }
    """)
    said = "cannot read node 'odd' (RotaryEmbedding, ai.onnx opset 23): OpNotImplemented: The following operators"
    with pytest.raises(UserError, match=re.escape(said)):
        import_by_tvm(proto, None)
