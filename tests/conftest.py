"""What all tests share: a file as others write it, and which tests are skipped or left out.

Those marked `relay` are skipped where that is absent, and `long` ones run if asked for.
"""

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tvm_frontend.relay.environment import why_absent

V, C, LONGEST = 37, 8, 16  # of the file that `foreign_file` writes
INPUTS = ("input_ids", "attention_mask", "position_ids")


@pytest.fixture(scope="session")
def foreign_file() -> Callable[..., Path]:
    """A small decoder as other tools write one: ids, a mask, positions and a past go in, by transformers' names."""
    return write_decoder


def write_decoder(
    path: Path, inputs: tuple[str, ...] = INPUTS, *, past: bool = True, ids: int = TensorProto.INT64
) -> Path:
    """Write one layer of attention without projections: each token sees all that the mask shows, later ones too."""
    random = np.random.default_rng(0)
    weights = {
        "wte": random.standard_normal((V, C)),
        "wpe": random.standard_normal((LONGEST, C)),
        "head": random.standard_normal((C, V)),
        "hidden": np.array(-1e9),
    }
    numbers = {"one": 1, "axis 1": [1], "axes 1 2": [1, 2], "axis 2": [2], "zero": 0}
    P = ["P"] if past else ["zero length"]
    nodes = [
        helper.make_node("Gather", ["wte", "input_ids"], ["tokens"]),
        helper.make_node("Shape", ["input_ids"], ["T"], start=1, end=2),
    ]
    if past:
        nodes.append(helper.make_node("Shape", ["past_key_values.0.key"], ["P"], start=2, end=3))
    else:
        numbers["zero length"] = [0]
    nodes += [helper.make_node("Add", ["T", *P], ["total"]), helper.make_node("Squeeze", ["total"], ["end"])]
    if "position_ids" in inputs:
        positions = "position_ids"
    else:
        positions = "counted"
        nodes += [
            helper.make_node("Squeeze", P, ["start"]),
            helper.make_node("Range", ["start", "end", "one"], ["counted"]),
        ]
    nodes += [
        helper.make_node("Gather", ["wpe", positions], ["places"]),
        helper.make_node("Add", ["tokens", "places"], ["x"]),  # [B, T, C]
        helper.make_node("Unsqueeze", ["x", "axis 1"], ["new"]),  # [B, 1, T, C]
    ]
    if past:
        nodes.append(helper.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2))
    keys = "present.0.key" if past else "new"
    nodes += [
        helper.make_node("Transpose", [keys], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["new", "turned"], ["scores"]),  # [B, 1, T, P+T]
    ]
    scores = "scores"
    if "attention_mask" in inputs:
        nodes += [
            helper.make_node("Unsqueeze", ["attention_mask", "axes 1 2"], ["mask"]),
            helper.make_node("Cast", ["mask"], ["seen"], to=TensorProto.BOOL),
            helper.make_node("Where", ["seen", "scores", "hidden"], ["masked"]),
        ]
        scores = "masked"
    nodes += [
        helper.make_node("Softmax", [scores], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", keys], ["attended"]),
        helper.make_node("Squeeze", ["attended", "axis 1"], ["y"]),
        helper.make_node("MatMul", ["y", "head"], ["logits"]),
    ]
    shapes = {"input_ids": ["b", "t"], "attention_mask": ["b", "all"], "position_ids": ["b", "t"]}
    given = [
        helper.make_tensor_value_info(name, ids if name == "input_ids" else TensorProto.INT64, shapes[name])
        for name in inputs
    ]
    results = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "t", V])]
    if past:
        given.append(helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, ["b", 1, "past", C]))
        results.append(helper.make_tensor_value_info("present.0.key", TensorProto.FLOAT, ["b", 1, "past + t", C]))
    constants = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    constants += [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in numbers.items()]
    graph = helper.make_graph(nodes, "decoder", given, results, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def pytest_configure() -> None:
    """Let Ctrl-C reach the tests of it also in a run in the background, which inherits that it is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs Relay where it is absent, and leave out what is long; `-m` with the marker's name selects it."""
    if "long" not in config.option.markexpr:
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    reason = why_absent()
    for item in items:
        if reason is not None and item.get_closest_marker("relay"):
            item.add_marker(pytest.mark.skip(reason=reason))
