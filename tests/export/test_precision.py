"""Half precision: what is an island, and that the file says and keeps to it."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from export.onnx import export_command, export_onnx
from export.precision import add_islands
from export.session import Session

pytestmark = pytest.mark.slow


def graph_of(dtype, *operators):
    """x → each operator in turn → y, all [2, 2]; a MatMul multiplies by itself."""
    names = ["x", *(f"v{i}" for i in range(len(operators) - 1)), "y"]
    nodes = [
        helper.make_node(operator, [names[i]] * (2 if operator == "MatMul" else 1), [names[i + 1]], f"n{i}")
        for i, operator in enumerate(operators)
    ]
    x, y = (helper.make_tensor_value_info(name, dtype, [2, 2]) for name in "xy")
    return helper.make_model(
        helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 23)], ir_version=10
    )


def operators(proto):
    return [node.op_type for node in proto.graph.node]


def test_what_has_no_bfloat16_kernel_stands_between_casts():
    proto = graph_of(TensorProto.BFLOAT16, "Transpose", "MatMul", "Transpose")
    found = add_islands(proto, "bfloat16")
    assert (found.islands, found.silent) == (("MatMul",), ())
    assert operators(proto) == ["Transpose", "Cast", "MatMul", "Cast", "Transpose"]
    onnx.checker.check_model(proto, full_check=True)
    onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def test_from_island_to_island_nothing_is_rounded():
    proto = graph_of(TensorProto.BFLOAT16, "MatMul", "Relu", "MatMul")
    assert add_islands(proto, "bfloat16").islands == ("MatMul", "Relu")
    assert operators(proto) == ["Cast", "MatMul", "Relu", "MatMul", "Cast"]
    assert [value.type.tensor_type.elem_type for value in proto.graph.output] == [TensorProto.BFLOAT16]


def test_what_onnx_runtime_casts_by_itself_is_said_and_left():
    proto = graph_of(TensorProto.FLOAT16, "Transpose", "MatMul")
    before = proto.SerializeToString()
    assert add_islands(proto, "float16") == type(add_islands(proto, "float16"))((), ("MatMul",))
    assert proto.SerializeToString() == before


def test_float32_needs_nothing():
    proto = graph_of(TensorProto.FLOAT, "MatMul")
    assert add_islands(proto, "float32").islands == ()


@pytest.fixture(scope="module")
def bf16(checkpoint_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("bf16") / "model-cache-bf16.onnx"
    return export_onnx(checkpoint_path, path, form="cached", precision="bf16")


def test_weights_and_caches_are_bfloat16_ids_and_logits_are_not(bf16):
    inputs, outputs = (bf16.entry_points["cached"][part] for part in ("inputs", "outputs"))
    assert (inputs["ids"][0], inputs["pos"][0], outputs["logits"][0]) == ("int64", "int64", "float32")
    assert (inputs["cache.0.key"][0], outputs["cache_out.1.value"][0]) == ("bfloat16", "bfloat16")
    assert (bf16.dtype, bf16.precision) == ("bfloat16", "bf16")
    assert bf16.fp32_islands == ("Add", "Attention", "Gelu", "MatMul")
    weights = onnx.load(bf16.path).graph.initializer
    assert {each.data_type for each in weights} == {TensorProto.BFLOAT16, TensorProto.INT64}


def test_bfloat16_weights_take_half_the_bytes(bf16, cached):
    assert bf16.size_bytes < 0.65 * cached.size_bytes  # of so small a model, the graph is a part


def test_bfloat16_rounds_and_not_more(bf16, cached):
    ids = np.random.default_rng(0).integers(0, 211, (2, 32))
    logits = []
    for exported in (bf16, cached):
        session = Session(exported)
        session.start(2)
        logits.append(session.step(ids))
    error = np.abs(logits[0] - logits[1]).max() / np.abs(logits[1]).max()
    assert 2**-12 < error < 2**-4


def test_the_command_says_which_operators_and_why(checkpoint_path, tmp_path, capsys):
    export_command(checkpoint_path, tmp_path / "model.onnx", precision="fp16")
    said = "ONNX Runtime's CPU provider casts to float32 for lack of a float16 kernel: Add, Gelu, MatMul\n"
    assert said in capsys.readouterr().out
