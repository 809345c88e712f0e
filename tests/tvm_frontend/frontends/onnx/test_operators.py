"""Every operator that the importer knows, with random legal attributes, against ONNX's own reference evaluator.

A case is one node on random inputs. The importer either gives the reference's values or refuses the node by its name;
it never gives other values. Each operator is tried on tensors and, where it takes them, on formulas: values that follow
from the input's shape alone, which the importer folds instead of computing them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tvm import relax

from gpt.cli import UserError
from tvm_frontend.frontends.onnx.importer import import_onnx
from tvm_frontend.frontends.onnx.operators import CONVERTERS
from tvm_frontend.options import CompileOptions
from tvm_frontend.pipeline import compile_graph
from tvm_frontend.target import resolve_target

OPSET = 23
CASES = 16  # of each operator, compiled together
TARGET = resolve_target()
SIZES = {"n0": 3, "n1": 5}  # of the input x [n0, n1], whose dimensions are symbols; formulas are of its shape
Random = np.random.Generator


@dataclass(frozen=True)
class Case:
    """One node. inputs: arrays of the graph's inputs; constants: arrays in the file; both in the node's order."""

    op: str
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    names: tuple[str, ...] = ()  # of the node's inputs, where not all of `inputs` and then all of `constants`


def shape_of(random: Random, rank: int | None = None) -> list[int]:
    return [int(size) for size in random.integers(1, 6, rank or random.integers(1, 5))]


def floats(random: Random, shape: list[int]) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def axis_of(random: Random, rank: int) -> int:
    return int(random.integers(-rank, rank))


def sorted_axes(random: Random, rank: int, most: int) -> np.ndarray:
    """Some axes, each from the front or from the back."""
    chosen = random.choice(rank, int(random.integers(1, most + 1)), replace=False)
    return np.array([axis - rank * random.integers(2) for axis in chosen], np.int64)


def broadcastable(random: Random, shape: list[int]) -> list[int]:
    """A shape that broadcasts with `shape`: some leading axes are absent, some others 1."""
    return [dim if random.integers(3) else 1 for dim in shape[random.integers(len(shape) + 1) :]]


def two(op: str, make: Callable[[Random, list[int]], np.ndarray] = floats) -> Callable[[Random], Case]:
    def case(random: Random) -> Case:
        shape = shape_of(random)
        pair = [make(random, shape), make(random, broadcastable(random, shape))]
        a, b = pair if random.integers(2) else pair[::-1]
        return Case(op, {"a": a, "b": b})

    return case


def one(op: str) -> Callable[[Random], Case]:
    return lambda random: Case(op, {"a": floats(random, shape_of(random))})


def booleans(random: Random, shape: list[int]) -> np.ndarray:
    return random.integers(0, 2, shape).astype(bool)


def small(random: Random, shape: list[int]) -> np.ndarray:
    """Integers of which many are equal, so that comparisons meet ties."""
    return random.integers(-2, 3, shape).astype(np.float32)


def gather(random: Random) -> Case:
    shape = shape_of(random)
    axis = axis_of(random, len(shape))
    size = shape[axis]
    rows = random.integers(-size, size, shape_of(random, int(random.integers(0, 3)) or None)[:2])
    rows = rows if random.integers(4) else np.array(random.integers(-size, size))  # a scalar drops the axis
    attributes = {"axis": axis} if random.integers(4) else {}
    if not attributes:
        rows = rows % shape[0] - shape[0] * random.integers(2)
    parts = {"inputs": {"a": floats(random, shape)}, "constants": {}}
    parts["inputs" if random.integers(2) else "constants"]["rows"] = np.asarray(rows, np.int64)
    return Case("Gather", **parts, attributes=attributes)


def gather_nd(random: Random) -> Case:
    shape = shape_of(random, int(random.integers(1, 4)))
    depth = int(random.integers(1, len(shape) + 1))
    rows = np.stack([random.integers(-size, size, (2, 3)) for size in shape[:depth]], -1)
    return Case("GatherND", {"a": floats(random, shape)}, {"rows": rows.astype(np.int64)})


def slices(random: Random) -> Case:
    shape = shape_of(random)
    axes = sorted_axes(random, len(shape), len(shape))
    ends = random.integers(-9, 10, (2, len(axes)))
    ends = np.where(random.integers(0, 5, ends.shape) == 0, np.sign(ends) * (2**63 - 1), ends)
    constants = {"starts": ends[0], "ends": ends[1]}
    if random.integers(4):
        constants["axes"] = axes
        if random.integers(2):
            constants["steps"] = np.where(random.integers(0, 3, len(axes)) == 0, random.integers(-2, 3, len(axes)), 1)
            constants["steps"][constants["steps"] == 0] = 1
    return Case("Slice", {"a": floats(random, shape)}, {name: np.asarray(v, np.int64) for name, v in constants.items()})


def split(random: Random) -> Case:
    shape = shape_of(random)
    axis = axis_of(random, len(shape))
    size = shape[axis]
    if random.integers(2):
        cuts = np.sort(random.integers(0, size + 1, int(random.integers(0, 3))))
        sizes = np.diff([0, *cuts, size]).astype(np.int64)
        attributes = {"axis": axis}
        return Case("Split", {"a": floats(random, shape)}, {"sizes": sizes}, attributes, outputs=len(sizes))
    parts = int(random.integers(1, size + 1))
    if -(-size // parts) * (parts - 1) >= size:  # the standard leaves no empty last piece
        parts = 1
    return Case("Split", {"a": floats(random, shape)}, {}, {"axis": axis, "num_outputs": parts}, outputs=parts)


def squeeze(random: Random) -> Case:
    shape = [dim if random.integers(2) else 1 for dim in shape_of(random)]
    ones = [axis - len(shape) * int(random.integers(2)) for axis, dim in enumerate(shape) if dim == 1]
    constants = {"axes": np.array(ones, np.int64)} if ones and random.integers(3) else {}
    return Case("Squeeze", {"a": floats(random, shape)}, constants)


def unsqueeze(random: Random) -> Case:
    shape = shape_of(random, int(random.integers(1, 4)))
    more = int(random.integers(1, 3))
    axes = sorted_axes(random, len(shape) + more, more)
    rank = len(shape) + len(axes)
    axes = np.array([axis % rank - rank * random.integers(2) for axis in axes], np.int64)
    if len(set(axes % rank)) < len(axes):
        axes = axes[:1]
    return Case("Unsqueeze", {"a": floats(random, shape)}, {"axes": axes})


def concat(random: Random) -> Case:
    shape = shape_of(random)
    axis = axis_of(random, len(shape))
    pieces = []
    for _ in range(int(random.integers(1, 4))):
        shape[axis] = int(random.integers(1, 5))
        pieces.append(floats(random, shape))
    return Case("Concat", {f"a{number}": piece for number, piece in enumerate(pieces)}, attributes={"axis": axis})


def transpose(random: Random) -> Case:
    shape = shape_of(random)
    perm = [int(axis) for axis in random.permutation(len(shape))]
    return Case("Transpose", {"a": floats(random, shape)}, attributes={"perm": perm} if random.integers(3) else {})


def reshape(random: Random) -> Case:
    shape = shape_of(random)
    wanted = [int(dim) for dim in random.permutation(shape)]
    if random.integers(2):
        wanted[random.integers(len(wanted))] = -1
    if random.integers(3) == 0 and -1 not in wanted[:1]:
        wanted = [0, *wanted[1:]] if wanted[0] == shape[0] else wanted
    return Case("Reshape", {"a": floats(random, shape)}, {"shape": np.array(wanted, np.int64)})


def expand(random: Random) -> Case:
    shape = shape_of(random)
    small = broadcastable(random, shape) or [1]
    wanted = shape if random.integers(2) else [int(size) for size in random.integers(1, 4, 2)] + shape
    return Case("Expand", {"a": floats(random, small)}, {"shape": np.array(wanted, np.int64)})


def softmax(random: Random) -> Case:
    shape = shape_of(random)
    attributes = {"axis": axis_of(random, len(shape))} if random.integers(3) else {}
    return Case("Softmax", {"a": 3 * floats(random, shape)}, attributes=attributes)


def cast(random: Random) -> Case:
    shape = shape_of(random)
    kinds = {
        np.float32: (TensorProto.INT64, TensorProto.INT32, TensorProto.INT8, TensorProto.BOOL, TensorProto.FLOAT),
        np.int64: (TensorProto.INT32, TensorProto.INT8, TensorProto.FLOAT, TensorProto.BOOL),
        np.bool_: (TensorProto.FLOAT, TensorProto.INT64),
    }
    source = list(kinds)[random.integers(len(kinds))]
    values = np.round(random.uniform(-100, 100, shape), 1) * random.integers(0, 2, shape)
    to = int(kinds[source][random.integers(len(kinds[source]))])
    return Case("Cast", {"a": (values if source != np.bool_ else values > 0).astype(source)}, attributes={"to": to})


def where(random: Random) -> Case:
    shape = shape_of(random)
    parts = [shape, *(broadcastable(random, shape) for _ in range(2))]
    order = random.permutation(3)
    shapes = [parts[index] for index in order]
    chosen, other = (floats(random, shape) for shape in shapes[1:])
    return Case("Where", {"c": booleans(random, shapes[0]), "a": chosen, "b": other})


def divide(random: Random) -> Case:
    case = two("Div")(random)
    if random.integers(2):
        return case
    whole = {name: random.integers(-9, 10, array.shape) for name, array in case.inputs.items()}
    whole["b"] = np.where(whole["b"] == 0, 2, whole["b"])
    return Case("Div", whole)


def power(random: Random) -> Case:
    shape = shape_of(random)
    exponent = np.float32(random.choice([2, 3, 0.5, -1, 0, 2.5]))
    base = np.abs(floats(random, shape)) + 0.1
    if random.integers(2):
        rank = int(random.integers(0, len(shape) + 2))
        return Case("Pow", {"a": base}, {"e": np.full([1] * rank, exponent)})
    return Case("Pow", {"a": base, "e": floats(random, broadcastable(random, shape))})


def of_all(op: str) -> Callable[[Random], Case]:
    def case(random: Random) -> Case:
        shape = shape_of(random)
        more = [floats(random, broadcastable(random, shape)) for _ in range(int(random.integers(0, 3)))]
        return Case(op, {f"a{number}": each for number, each in enumerate([floats(random, shape), *more])})

    return case


def gemm(random: Random) -> Case:
    M, N, K = shape_of(random, 3)
    attributes = {"transB": int(random.integers(2)), "transA": int(random.integers(4) == 0)}
    attributes |= {"alpha": 0.5} if random.integers(4) == 0 else {}
    a, b = floats(random, [M, K]), floats(random, [K, N])
    inputs = {"a": a.T if attributes["transA"] else a, "b": b.T if attributes["transB"] else b}
    if random.integers(3):
        inputs["c"] = floats(random, broadcastable(random, [M, N]))
    return Case("Gemm", {name: np.ascontiguousarray(array) for name, array in inputs.items()}, attributes=attributes)


def matmul(random: Random) -> Case:
    M, N, K = shape_of(random, 3)
    batch = shape_of(random, int(random.integers(1, 3)))
    a, b = ([*broadcastable(random, batch), M, K], [*broadcastable(random, batch), K, N])
    a, b = (a[-1:] if random.integers(6) == 0 else a), (b[-2:-1] if random.integers(6) == 0 else b)
    return Case("MatMul", {"a": floats(random, a), "b": floats(random, b)})


def layer_norm(random: Random) -> Case:
    shape = shape_of(random, int(random.integers(2, 4)))
    shape[-1] += 2
    axis = -1 if random.integers(3) else axis_of(random, len(shape))
    inputs = {"a": 2 * floats(random, shape) + 1, "gain": floats(random, shape[axis % len(shape) :])}
    if random.integers(2):
        inputs["bias"] = floats(random, shape[axis % len(shape) :])
    attributes = {"axis": axis} if random.integers(2) or axis != -1 else {}
    attributes |= {"epsilon": float(random.choice([1e-5, 1e-3, 0.1]))} if random.integers(2) else {}
    return Case("LayerNormalization", inputs, attributes=attributes)


def gelu(random: Random) -> Case:
    attributes = [{}, {"approximate": "none"}, {"approximate": "tanh"}][random.integers(3)]
    return Case("Gelu", {"a": 3 * floats(random, shape_of(random))}, attributes=attributes)


def attention(random: Random) -> Case:
    B, heads, T, S, size = shape_of(random, 5)
    attributes = {"is_causal": int(random.integers(2))} | ({"scale": 0.3} if random.integers(2) else {})
    attributes |= {"softcap": 2.0} if random.integers(4) == 0 else {}
    kv = heads if random.integers(3) else 1
    S = T if attributes["is_causal"] else S
    inputs = {"q": [B, heads, T, size], "k": [B, kv, S, size], "v": [B, kv, S, size]}
    return Case("Attention", {name: floats(random, shape) for name, shape in inputs.items()}, attributes=attributes)


def is_nan(random: Random) -> Case:
    values = floats(random, shape_of(random))
    return Case("IsNaN", {"a": np.where(values > 0, np.float32(np.nan), values)})


def counted(random: Random) -> Case:
    """Range of integers and of floats, up and down."""
    dtype = np.int64 if random.integers(2) else np.float32
    start, step = int(random.integers(-3, 4)), int(random.choice([1, 1, 2, -1]))
    numbers = {"start": start, "stop": start + step * int(random.integers(0, 6)), "step": step}
    return Case("Range", {}, {name: np.array(value, dtype) for name, value in numbers.items()})


def shape_op(random: Random) -> Case:
    shape = shape_of(random)
    rank = len(shape)
    ends = {name: int(random.integers(-rank, rank + 1)) for name in ("start", "end") if random.integers(2)}
    return Case("Shape", {"a": floats(random, shape)}, attributes=ends)


def constant_of_shape(random: Random) -> Case:
    value = [None, np.array([2.5], np.float32), np.array([7], np.int64), np.array([True])][random.integers(4)]
    attributes = {} if value is None else {"value": numpy_helper.from_array(value)}
    return Case("ConstantOfShape", {}, {"shape": np.array(shape_of(random), np.int64)}, attributes)


CASES_OF: dict[str, Callable[[Random], Case]] = {
    "Add": two("Add"),
    "And": two("And", booleans),
    "Attention": attention,
    "Cast": cast,
    "Concat": concat,
    "ConstantOfShape": constant_of_shape,
    "Div": divide,
    "Equal": two("Equal", small),
    "Erf": one("Erf"),
    "Expand": expand,
    "Gather": gather,
    "GatherND": gather_nd,
    "Gelu": gelu,
    "Gemm": gemm,
    "Greater": two("Greater", small),
    "GreaterOrEqual": two("GreaterOrEqual", small),
    "IsNaN": is_nan,
    "LayerNormalization": layer_norm,
    "Less": two("Less", small),
    "LessOrEqual": two("LessOrEqual", small),
    "MatMul": matmul,
    "Max": of_all("Max"),
    "Min": of_all("Min"),
    "Mul": two("Mul"),
    "Not": lambda random: Case("Not", {"a": booleans(random, shape_of(random))}),
    "Or": two("Or", booleans),
    "Pow": power,
    "Range": counted,
    "Relu": one("Relu"),
    "Reshape": reshape,
    "Shape": shape_op,
    "Sigmoid": one("Sigmoid"),
    "Slice": slices,
    "Softmax": softmax,
    "Split": split,
    "Squeeze": squeeze,
    "Sub": two("Sub"),
    "Tanh": one("Tanh"),
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
    "Where": where,
}
# These take formulas alone, or a cache: see test_formulas_are_as_computed and tests/tvm_frontend/test_family.py.
ELSEWHERE = {"CumSum", "Trilu", "TensorScatter"}
# What an importer that refuses everything would pass: at least so many of an operator's cases must be taken.
LEAST_TAKEN = {"Attention": 3, "GatherND": 0, "Gemm": 4, "LayerNormalization": 6, "Range": 3, "Slice": 4}


def model_of(cases: list[Case]) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """One file with a node for each case, and what to feed it."""
    nodes, inputs, weights, outputs, feeds = [], [], [], [], {}
    for number, case in enumerate(cases):
        for name, array in case.inputs.items():
            feeds[f"{name}{number}"] = array
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            inputs.append(helper.make_tensor_value_info(f"{name}{number}", kind, array.shape))
        weights += [
            numpy_helper.from_array(np.asarray(array), f"{name}{number}") for name, array in case.constants.items()
        ]
        produced = [f"y{number}_{index}" for index in range(case.outputs)]
        used = [f"{name}{number}" for name in (*case.inputs, *case.constants)]
        nodes.append(helper.make_node(case.op, used, produced, name=f"node{number}", **case.attributes))
        outputs += [helper.make_empty_tensor_value_info(name) for name in produced]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10), feeds


def run(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The file's outputs by this project's importer, without any rewrite."""
    made = compile_graph(lambda: import_onnx(proto), TARGET, CompileOptions(opt_level=0))
    forward = relax.VirtualMachine(made.executable, tvm.cpu())["forward"]
    arguments = [tvm.runtime.tensor(feeds[value.name]) for value in proto.graph.input]
    found = forward(*arguments, [tvm.runtime.tensor(array) for array in made.graph.weights.values()])
    return [each.numpy() for each in ([found] if hasattr(found, "numpy") else found)]


