"""Whole models of transformers, as its users export them, against ONNX Runtime on the same file."""

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import tvm
from tvm import relax

from tvm_frontend.frontends.onnx.importer import import_onnx
from tvm_frontend.options import CompileOptions
from tvm_frontend.pipeline import compile_graph
from tvm_frontend.target import resolve_target

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 97, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
MODELS = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    "llama": lambda: transformers.LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2),
    "opt": lambda: transformers.OPTConfig(**SMALL, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32),
}


class Logits(torch.nn.Module):
    """A model of transformers without a cache: ids [B, T] and a mask [B, T] to logits [B, T, V]."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.slow
@pytest.mark.parametrize(("name", "opset"), [("gpt2", 11), ("llama", 13), ("opt", 17)])
def test_a_torchscript_export_gives_onnxruntimes_logits(name: str, opset: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name](), attn_implementation="eager").eval()
    example = (torch.randint(0, 97, (2, 5)), torch.ones(2, 5, dtype=torch.int64))
    axes = {each: {0: "batch", 1: "length"} for each in ("ids", "mask", "logits")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Logits(model),
            example,
            str(tmp_path / "model.onnx"),
            dynamo=False,
            opset_version=opset,
            input_names=["ids", "mask"],
            output_names=["logits"],
            dynamic_axes=axes,
        )
    proto = onnx.load(tmp_path / "model.onnx")
    made = compile_graph(lambda: import_onnx(proto, keep_types=True), resolve_target(), CompileOptions(opt_level=0))
    forward = relax.VirtualMachine(made.executable, tvm.cpu())["forward"]
    weights = [tvm.runtime.tensor(array) for array in made.graph.weights.values()]
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for B, T in [(1, 1), (2, 7), (1, 33)]:
        ids, mask = np.random.default_rng(T).integers(0, 97, (B, T)), np.ones((B, T), np.int64)
        mask[1:, : T // 3] = 0  # padded on the left
        (expected,) = session.run(None, {"ids": ids, "mask": mask})
        found = forward(tvm.runtime.tensor(ids), tvm.runtime.tensor(mask), weights).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
