"""Attention whose scores lie far from 0: an exponential of the score itself would be 0 or infinite."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from bench.gpu.emulator import EmulatedLauncher
from export.artifact import ExportedModel
from export.onnx import export_onnx
from gpt.checkpoint import Checkpoint, save_checkpoint
from gpt.config import GPTConfig
from tvm_frontend import pipeline
from tvm_frontend.compile import compile_model
from tvm_frontend.frontends import read_source
from tvm_frontend.kernels.cuda import CudaKernels
from tvm_frontend.options import CompileOptions
from tvm_frontend.pipeline import graph_phases
from tvm_frontend.runtime import open_session
from tvm_frontend.target import resolve_target

pytestmark = pytest.mark.slow

OFFSETS = (-200, -147, 0, 200)  # what is added to every score, by head; softmax is the same for each
HEAD_SIZES = {"even": 16, "odd": 7}
TOLERANCE = 1e-4  # of the largest logit: in float32 a score of 200 is rounded by 1e-5, and weights by as much
Make = Callable[..., tuple[Checkpoint, ExportedModel]]


@pytest.fixture(scope="module")
def make(export, tmp_path_factory) -> Make:
    """Export a model whose scores have the OFFSETS: the first elements of its queries and keys are constants."""

    @cache
    def exported(hs: int, form: str = "forward") -> tuple[Checkpoint, ExportedModel]:
        config = GPTConfig(block_size=24, vocab_size=37, n_layer=1, n_head=4, n_embd=4 * hs)
        checkpoint, _ = export(config)
        state = {name: tensor.clone() for name, tensor in checkpoint.state.items()}
        (weight, bias) = (state[f"transformer.h.0.attn.c_attn.{name}"] for name in ("weight", "bias"))
        for head, offset in enumerate(OFFSETS):
            q, k = head * hs, config.n_embd + head * hs
            for row, value in ((q, round(offset * hs**0.5 / 16)), (k, 16)):  # exact in 8 bits too
                weight[row], bias[row] = 0, value
        checkpoint = replace(checkpoint, state=state)
        folder = tmp_path_factory.mktemp("model")
        save_checkpoint(folder / "ckpt.pt", checkpoint)
        return checkpoint, export_onnx(folder / "ckpt.pt", folder / "model.onnx", form=form)

    return exported


def agree(found: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def random_ids(B: int, T: int) -> np.ndarray:
    return np.random.default_rng([B, T]).integers(0, 37, (B, T))


@pytest.mark.parametrize("head", ["odd", pytest.param("even", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "how",
    [{"opt_level": 0}, {}, {"without": ("fuse_attention",)}, {"frontend": "torch", "opt_level": 0}],
    ids=["O0", "O3", "without fuse_attention", "torch O0"],
)
def test_of_the_whole_sequence(make, eager, head, how):
    checkpoint, exported = make(HEAD_SIZES[head])
    path = exported.path.with_name("ckpt.pt") if "frontend" in how else exported.path
    session = open_session(compile_model(path, options=CompileOptions(**how)), threads=1)
    for B, T in ((1, 1), (2, 24), (3, 17)):
        ids = random_ids(B, T)
        agree(session.prefill(ids), eager(checkpoint, ids))


@pytest.mark.parametrize("head", ["even", pytest.param("odd", marks=pytest.mark.long)])
@pytest.mark.parametrize("opt_level", [0, 3])
def test_over_a_cache(make, eager, head, opt_level):
    checkpoint, exported = make(HEAD_SIZES[head], "cached")
    session = open_session(compile_model(exported.path, options=CompileOptions(opt_level=opt_level)), threads=1)
    ids = random_ids(2, 24)
    expected = eager(checkpoint, ids)
    agree(session.fill(ids[:, :20]), expected[:, 19])
    for at in range(20, 24):
        agree(session.decode(ids[:, at : at + 1], at), expected[:, at])


@pytest.mark.parametrize(
    ("precision", "bits", "head"), [("tf32", 11, "even"), ("fp16", 11, "odd"), ("bf16", 8, "even")]
)
def test_with_the_kernels_of_a_gpu_in_the_emulator(make, eager, monkeypatch, tmp_path, precision, bits, head):
    """Heads of an odd size, and all in tf32, have no kernel of this project: TVM's operator attends."""
    checkpoint, exported = make(HEAD_SIZES[head])
    emulated = EmulatedLauncher()
    monkeypatch.setattr(pipeline, "kernels_for", lambda *_: CudaKernels(precision, emulated))
    model = compile_model(exported.path, tmp_path / "out")
    emulated.load(tmp_path)
    ids = random_ids(2, 24)
    agree(open_session(model, threads=1).prefill(ids), eager(checkpoint, ids), 20 * 2.0**-bits)


@pytest.mark.parametrize(("precision", "head"), [("fp32", "even"), ("tf32", "even"), ("bf16", "odd")])
def test_for_a_gpu_a_hidden_key_has_the_lowest_score(make, precision, head):
    """Read what is scheduled for a GPU where TVM attends: its own lowering gives such a key the score 0."""
    target, graph = resolve_target("cuda"), read_source("onnx", make(HEAD_SIZES[head])[1].path).import_graph()
    for _, phase in graph_phases(target, 3, precision):
        graph = phase(graph)
    (text,) = (kernel.script() for name, kernel in graph.module.functions_items() if "attention" in name.name_hint)
    (largest,) = (line for line in text.splitlines() if "= T.max(" in line)
    assert f"T.float32({float(np.finfo(np.float32).min):.1f})" in largest
