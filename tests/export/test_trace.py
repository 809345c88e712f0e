"""What both of torch's exporters write, and that it is compared with what was asked for."""

import onnx
import pytest
from onnx import numpy_helper

import export.trace
from export.forms import FORMS, entry_point_of
from export.onnx import export_onnx
from gpt.checkpoint import save_checkpoint, seeded_checkpoint
from gpt.config import GPTConfig

TINY = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8)


def floats_in(path) -> int:
    weights = onnx.load(path).graph.initializer
    return sum(numpy_helper.to_array(weight).size for weight in weights if weight.data_type == onnx.TensorProto.FLOAT)


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_a_small_tied_head_is_stored_once_too(tmp_path, exporter):
    checkpoint = seeded_checkpoint(TINY)
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint)
    found = export_onnx(tmp_path / "ckpt.pt", tmp_path / "model.onnx", exporter=exporter)
    # besides the weights one or two numbers of formulas, such as √hs
    assert 0 <= floats_in(found.path) - checkpoint.build().parameter_count() <= 2
    assert f"torch.onnx {exporter}" in found.exporter


def test_the_former_exporter_writes_the_same_inputs_and_outputs(checkpoint_path, exported, tmp_path):
    found = export_onnx(checkpoint_path, tmp_path / "model.onnx", exporter="torchscript", last=True)
    assert (found.opset, found.last, exported.last) == (20, True, False)
    assert found.entry_points["forward"]["inputs"] == exported.entry_points["forward"]["inputs"]
    (logits,) = onnx.load(found.path).graph.output
    assert [dim.dim_param or dim.dim_value for dim in logits.type.tensor_type.shape.dim] == ["B", 1, 211]


def rename_an_output(proto):
    proto.graph.output[0].name = "scores"


def forget_an_input(proto):
    del proto.graph.input[-1]


def fix_the_batch(proto):
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def take_a_foreign_operator(proto):
    proto.graph.node[-1].domain = "com.microsoft"


WRONG = {
    "an output": (rename_an_output, "wrote the outputs .*scores"),
    "an input": (forget_an_input, "wrote the inputs"),
    "a fixed size": (fix_the_batch, r"wrote the inputs .*\[2, 'T'\]"),
    "an operator": (take_a_foreign_operator, r"more than ONNX's own operators: com\.microsoft"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_graph_that_was_not_asked_for_is_a_fault(cached, wrong):
    proto, (spoil, said) = onnx.load(cached.path), WRONG[wrong]
    wanted = entry_point_of(FORMS["cached"], cached.config, "float32", last=False)
    export.trace._check_written(proto, wanted, 24)
    spoil(proto)
    with pytest.raises(RuntimeError, match=said):
        export.trace._check_written(proto, wanted, 24)


def test_another_opset_than_was_asked_for_is_a_fault(cached):
    wanted = entry_point_of(FORMS["cached"], cached.config, "float32", last=False)
    with pytest.raises(RuntimeError, match="wrote opset 24 where 25 was asked for"):
        export.trace._check_written(onnx.load(cached.path), wanted, 25)
