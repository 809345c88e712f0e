"""Operators on integers with random legal attributes, against ONNX Runtime on the same node."""

import re
from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
import pytest

from tests.tvm_frontend.frontends.onnx.judge import Case, compare, compiled, file_of, refusal
from tvm_frontend.frontends.onnx.operators import quantized

Random = np.random.Generator
CASES = 4  # of each operator, compiled together
NARROW = {"int4": ml_dtypes.int4, "uint4": ml_dtypes.uint4}


def floats(random: Random, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def chance(random: Random, of: int = 2) -> bool:
    return bool(random.integers(of) == 0)


def sizes(random: Random, count: int) -> list[int]:
    return [int(size) for size in random.integers(1, 6, count)]


def integers(random: Random, dtype: str, *shape: int) -> np.ndarray:
    lowest, highest = quantized.RANGES[dtype]
    return random.integers(lowest, highest + 1, shape).astype(NARROW.get(dtype, dtype))


def weights(random: Random, dtype: str, *shape: int) -> np.ndarray:
    """Integers of a right factor: int8 of 7 bits, as ONNX Runtime saturates sums of two products without AVX-512."""
    return integers(random, dtype, *shape) // (2 if dtype == "int8" else 1)


def scales(random: Random, *shape: int) -> np.ndarray:
    """Powers of two in half of the cases, which make ties that round to even."""
    exponents = random.integers(-3, 2, shape)
    noise = 1 if chance(random) else random.uniform(1, 2, shape)
    return np.asarray(2.0**exponents * noise, np.float32)


def places(random: Random, shape: list[int]) -> tuple[list[int], dict[str, int]]:
    """The shape of a scale: for all, for each place of an axis, or for blocks along it."""
    form = random.integers(3)
    if form == 0:
        return [[], [1]][random.integers(2)], {}
    axis = int(random.integers(len(shape)))
    given = axis - len(shape) if chance(random) else axis
    if form == 1 or len(shape) == 1:
        return [shape[axis]], {"axis": given}
    block = int(random.integers(1, shape[axis] + 1))
    return [-(-size // block) if each == axis else size for each, size in enumerate(shape)], {
        "axis": given,
        "block_size": block,
    }


def quantize_linear(domain: str) -> Callable[[Random], Case]:
    def case(random: Random) -> Case:
        shape = sizes(random, 2 if domain else int(random.integers(1, 4)))
        form, attributes = places(random, shape)
        if domain:
            form, attributes = [], {}
        dtype = str(random.choice(["int8", "uint8", "int16", "uint16", *([] if domain else ["int4", "uint4"])]))
        x = np.round(floats(random, *shape) * random.choice([4, 40]) * 4) / 4
        parts = {"x": x.astype(np.float32)}, {"s": scales(random, *form)}
        zero = {"z": integers(random, dtype, *form)}
        if not domain and chance(random, 3) and dtype not in NARROW:
            zero, attributes = {}, attributes | {"output_dtype": int(onnx_type(dtype))}
        if dtype in NARROW:  # ONNX Runtime gives back 4-bit integers that numpy has no type for
            dtype = "uint8"
            zero = {"z": integers(random, dtype, *form)}
        inputs, constants = parts if chance(random) else (parts[0] | parts[1], {})
        constants = constants | zero
        if chance(random, 4) and not domain:  # a weight that the file holds as floats
            inputs, constants = {}, inputs | constants
        return Case(f"{domain}QuantizeLinear", ["x", "s", *zero], inputs, constants, attributes)

    return case


def onnx_type(dtype: str) -> int:
    return {name: number for number, name in quantized.INTEGERS.items()}[dtype]


def dequantize_linear(domain: str) -> Callable[[Random], Case]:
    def case(random: Random) -> Case:
        shape = sizes(random, 2 if domain else int(random.integers(1, 4)))
        form, attributes = ([], {}) if domain else places(random, shape)
        dtype = str(random.choice(["int8", "uint8", "int16", "uint16", *([] if domain else ["int4", "uint4"])]))
        x = {"x": integers(random, dtype, *shape)}
        zero = {"z": integers(random, dtype, *form)} if chance(random) else {}
        if chance(random, 5) and not domain:
            x, zero = {"x": random.integers(-1000, 1000, shape).astype(np.int32)}, {}
        constants = {"s": scales(random, *form)} | zero
        inputs = {}
        if dtype in NARROW or chance(random):
            constants |= x
        else:
            inputs = x
        return Case(f"{domain}DequantizeLinear", ["x", "s", *zero], inputs, constants, attributes)

    return case


def dynamic_quantize_linear(random: Random) -> Case:
    x = floats(random, *sizes(random, int(random.integers(1, 4)))) * random.choice([1, 100])
    x = [x, np.abs(x), -np.abs(x), 0 * x][random.integers(4)]
    return Case("DynamicQuantizeLinear", ["x"], {"x": x.astype(np.float32)}, outputs=(1, 1, 1))


def factors(random: Random, *, wide: bool) -> tuple[dict, dict, dict, dict, int]:
    """a, b and their zero points, if there are any; and whether each of b's columns has its own."""
    M, N = sizes(random, 2)
    K = int(random.integers(1, 40))
    batch = sizes(random, int(random.integers(0, 2 + wide)))
    a_type, b_type = str(random.choice(["uint8", "int8"] if wide else ["uint8"])), str(random.choice(["int8", "uint8"]))
    columns = [N] if chance(random) else []
    a, b = integers(random, a_type, *batch, M, K), weights(random, b_type, K, N)
    zeros = integers(random, a_type), weights(random, b_type, *columns)
    return {"a": a}, {"b": b}, {"az": zeros[0]}, {"bz": zeros[1]}, len(columns) and N


def matmul_integer(random: Random) -> Case:
    a, b, az, bz, _ = factors(random, wide=False)
    az, bz = (az if chance(random) else {}), (bz if chance(random) else {})
    order = ["a", "b", *(["az" if az else "", "bz" if bz else ""])]
    while not order[-1]:
        order.pop()
    is_weight = not chance(random, 3)
    inputs, constants = (a | az, b | bz) if is_weight else (a | b | bz, az)
    return Case("MatMulInteger", order, inputs, constants)


def matmul_integer_to_float(random: Random) -> Case:
    a, b, az, bz, columns = factors(random, wide=False)
    form = [columns] if columns else []
    constants = b | bz | az | {"as": scales(random), "bs": scales(random, *form)}
    names = ["a", "b", "as", "bs", "az", "bz"]
    if chance(random):
        constants["bias"] = floats(random, b["b"].shape[1])
        names.append("bias")
    return Case("com.microsoft.MatMulIntegerToFloat", names, a, constants)


def dynamic_quantize_matmul(random: Random) -> Case:
    a, b, _, bz, columns = factors(random, wide=False)
    constants = b | bz | {"bs": scales(random, *([columns] if columns else []))}
    names = ["x", "b", "bs", "bz"]
    if chance(random):
        constants["bias"] = floats(random, b["b"].shape[1])
        names.append("bias")
    return Case("com.microsoft.DynamicQuantizeMatMul", names, {"x": floats(random, *a["a"].shape)}, constants)


def q_linear_matmul(random: Random) -> Case:
    a, b, az, bz, columns = factors(random, wide=False)
    y_type = str(a["a"].dtype)
    form = [columns] if columns else []
    constants = b | bz | az | {"as": scales(random), "bs": scales(random, *form)}
    constants |= {"ys": scales(random) * np.float32(64), "yz": integers(random, y_type)}
    return Case("QLinearMatMul", ["a", "as", "az", "b", "bs", "bz", "ys", "yz"], a, constants)


def q_gemm(random: Random) -> Case:
    M, N, K = sizes(random, 3)
    turned = chance(random)
    form = [N] if chance(random) else []
    constants = {"b": weights(random, "int8", *([N, K] if turned else [K, N])), "az": integers(random, "uint8")}
    constants |= {"bz": weights(random, "int8", *form), "as": scales(random), "bs": scales(random, *form)}
    names = ["a", "as", "az", "b", "bs", "bz", ""]
    if chance(random):
        constants["c"] = random.integers(-999, 999, N).astype(np.int32)
        names[-1] = "c"
    if chance(random):
        constants |= {"ys": scales(random) * np.float32(64), "yz": integers(random, "uint8")}
        names += ["ys", "yz"]
    attributes = {"transB": int(turned)} | ({"alpha": 0.5} if chance(random, 3) else {})
    return Case("com.microsoft.QGemm", names, {"a": integers(random, "uint8", M, K)}, constants, attributes)


def q_attention(random: Random) -> Case:
    B, T, nh, hs = sizes(random, 4)
    K, C = int(random.integers(1, 9)), nh * hs
    form = [3 * C] if chance(random) else []
    constants = {"b": weights(random, "int8", K, 3 * C), "bias": floats(random, 3 * C), "as": scales(random) / 99}
    constants |= {"bs": scales(random, *form) / 99, "az": integers(random, "uint8"), "bz": np.zeros(form, np.int8)}
    constants = {name: np.asarray(array) for name, array in constants.items()}
    constants["as"], constants["bs"] = (constants[name].astype(np.float32) for name in ("as", "bs"))
    names = ["a", "b", "bias", "as", "bs", "", "az", "bz"]
    inputs = {"a": integers(random, "uint8", B, T, K)}
    P = int(random.integers(1, 4)) if chance(random) else 0
    if chance(random):
        inputs["mask"] = random.integers(0, 2, (B, T + P)).astype(np.int32)
        names[5] = "mask"
    if P:
        inputs["past"] = floats(random, 2, B, nh, P, hs)
        names.append("past")
    attributes = {"num_heads": nh, "unidirectional": int(chance(random))}
    return Case("com.microsoft.QAttention", names, inputs, constants, attributes, (1, 1) if P else (1,))


def matmul_n_bits(random: Random) -> Case:
    M, N = sizes(random, 2)
    bits, block = int(random.choice([4, 8])), int(random.choice([16, 32, 64]))
    K = int(random.integers(1, 100))
    blocks = -(-K // block)
    constants = {"b": integers(random, "uint8", N, blocks, block * bits // 8)}
    constants["s"] = scales(random, *([N * blocks] if chance(random) else [N, blocks])) / np.float32(64)
    names = ["x", "b", "s"]
    if chance(random):
        constants["z"] = integers(random, "uint8", N, -(-blocks * bits // 8))
        names.append("z")
    elif bits == 4 and chance(random):
        constants["z"] = random.uniform(0, 15, (N, blocks)).astype(np.float32)
        names.append("z")
    if chance(random):
        constants["bias"] = floats(random, N)
        names += [""] * (5 - len(names)) + ["bias"]
    attributes = {"K": K, "N": N, "bits": bits, "block_size": block}
    return Case(
        "com.microsoft.MatMulNBits", names, {"x": floats(random, *sizes(random, 1), M, K)}, constants, attributes
    )


def gather_block_quantized(random: Random) -> Case:
    N, K, block = int(random.integers(2, 6)), 2 * int(random.integers(1, 40)), int(random.choice([16, 32]))
    form = [N, -(-K // block)]
    dtype = str(random.choice(["uint8", "int4", "uint4"]))
    constants = {"t": integers(random, dtype, N, K // 2 if dtype == "uint8" else K), "s": scales(random, *form)}
    if chance(random):
        zeros = [N, -(-form[1] // 2)] if dtype == "uint8" else form
        constants["z"] = integers(random, dtype, *zeros)
    rows = {"r": random.integers(0, N, sizes(random, 2))}
    attributes = {"block_size": block, "bits": 4, "gather_axis": 0, "quantize_axis": int(random.choice([-1, 1]))}
    names = ["t", "r", "s", *(["z"] if "z" in constants else [])]
    return Case("com.microsoft.GatherBlockQuantized", names, rows, constants, attributes)


def q_linear(op: str) -> Callable[[Random], Case]:
    def case(random: Random) -> Case:
        shape = sizes(random, 3)
        dtype = str(random.choice(["uint8", "int8"]))
        inputs = {"a": integers(random, dtype, *shape), "b": integers(random, dtype, *shape[random.integers(3) :])}
        constants = {name: np.float32(random.uniform(0.1, 1)) for name in ("as", "bs", "ys")}
        constants |= {name: integers(random, dtype) for name in ("az", "bz", "yz")}
        return Case(f"com.microsoft.{op}", ["a", "as", "az", "b", "bs", "bz", "ys", "yz"], inputs, constants)

    return case


def q_linear_softmax(random: Random) -> Case:
    dtype = str(random.choice(["uint8", "int8"]))
    constants = {"s": np.float32(0.05), "z": integers(random, dtype), "ys": np.float32(1 / 256)}
    constants["yz"] = np.array(quantized.RANGES[dtype][0], dtype)
    shape = [size + 1 for size in sizes(random, 3)]  # of a single number, ONNX Runtime's softmax is 0: 256 in 8 bits
    inputs = {"x": integers(random, dtype, *shape)}
    attributes = {"opset": 13, "axis": int(random.integers(-3, 3))}
    return Case("com.microsoft.QLinearSoftmax", ["x", "s", "z", "ys", "yz"], inputs, constants, attributes)


CASES_OF: dict[str, Callable[[Random], Case]] = {
    "DequantizeLinear": dequantize_linear(""),
    "DynamicQuantizeLinear": dynamic_quantize_linear,
    "MatMulInteger": matmul_integer,
    "QLinearMatMul": q_linear_matmul,
    "QuantizeLinear": quantize_linear(""),
    "com.microsoft.DequantizeLinear": dequantize_linear("com.microsoft."),
    "com.microsoft.DynamicQuantizeMatMul": dynamic_quantize_matmul,
    "com.microsoft.GatherBlockQuantized": gather_block_quantized,
    "com.microsoft.MatMulIntegerToFloat": matmul_integer_to_float,
    "com.microsoft.MatMulNBits": matmul_n_bits,
    "com.microsoft.QAttention": q_attention,
    "com.microsoft.QGemm": q_gemm,
    "com.microsoft.QLinearAdd": q_linear("QLinearAdd"),
    "com.microsoft.QLinearMul": q_linear("QLinearMul"),
    "com.microsoft.QLinearSoftmax": q_linear_softmax,
    "com.microsoft.QuantizeLinear": quantize_linear("com.microsoft."),
}


def test_every_operator_is_tried() -> None:
    assert CASES_OF.keys() == quantized.CONVERTERS.keys()


@pytest.mark.parametrize("op", CASES_OF)
def test_an_operator_gives_onnxruntimes_values(op: str) -> None:
    random = np.random.default_rng([list(CASES_OF).index(op), 23])
    # ONNX Runtime's QLinearSoftmax counts in integers, and is one unit off now and then.
    compare([CASES_OF[op](random) for _ in range(CASES)], atol=1 if op.endswith("QLinearSoftmax") else 2e-6)


def product_file(M: int, K: int, N: int) -> tuple[onnx.ModelProto, dict[str, np.ndarray], np.ndarray]:
    """MatMulInteger of the largest integers of 8 bits, zero points at the other end, and its exact result."""
    random = np.random.default_rng(3)
    a = random.choice(np.array([0, 1, 254, 255], np.uint8), (1, M, K))
    b = random.choice(np.array([-128, -127, 127], np.int8), (K, N))
    b[:, 0], a[:, 0] = 127, 255  # one sum is the largest that there is
    constants = {"az": np.array(0, np.uint8), "b": b, "bz": np.array(-128, np.int8)}
    case = Case("MatMulInteger", ["a", "b", "az", "bz"], {"a": a}, constants)
    proto, feeds = file_of([case])
    return proto, feeds, a.astype(np.int64) @ (b.astype(np.int64) + 128)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_product_of_integers_is_exact_in_hand_kernels(precision: str) -> None:
    proto, feeds, expected = product_file(3, 3000, 32)
    assert np.abs(expected).max() > 10 * quantized.EXACT  # so that one sum in float32 would round
    run = compiled(proto, 3, precision)
    np.testing.assert_array_equal(run(feeds)[0], expected)
    assert any(name.startswith("linear") for name in run.kernels)


def test_parts_of_a_product_are_as_long_as_their_sums_are_exact() -> None:
    whole = np.random.default_rng(0).integers(-255, 256, (5000, 3))
    parts = quantized.exact_parts(whole)
    assert [start for start, _ in parts[1:]] == [stop for _, stop in parts[:-1]]
    assert (parts[0][0], parts[-1][1]) == (0, 5000)
    for start, stop in parts:
        assert (np.abs(whole[start:stop]).sum(0) * quantized.LARGEST).max() <= quantized.EXACT
        longer = np.abs(whole[start : stop + 1]).sum(0) * quantized.LARGEST
        assert stop == 5000 or longer.max() > quantized.EXACT
    assert len(quantized.exact_parts(np.full((3072, 8), 20))) == 1  # as in GPT-2's weights


def of_few_bits(inputs: dict[str, np.ndarray], order: list[str], **attributes) -> Case:
    constants = {"b": np.zeros((3, 1, 8), np.uint8), "s": np.ones((3, 1), np.float32), "g": np.zeros(16, np.int32)}
    constants = {name: array for name, array in constants.items() if name not in inputs}
    how = {"K": 16, "N": 3, "bits": 4, "block_size": 16} | attributes
    return Case("com.microsoft.MatMulNBits", order, {"x": np.zeros((2, 16), np.float32)} | inputs, constants, how)


A = {"a": np.zeros((2, 4), np.uint8)}
B = {"b": np.zeros((4, 3), np.int8)}
REFUSED = {
    "an order of groups": (of_few_bits({}, ["x", "b", "s", "", "g"]), "input g_idx .'g0'. is not supported"),
    "three bits": (of_few_bits({}, ["x", "b", "s"], bits=3), "attribute bits=3 is not supported, only 2, 4 and 8"),
    "a computed weight of few bits": (
        of_few_bits({"b": np.zeros((3, 1, 8), np.uint8)}, ["x", "b", "s"]),
        "'b0' is computed, and only constants are supported there",
    ),
    "a zero point for each row": (
        Case("MatMulInteger", ["a", "b", "z"], A, B | {"z": np.zeros(2, np.uint8)}),
        "zero points of shape .2. of the left factor are not supported",
    ),
    "a scale that is no number": (
        Case("QuantizeLinear", ["x", "s"], {"x": np.zeros((2, 4), np.float32)}, {"s": np.ones((2, 4), np.float32)}),
        "a scale of shape .2, 4. along axis 1 of 2 dimensions is not supported",
    ),
    "floats of 8 bits": (
        Case(
            "QuantizeLinear",
            ["x", "s"],
            {"x": np.zeros((2, 4), np.float32)},
            {"s": np.ones((), np.float32)},
            {"output_dtype": int(onnx.TensorProto.FLOAT8E5M2)},
        ),
        "rounding to number 19 is not supported, only to int4, uint4, int8",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_supported_is_named(what: str) -> None:
    case, said = REFUSED[what]
    assert re.search(f"node 'node0'.*{said}", refusal(case))