def is_read(proto: onnx.ModelProto, node: str) -> bool:
    """Tell whether the importer takes a file; if not, its words must name the node."""
    try:
        import_onnx(proto)
    except UserError as error:
        if f"node {node!r}" not in str(error):
            raise
        return False
    return True


def compare(proto: onnx.ModelProto, feeds: dict[str, np.ndarray], cases: list[Case]) -> None:
    expected = ReferenceEvaluator(proto).run(None, feeds)
    owners: Iterator[Case] = (case for case in cases for _ in range(case.outputs))
    for found, wanted, case in zip(run(proto, feeds), expected, owners, strict=True):
        assert (found.shape, found.dtype) == (np.shape(wanted), np.asarray(wanted).dtype), case
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-6, err_msg=str(case))


def test_every_operator_is_tried() -> None:
    assert CASES_OF.keys() | ELSEWHERE == CONVERTERS.keys()


@pytest.mark.parametrize("op", CASES_OF)
def test_an_operator_gives_the_references_values_or_is_refused(op: str) -> None:
    random = np.random.default_rng([list(CASES_OF).index(op), 22])
    cases = [case for case in (CASES_OF[op](random) for _ in range(CASES)) if is_read(model_of([case])[0], "node0")]
    assert len(cases) >= LEAST_TAKEN.get(op, CASES)
    compare(*model_of(cases), cases)


