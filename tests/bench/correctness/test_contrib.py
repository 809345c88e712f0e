"""Operators of ONNX Runtime's own in the float64 reference, each against ONNX Runtime itself in float32."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from bench.correctness.contrib import CONTRIB
from bench.correctness.evaluator import evaluator_of, widened
from gpt.cli import UserError

B, T, NH, HS = 2, 5, 4, 16
C = NH * HS
RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def angles(rows: int, half: int) -> tuple[np.ndarray, np.ndarray]:
    at = np.arange(rows)[:, None] * np.linspace(1, 0.1, half)
    return np.cos(at).astype(np.float32), np.sin(at).astype(np.float32)


def whole(dtype: type, low: int, high: int, *shape: int) -> np.ndarray:
    return RNG.integers(low, high, shape).astype(dtype)


def model_of(
    operator: str, inputs: list[np.ndarray | None], outputs: int, attributes: dict[str, Any], domain: str
) -> onnx.ModelProto:
    """A file of one node, whose inputs are all given by the caller."""
    names = ["" if array is None else f"x{index}" for index, array in enumerate(inputs)]
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in zip(names, inputs, strict=True)
        if array is not None
    ]
    results = [f"y{index}" for index in range(outputs)]
    node = helper.make_node(operator, names, results, domain=domain, **attributes)
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in results]
    graph = helper.make_graph([node], "one", values, given)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32)
QUERY, KEY, VALUE = floats(B, T, C), floats(B, T, C), floats(B, T, C)
COS, SIN = angles(32, HS // 2)
TWO = 2 * HS  # two heads of keys and values
PAST = floats(B, 2, 3, HS), floats(B, 2, 3, HS)
LENGTHS = np.full(B, T - 1, np.int32), np.array(T, np.int32)
# The lengths, less 1, of sequences with a past of 3 tokens, and of the longest.
AFTER = np.full(B, 3, np.int32), np.array(4, np.int32)
GQA = {"num_heads": NH, "kv_num_heads": 2}

# Weights of 8 bits are below 64, as older CPUs add pairs of products in 16 bits, which do not hold larger ones.
CASES: dict[str, tuple[str, list[np.ndarray | None], int, dict[str, Any]]] = {
    "BiasGelu": ("BiasGelu", [floats(B, T, C), floats(C)], 1, {}),
    "FastGelu": ("FastGelu", [floats(B, T, C), floats(C)], 1, {}),
    "FastGelu, no bias": ("FastGelu", [floats(B, T, C)], 1, {}),
    "Gelu": ("Gelu", [floats(B, T, C)], 1, {}),
    "QuickGelu": ("QuickGelu", [8 * floats(B, T, C)], 1, {"alpha": 1.702}),
    "SimplifiedLayerNormalization": (
        "SimplifiedLayerNormalization",
        [floats(B, T, C), floats(C)],
        1,
        {"axis": -1, "epsilon": 1e-3},
    ),
    "SkipLayerNormalization": (
        "SkipLayerNormalization",
        [floats(B, T, C), floats(B, T, C), floats(C), floats(C), floats(C)],
        4,
        {"epsilon": 1e-3},
    ),
    "SkipSimplifiedLayerNormalization": (
        "SkipSimplifiedLayerNormalization",
        [floats(B, T, C), floats(B, T, C), floats(C), floats(C)],
        4,
        {"epsilon": 1e-3},
    ),
    "FusedMatMul": ("FusedMatMul", [floats(B, C, T), floats(B, 7, C)], 1, {"alpha": 0.3, "transA": 1, "transB": 1}),
    "MatMulNBits": (
        "MatMulNBits",
        [floats(B, T, 40), whole(np.uint8, 0, 256, 6, 2, 16), floats(6 * 2)],
        1,
        {"K": 40, "N": 6, "bits": 4, "block_size": 32},
    ),
    "MatMulNBits, zero points": (
        "MatMulNBits",
        [floats(B, T, 96), whole(np.uint8, 0, 256, 6, 3, 16), floats(6 * 3), whole(np.uint8, 0, 256, 6 * 2)],
        1,
        {"K": 96, "N": 6, "bits": 4, "block_size": 32},
    ),
    "MatMulNBits, 8 bits": (
        "MatMulNBits",
        [floats(B, T, 64), whole(np.uint8, 0, 256, 6, 2, 32), floats(6 * 2)],
        1,
        {"K": 64, "N": 6, "bits": 8, "block_size": 32},
    ),
    "DynamicQuantizeMatMul": (
        "DynamicQuantizeMatMul",
        [floats(T, C), whole(np.int8, -63, 64, C, 6), floats(6) ** 2, np.zeros(6, np.int8), floats(6)],
        1,
        {},
    ),
    "MatMulIntegerToFloat": (
        "MatMulIntegerToFloat",
        [
            whole(np.uint8, 0, 256, T, C),
            whole(np.int8, -63, 64, C, 6),
            np.array(0.02, np.float32),
            floats(6) ** 2,
            np.array(117, np.uint8),
            whole(np.int8, -9, 9, 6),
            floats(6),
        ],
        1,
        {},
    ),
    "RotaryEmbedding": ("RotaryEmbedding", [floats(B, T, C), np.array([3]), *angles(16, HS // 2)], 1, {}),
    "RotaryEmbedding, of heads": (
        "RotaryEmbedding",
        [floats(B, NH, T, HS), whole(np.int64, 0, 16, B, T), *angles(16, HS // 2)],
        1,
        {"interleaved": 1},
    ),
    "RotaryEmbedding, of a part": (
        "RotaryEmbedding",
        [floats(B, NH, T, HS), whole(np.int64, 0, 16, B, T), *angles(16, HS // 4)],
        1,
        {"num_heads": NH, "rotary_embedding_dim": HS // 2},
    ),
    "Attention": ("Attention", [QUERY, floats(C, 3 * C) / 8, floats(3 * C)], 1, {"num_heads": NH, "unidirectional": 1}),
    "Attention, not causal, scaled": (
        "Attention",
        [QUERY, floats(C, 3 * C) / 8, floats(3 * C)],
        1,
        {"num_heads": NH, "scale": 0.2},
    ),
    "Attention, with a bias": (
        "Attention",
        [QUERY, floats(C, 3 * C) / 8, floats(3 * C), None, None, floats(1, NH, T, T)],
        1,
        {"num_heads": NH, "unidirectional": 1},
    ),
    "Attention, padded": (
        "Attention",
        [QUERY, floats(C, 3 * C) / 8, floats(3 * C), MASK],
        1,
        {"num_heads": NH, "unidirectional": 1},
    ),
    "Attention, lengths": (
        "Attention",
        [QUERY, floats(C, 3 * C) / 8, floats(3 * C), np.array([5, 3], np.int32)],
        1,
        {"num_heads": NH},
    ),
    "Attention, after a past": (
        "Attention",
        [QUERY, floats(C, 3 * C) / 8, floats(3 * C), None, floats(2, B, NH, 3, HS)],
        2,
        {"num_heads": NH, "unidirectional": 1},
    ),
    "MultiHeadAttention": (
        "MultiHeadAttention",
        [QUERY, KEY, VALUE, floats(3 * C), MASK, floats(1, NH, T, T)],
        1,
        {"num_heads": NH},
    ),
    "MultiHeadAttention, after a past": (
        "MultiHeadAttention",
        [QUERY, KEY, VALUE, None, None, None, floats(B, NH, 3, HS), floats(B, NH, 3, HS)],
        3,
        {"num_heads": NH, "unidirectional": 1},
    ),
    "GroupQueryAttention": (
        "GroupQueryAttention",
        [QUERY, floats(B, T, TWO), floats(B, T, TWO), None, None, *LENGTHS],
        3,
        GQA,
    ),
    "GroupQueryAttention, rotary and packed": (
        "GroupQueryAttention",
        [floats(B, T, C + 2 * TWO), None, None, None, None, *LENGTHS, COS, SIN],
        3,
        {**GQA, "do_rotary": 1, "local_window_size": 3},
    ),
    "GroupQueryAttention, after a past": (
        "GroupQueryAttention",
        [floats(B, 1, C), floats(B, 1, TWO), floats(B, 1, TWO), *PAST, *AFTER, COS, SIN],
        3,
        {**GQA, "do_rotary": 1, "rotary_interleaved": 1, "softcap": 2.0, "scale": 0.3},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_onnx_runtime_computes(case: str) -> None:
    operator, inputs, outputs, attributes = CASES[case]
    domain = "" if operator == "SimplifiedLayerNormalization" else "com.microsoft"
    proto = model_of(operator, inputs, outputs, attributes, domain)
    given = {f"x{index}": array for index, array in enumerate(inputs) if array is not None}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    right = session.run(None, given)
    in_float32: Any = evaluator_of(proto).run(None, given)
    wide = {name: array.astype(np.float64) if array.dtype == np.float32 else array for name, array in given.items()}
    found: Any = evaluator_of(widened(proto)).run(None, wide)
    unused = {"SkipLayerNormalization": (1, 2), "SkipSimplifiedLayerNormalization": (1, 2)}.get(operator, ())
    for index in set(range(outputs)) - set(unused):  # those that only training needs are not computed
        assert found[index].dtype == np.float64
        assert in_float32[index].dtype == np.float32
        assert found[index].shape == right[index].shape
        scale = np.abs(right[index]).max()
        assert np.abs(found[index] - right[index]).max() < 3e-6 * scale
        assert np.abs(found[index] - in_float32[index]).max() < 3e-6 * scale


def test_each_operator_has_a_case() -> None:
    assert {op.__name__ for op in CONTRIB} == {case[0] for case in CASES.values()}


def test_what_is_not_known_is_named() -> None:
    proto = model_of("EmbedLayerNormalization", [floats(B, T)], 1, {}, "com.microsoft")
    with pytest.raises(UserError, match="no float64 reference: operator EmbedLayerNormalization of domain com"):
        evaluator_of(proto)
