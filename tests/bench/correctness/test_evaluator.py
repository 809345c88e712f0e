"""The float64 reference of an ONNX file: against PyTorch in float64, and operators of which ONNX's own round."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from bench.correctness.evaluator import evaluator_of, widened
from bench.models.inputs import Inputs
from export.interface import signature_of
from export.onnx import export_onnx
from gpt.checkpoint import save_checkpoint, seeded_checkpoint
from gpt.config import GPTConfig

EXACT = 2.0**-17  # an epsilon that float32 holds exactly, as it does the scale of heads of 16
V = 31


def logits_in_float64(path: Path, ids: np.ndarray) -> np.ndarray:
    wide = widened(onnx.load(path))
    inputs = Inputs(signature_of(wide))
    results: Any = evaluator_of(wide).run([inputs.signature.logits], inputs(ids) | inputs.empty(len(ids)))
    return results[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "opset", "form"),
    [("relu", 18, "forward"), ("gelu", 20, "forward"), ("gelu", 23, "forward"), ("relu", 23, "past")],
)
def test_it_is_eager_in_float64(tmp_path: Path, activation: str, opset: int, form: str) -> None:
    config = GPTConfig(16, V, 2, 2, 32, activation=activation, layer_norm_epsilon=EXACT)
    checkpoint = seeded_checkpoint(config)
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint)
    exported = export_onnx(tmp_path / "ckpt.pt", tmp_path / "model.onnx", opset, form=form, proof=False)
    ids = np.random.default_rng(0).integers(0, V, (2, 13))
    with torch.inference_mode():
        expected = checkpoint.build().double()(torch.from_numpy(ids)).numpy()
    logits = logits_in_float64(exported.path, ids)
    assert logits.dtype == np.float64
    assert np.abs(logits - expected).max() < 1e-12 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_it_is_transformers_in_float64(tmp_path: Path, exporter: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_positions=16,
            vocab_size=V,
            n_layer=2,
            n_head=2,
            n_embd=32,
            activation_function="relu",
            layer_norm_epsilon=EXACT,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    names = ["input_ids", "attention_mask"]
    given = (torch.zeros(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64))

    class Called(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.model(ids, attention_mask=mask).logits

    path = tmp_path / "theirs.onnx"
    if exporter == "dynamo":
        auto = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
        how: dict[str, Any] = {"dynamo": True, "dynamic_shapes": (auto, auto), "opset_version": 23}
    else:
        axes = {name: {0: "batch", 1: "sequence"} for name in (*names, "logits")}
        how = {"dynamo": False, "dynamic_axes": axes, "opset_version": 17}
    torch.onnx.export(Called().eval(), given, path, input_names=names, output_names=["logits"], verbose=False, **how)
    ids = np.random.default_rng(0).integers(0, V, (3, 11))
    with torch.inference_mode():
        expected = model.double()(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(logits_in_float64(path, ids) - expected).max() < 1e-12 * np.abs(expected).max()


def one_node(operator: str, inputs: dict[str, np.ndarray], outputs: int = 1, **attributes: Any) -> onnx.ModelProto:
    """A file of one node, whose inputs are constants."""
    results = [f"y{index}" for index in range(outputs)]
    node = helper.make_node(operator, list(inputs), results, **attributes)
    constants = [numpy_helper.from_array(array, name) for name, array in inputs.items()]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in results]
    graph = helper.make_graph([node], "one", [], values, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


def run(proto: onnx.ModelProto) -> Any:
    results: Any = evaluator_of(widened(proto)).run(None, {})
    return results[0]


def test_the_plain_evaluator_would_round_the_error_function() -> None:
    proto = widened(one_node("Erf", {"x": np.array([0.3])}))
    plain: Any = ReferenceEvaluator(proto).run(None, {})
    assert abs(plain[0] - 0.3286267594591274) > 1e-9
    assert abs(run(proto) - 0.3286267594591274) < 1e-15


def test_large_whole_numbers_are_dequantised_exactly() -> None:
    x = {"x": np.array([2**24 + 1, -(2**30) - 1], np.int32), "scale": np.array(0.5, np.float32)}
    assert run(one_node("DequantizeLinear", x)).tolist() == [2**23 + 0.5, -(2**29) - 0.5]


@pytest.mark.parametrize(("axis", "block_size"), [(0, 0), (1, 0), (1, 4)])
def test_scales_are_spread_over_an_axis_or_blocks(axis: int, block_size: int) -> None:
    random = np.random.default_rng(0)
    shape = (6, 2) if block_size else ((6, 8)[axis],)
    inputs = {
        "x": random.integers(-128, 128, (6, 8)).astype(np.int8),
        "scale": random.random(shape).astype(np.float32),
        "zero": random.integers(-9, 9, shape).astype(np.int8),
    }
    proto = one_node("DequantizeLinear", inputs, axis=axis, block_size=block_size)
    right: Any = ReferenceEvaluator(proto).run(None, {})
    assert np.abs(run(proto) - right[0]).max() < 1e-6 * np.abs(right[0]).max()


def test_a_layer_norm_is_onnxs() -> None:
    random = np.random.default_rng(0)
    inputs = {name: random.random(size).astype(np.float32) for name, size in (("x", (3, 4, 8)), ("s", 8), ("b", 8))}
    proto = one_node("LayerNormalization", inputs, 3, epsilon=1e-3)
    right: Any = ReferenceEvaluator(proto).run(None, {})
    found: Any = evaluator_of(widened(proto)).run(None, {})
    for ours, theirs in zip(found, right, strict=True):
        assert ours.dtype == np.float64
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() < 1e-5


def test_all_that_is_written_in_float32_becomes_float64() -> None:
    """In branches, in functions of the file, in constants however they are spelt, in casts, and where nothing says."""
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["third"], value=numpy_helper.from_array(np.float32(1 / 3)))],
        "branch",
        [],
        [helper.make_tensor_value_info("third", TensorProto.FLOAT, [])],
    )
    nodes = [
        helper.make_node("If", ["yes"], ["a"], then_branch=branch, else_branch=branch),
        helper.make_node("Constant", [], ["b"], value_float=0.1),
        helper.make_node("ConstantOfShape", ["shape"], ["c"]),
        helper.make_node("Cast", ["one"], ["d"], to=TensorProto.FLOAT16),
        helper.make_node("Twice", ["b"], ["e"], domain="theirs"),
        helper.make_node("Sum", ["a", "b", "c", "d", "e"], ["y"]),
    ]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("theirs", 1)]
    body = [
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Mul", ["x", "two"], ["doubled"]),
    ]
    function = helper.make_function("theirs", "Twice", ["x"], ["doubled"], body, opsets[:1])
    constants = [
        numpy_helper.from_array(np.array(True), "yes"),
        numpy_helper.from_array(np.array([2]), "shape"),
        numpy_helper.from_array(np.array(1), "one"),
    ]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    graph = helper.make_graph(nodes, "all", [], [y], constants)
    proto = helper.make_model(graph, opset_imports=opsets, functions=[function])
    expected = float(np.float32(1 / 3)) + float(np.float32(0.1)) * 3 + 1
    found = run(proto)
    assert found.dtype == np.float64
    assert np.abs(found - expected).max() < 1e-15