# Each is one node on `f`, whose element [i, j] is 7 i + j - 10, or on `s`, the shape of x; names of constants follow.
FORMULAS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "a row from the end": ("Gather", ["f", "minus_one"], {"axis": 0}),
    "columns from both ends": ("Gather", ["f", "both_ends"], {"axis": -1}),
    "the last length": ("Gather", ["s", "minus_one"], {}),
    "elements from both ends": ("GatherND", ["f", "corners"], {}),
    "all but the first row": ("Slice", ["f", "one", "large", "zero"], {}),
    "the last column": ("Slice", ["f", "minus_one_list", "large", "one"], {}),
    "all but the last row": ("Slice", ["f", "zero", "minus_one_list", "zero"], {}),
    "twice along rows": ("Concat", ["f", "f"], {"axis": -2}),
    "twice along columns": ("Concat", ["f", "f"], {"axis": 1}),
    "one more axis": ("Unsqueeze", ["f", "minus_two"], {}),
    "repeated": ("Expand", ["f", "three_one_one"], {}),
    "as float": ("Cast", ["f"], {"to": TensorProto.FLOAT}),
    "as bool": ("Cast", ["f"], {"to": TensorProto.BOOL}),
    "as int32": ("Cast", ["f"], {"to": TensorProto.INT32}),
    "divided": ("Div", ["f", "three"], {}),
    "divided by a negative": ("Div", ["f", "minus_three"], {}),
    "divided by itself": ("Div", ["three", "f_odd"], {}),
    "less": ("Less", ["f", "three"], {}),
    "greater or equal": ("GreaterOrEqual", ["f", "minus_three"], {}),
    "equal": ("Equal", ["f", "three"], {}),
    "the larger": ("Max", ["f", "three", "minus_three"], {}),
    "the smaller": ("Min", ["f", "three"], {}),
    "chosen": ("Where", ["c", "f", "three"], {}),
    "not": ("Not", ["c"], {}),
    "and": ("And", ["c", "c2"], {}),
    "or": ("Or", ["c", "c2"], {}),
    "the upper triangle": ("Trilu", ["f"], {}),
    "the lower triangle": ("Trilu", ["f", "minus_one"], {"upper": 0}),
    "above the diagonal": ("Trilu", ["f", "plus_one"], {"upper": 1}),
    "counts of rows": ("CumSum", ["ones", "minus_one"], {}),
    "turned": ("Transpose", ["f"], {}),
    "in one row": ("Reshape", ["f", "minus_one_list"], {}),
}
NUMBERS = {
    "minus_one": -1, "plus_one": 1, "both_ends": [-1, 0], "one": [1], "zero": [0],
    "large": [2**63 - 1], "minus_one_list": [-1], "minus_two": [-2], "three_one_one": [3, 1, 1], "three": 3,
    "minus_three": -3, "seven": 7, "ten": 10, "two": 2, "axis_one": [1], "axis_zero": [0], "zero_scalar": 0,
}  # fmt: skip
BASE = [
    ("Shape", ["x"], "s", {}),
    ("Gather", ["s", "zero_scalar"], "n0", {}),
    ("Gather", ["s", "plus_one"], "n1", {}),
    ("Unsqueeze", ["both_ends", "axis_one"], "first", {}),
    ("Sub", ["minus_one_list", "both_ends"], "other_ends", {}),
    ("Unsqueeze", ["other_ends", "axis_one"], "second", {}),
    ("Concat", ["first", "second"], "corners", {"axis": -1}),
    ("Range", ["zero_scalar", "n0", "plus_one"], "rows", {}),
    ("Range", ["zero_scalar", "n1", "plus_one"], "columns", {}),
    ("Unsqueeze", ["rows", "axis_one"], "rows2", {}),
    ("Unsqueeze", ["columns", "axis_zero"], "columns2", {}),
    ("Mul", ["rows2", "seven"], "scaled", {}),
    ("Add", ["scaled", "columns2"], "sum", {}),
    ("Sub", ["sum", "ten"], "f", {}),
    ("Mul", ["f", "two"], "doubled", {}),
    ("Add", ["doubled", "plus_one"], "f_odd", {}),
    ("Less", ["f", "three"], "c", {}),
    ("Greater", ["f", "minus_three"], "c2", {}),
    ("ConstantOfShape", ["s"], "ones", {"value": numpy_helper.from_array(np.array([1], np.int64))}),
]


