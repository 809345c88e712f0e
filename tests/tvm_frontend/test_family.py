"""Every kind of file that an exporter writes of the GPT family: which kernels it becomes, and that they are right."""

from collections import Counter
from copy import deepcopy
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from export.interface import plain_form, signature_of
from gpt.config import GPTConfig
from tvm_frontend.compile import compile_model
from tvm_frontend.frontends.onnx.importer import import_onnx
from tvm_frontend.pipeline import graph_phases
from tvm_frontend.runtime import open_session
from tvm_frontend.target import resolve_target

pytestmark = pytest.mark.slow

TANH = GPTConfig(block_size=17, vocab_size=37, n_layer=1, n_head=2, n_embd=20)
EXACT = replace(TANH, bias=False, activation="gelu")
SHAPES = [(1, 1), (3, 1), (1, 17), (3, 17), (3, 16)]
BIGRAM = GPTConfig.bigram(block_size=17, vocab_size=37)


def random_ids(B, T):
    return np.random.default_rng([B, T]).integers(0, 37, (B, T))


def kernels_of(path, calls):
    """What a file calls when all is rewritten, before the last layer is split off; where masks are of ones."""
    proto = onnx.load(path)
    graph = import_onnx(plain_form(proto, signature_of(proto)) or proto)
    for name, phase in graph_phases(resolve_target(), 3):
        if name == "split_head":
            break
        graph = phase(graph)
    return calls(graph)


def kernels(activation="gelu_tanh", n_layer=1):
    """Seven a layer, and three: nothing that is spelled out is left."""
    layer = {"linear": 1, "causal_attention": 1, f"linear_{activation}": 1, "linear_residual": 2, "layer_norm": 2}
    once = {"embedding": 1, "layer_norm": 1, "linear": 1}
    return Counter({name: n_layer * count for name, count in layer.items()}) + Counter(once)


FILES = {
    "exact, 18": (EXACT, {"opset": 18}),
    "tanh, 20": (TANH, {"opset": 20}),
    "tanh, fp16, 25": (TANH, {"opset": 25, "precision": "fp16"}),
    "exact, torchscript 18": (EXACT, {"opset": 18, "exporter": "torchscript"}),
    "tanh, bf16, 18": (TANH, {"opset": 18, "precision": "bf16"}),
}
# Logits of up to 3 in float32, against float64. A file of bf16 with attention spelled out has the root of its scale
# rounded, 0.4726 for 0.4729, which moves them by 2e-4.
RUN = {"exact, torchscript 18": 2e-5, "tanh, bf16, 18": 1e-3}


@pytest.mark.parametrize("name", FILES)
def test_every_file_becomes_the_same_kernels(export, calls, name):
    config, how = FILES[name]
    assert kernels_of(export(config, **how)[1].path, calls) == kernels(config.activation)


@pytest.mark.parametrize("name", RUN)
def test_a_file_computes_what_its_weights_say(export, eager, name):
    config, how = FILES[name]
    checkpoint, exported = export(config, **how)
    dtype = torch.bfloat16 if how.get("precision") == "bf16" else torch.float32
    session = open_session(compile_model(exported.path), threads=2)
    for B, T in SHAPES:
        ids = random_ids(B, T)
        expected = eager(rounded(checkpoint, dtype), ids)
        np.testing.assert_allclose(session.prefill(ids), expected, rtol=0, atol=RUN[name])


def rounded(checkpoint, dtype):
    """The checkpoint with the weights that a file of the dtype has."""
    return replace(checkpoint, state={name: tensor.to(dtype).float() for name, tensor in checkpoint.state.items()})


def test_a_cache_in_bf16_is_held_in_float32(export, eager):
    checkpoint, exported = export(TANH, form="cached", precision="bf16")
    session = open_session(compile_model(exported.path), threads=2)
    ids = random_ids(3, 17)
    session.begin(3)
    steps = [session.step(ids[:, start:stop], np.full(3, start)) for start, stop in ((0, 10), (10, 11), (11, 17))]
    expected = eager(rounded(checkpoint, torch.bfloat16), ids)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), expected, rtol=0, atol=2e-5)


def test_a_table_gives_the_last_position_alone(export, eager):
    checkpoint, exported = export(BIGRAM, opset=18, last=True)
    session = open_session(compile_model(exported.path), threads=2)
    for B, T in SHAPES:
        ids = random_ids(B, T)
        np.testing.assert_array_equal(session.prefill(ids), eager(checkpoint, ids)[:, -1:].astype("float32"))


@pytest.fixture(scope="module")
def gpt2():
    """A GPT-2 of transformers with random weights, all of which move the logits."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"n_positions": 17, "vocab_size": 37, "n_layer": 2, "n_head": 2, "n_embd": 20}
    settings = transformers.GPT2Config(**shape, use_cache=False, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def theirs(gpt2, tmp_path):
    """What torch.onnx writes of it at opset 18."""

    def export(attention, *inputs):
        ids = torch.arange(16).reshape(2, 8)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(8).expand(2, 8)}
        gpt2.config._attn_implementation = attention
        torch.onnx.export(
            gpt2,
            kwargs={name: given[name] for name in inputs},
            f=tmp_path / "theirs.onnx",
            input_names=list(inputs),
            output_names=["logits"],
            opset_version=18,
            dynamo=True,
            dynamic_shapes={name: dict.fromkeys((0, 1), torch.export.Dim.AUTO) for name in inputs},
            verbose=False,
        )
        return tmp_path / "theirs.onnx"

    return export


def test_gpt2_of_transformers_calls_the_kernels_of_our_own_and_is_right(gpt2, theirs, calls):
    path = theirs("eager", "input_ids")
    assert kernels_of(path, calls) == kernels(n_layer=2)
    session = open_session(compile_model(path), threads=2)
    for B, T in [(1, 1), (3, 17)]:
        ids = random_ids(B, T)
        with torch.inference_mode():
            expected = deepcopy(gpt2).double()(torch.from_numpy(ids)).logits.numpy()
        np.testing.assert_allclose(session.prefill(ids), expected, rtol=0, atol=2e-5)


def test_so_it_does_with_a_mask_and_positions(theirs, calls):
    path = theirs("sdpa", "input_ids", "attention_mask", "position_ids")
    assert kernels_of(path, calls) == kernels(n_layer=2)
