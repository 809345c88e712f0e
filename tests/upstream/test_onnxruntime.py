"""Faults of ONNX Runtime that this project works around; see test_tvm.py for how to read them."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper


def relu() -> bytes:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "graph", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model.SerializeToString()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so nothing to fall back from")
@pytest.mark.xfail(
    strict=True, raises=pytest.fail.Exception, reason="bench.backends.onnxruntime compares the providers"
)
def test_a_provider_that_cannot_run_is_an_error():
    with pytest.raises(Exception, match="CUDA"):
        onnxruntime.InferenceSession(relu(), providers=["CUDAExecutionProvider"]).run(
            None, {"x": np.zeros(2, "float32")}
        )