def formulas_of(names: list[str]) -> onnx.ModelProto:
    """A file that computes those of FORMULAS from the shape of its input x [n0, n1] alone, and returns x too."""
    nodes = [helper.make_node(op, inputs, [output], name=output, **how) for op, inputs, output, how in BASE]
    outputs = [f"out{number}" for number, _ in enumerate(names)]
    for name, output in zip(names, outputs, strict=True):
        op, inputs, how = FORMULAS[name]
        nodes.append(helper.make_node(op, inputs, [output], name="node0", **how))
    nodes.append(helper.make_node("Relu", ["x"], ["y"], name="relu"))
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(SIZES))],
        [helper.make_empty_tensor_value_info(name) for name in ("y", *outputs)],
        [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in NUMBERS.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def test_formulas_are_as_computed() -> None:
    names = [name for name in FORMULAS if is_read(formulas_of([name]), "node0")]
    assert set(FORMULAS) - set(names) <= {"turned", "in one row"}, set(FORMULAS) - set(names)
    proto = formulas_of(names)
    made = compile_graph(lambda: import_onnx(proto), TARGET, CompileOptions(opt_level=0))
    forward = relax.VirtualMachine(made.executable, tvm.cpu())["forward"]
    weights = [tvm.runtime.tensor(array) for array in made.graph.weights.values()]
    for shape in [(3, 5), (1, 1), (4, 1), (1, 6), (8, 8)]:
        x = np.zeros(shape, np.float32)
        expected = ReferenceEvaluator(proto).run(None, {"x": x})
        found = [each.numpy() for each in forward(tvm.runtime.tensor(x), weights)]
        for name, left, right in zip(("x", *names), found, expected, strict=True):
            assert (left.shape, left.dtype) == (np.shape(right), np.asarray(right).dtype), (name, shape)
            np.testing.assert_array_equal(left, right, err_msg=f"{name} {shape}")
