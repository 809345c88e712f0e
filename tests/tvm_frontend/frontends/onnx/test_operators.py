"""Every operator that the importer knows, with random legal attributes, against ONNX's own reference evaluator.

A case is one node on random inputs. The importer either gives the reference's values or refuses the node by its name;
it never gives other values. Each operator is tried on tensors and, where it takes them, on formulas: values that follow
from the input's shape alone, which the importer folds instead of computing them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tvm import relax

from gpt.cli import UserError
from tvm_frontend.frontends.onnx.importer import import_onnx
from tvm_frontend.frontends.onnx.operators import CONVERTERS, contrib, quantized
from tvm_frontend.options import CompileOptions
from tvm_frontend.pipeline import compile_graph
from tvm_frontend.target import resolve_target

OPSET = 23
CASES, SYMBOLIC = 12, 4  # of each operator, with sizes that are numbers and symbols; compiled together
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
    opset: int = OPSET


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
    """Attention of any kind: heads in groups, 3 or 4 dimensions, a mask of any shape, a past, windows, a cache."""
    B, kv, T, S, size = shape_of(random, 5)
    heads, v_size = kv * int(random.integers(1, 3)), int(random.integers(1, 5))
    merged, cache = random.integers(3) == 0, ["none", "past", "filled"][random.integers(3)]
    P = int(random.integers(0, 4)) if cache == "past" else 0
    S = S + T if cache == "filled" else S
    inputs = {"q": floats(random, [B, heads, T, size])}
    inputs |= {"k": floats(random, [B, kv, S, size]), "v": floats(random, [B, kv, S, v_size])}
    attributes: dict[str, Any] = {"q_num_heads": heads, "kv_num_heads": kv} if merged else {}
    if merged:  # [B, T, nh · hs]
        inputs = {name: np.moveaxis(x, 1, 2).reshape(B, x.shape[2], -1) for name, x in inputs.items()}
    if random.integers(2):
        shape = [B, heads, T, P + S]
        shape = [dim if random.integers(3) else 1 for dim in shape[:3]] + [shape[3]]
        mask = random.choice([0.0, 0.5, -3.0, -np.inf], shape[random.integers(3) :]).astype(np.float32)
        inputs["mask"] = mask if random.integers(2) else mask == 0
    if cache == "past":
        inputs |= {"past_k": floats(random, [B, kv, P, size]), "past_v": floats(random, [B, kv, P, v_size])}
    if cache == "filled":
        inputs["filled"] = random.integers(0, S + 1, B)
    attributes |= {"is_causal": int(random.integers(2))} | ({"scale": 0.3} if random.integers(2) else {})
    attributes |= {"softcap": 2.0} if random.integers(4) == 0 else {}
    outputs = int(random.choice([1, 3, 4]))
    if outputs == 4:  # the evaluator gives the capped scores also for mode 0, ONNX's text and its function those before
        attributes["qk_matmul_output_mode"] = int(random.integers("softcap" in attributes, 4))
    order = ("q", "k", "v", "mask", "past_k", "past_v", "filled")
    places = tuple(name if name in inputs else "" for name in order)
    return Case("Attention", inputs, attributes=attributes, outputs=outputs, names=places, opset=24)


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


def curve(op: str, low: float = -3, high: float = 3, **attributes: float) -> Callable[[Random], Case]:
    """A function of one number, between two bounds; its attributes with other numbers than the usual ones too."""

    def case(random: Random) -> Case:
        a = random.uniform(low, high, shape_of(random)).astype(np.float32)
        chosen = {name: number for name, number in attributes.items() if random.integers(2)}
        return Case(op, {"a": a}, attributes=chosen, opset=24 if op == "Swish" else OPSET)

    return case


def integers(random: Random, shape: list[int]) -> np.ndarray:
    return random.integers(0, 256, shape).astype(np.int32)


def axes_case(op: str, random: Random, a: np.ndarray, axes: np.ndarray | None, since: int, **attributes: Any) -> Case:
    """A node with axes, which are an attribute in opsets before `since` and an input from then on."""
    if random.integers(2):
        attributes |= {} if axes is None else {"axes": axes.tolist()}
        return Case(op, {"a": a}, {}, attributes, opset=int(random.integers(11, since)))
    opset = int(random.choice([since, OPSET]))
    return Case(op, {"a": a}, {} if axes is None else {"axes": axes}, attributes, opset=opset)


def reduction(op: str) -> Callable[[Random], Case]:
    def case(random: Random) -> Case:
        shape = shape_of(random)
        axes = sorted_axes(random, len(shape), len(shape)) if random.integers(4) else None
        attributes = {"keepdims": 0} if random.integers(2) else {}
        a = floats(random, shape)
        a = np.abs(a) + np.float32(0.1) if op == "ReduceLogSum" else a
        if op in ("ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum") and random.integers(3) == 0:
            a = random.integers(-4, 5, shape)
        made = axes_case(op, random, a, axes, 13 if op == "ReduceSum" else 18, **attributes)
        if axes is None and made.opset >= 18 and random.integers(2):
            return replace(made, attributes=made.attributes | {"noop_with_empty_axes": 1})
        return made

    return case


def older(make: Callable[[Random], Case], since: int) -> Callable[[Random], Case]:
    """Squeeze and Unsqueeze with axes as they are today, or as an attribute."""

    def case(random: Random) -> Case:
        made = make(random)
        (a,) = made.inputs.values()
        return axes_case(made.op, random, a, made.constants.get("axes"), since)

    return case


def older_split(random: Random) -> Case:
    """Split with sizes as an input, as an attribute, or in equal parts."""
    made = split(random)
    if "sizes" in made.constants and random.integers(2):
        attributes = made.attributes | {"split": made.constants["sizes"].tolist()}
        return replace(made, constants={}, attributes=attributes, opset=int(random.integers(11, 13)))
    equal = made.inputs["a"].shape[made.attributes["axis"]] % made.outputs == 0
    if "num_outputs" in made.attributes and equal and random.integers(2):
        return replace(made, attributes={"axis": made.attributes["axis"]}, opset=int(random.integers(11, 18)))
    return made


def flat_softmax(op: str) -> Callable[[Random], Case]:
    """Softmax of today, or of before opset 13, which takes all axes from one on as one."""

    def case(random: Random) -> Case:
        made = softmax(random)
        old = random.integers(2) and made.inputs["a"].ndim > 1
        return replace(made, op=op, opset=int(random.integers(11, 13)) if old else OPSET)

    return case


def arg(op: str) -> Callable[[Random], Case]:
    def case(random: Random) -> Case:
        shape = shape_of(random)
        attributes = {"axis": axis_of(random, len(shape))} if random.integers(2) else {}
        attributes |= {"keepdims": 0} if random.integers(2) else {}
        attributes |= {"select_last_index": 1} if random.integers(2) else {}
        return Case(op, {"a": small(random, shape)}, attributes=attributes)

    return case


def cumulative(random: Random) -> Case:
    shape = shape_of(random)
    a = floats(random, shape) if random.integers(2) else random.integers(0, 2, shape)
    attributes = {name: 1 for name in ("exclusive", "reverse") if random.integers(3) == 0}
    return Case("CumSum", {"a": a}, {"axis": np.array(axis_of(random, len(shape)))}, attributes)


def triangle(random: Random) -> Case:
    shape = shape_of(random, int(random.integers(2, 4)))
    constants = {"k": np.array(random.integers(-3, 4))} if random.integers(2) else {}
    make = [floats, booleans, integers][random.integers(3)]
    return Case("Trilu", {"a": make(random, shape)}, constants, {"upper": 0} if random.integers(2) else {})


def clip(random: Random) -> Case:
    bounds = {"low": np.float32(-0.5), "high": np.float32(0.7)}
    chosen = {name: np.array(value) for name, value in bounds.items() if random.integers(3)}
    names = ("a", "low" if "low" in chosen else "", *(["high"] if "high" in chosen else []))
    return Case("Clip", {"a": floats(random, shape_of(random))}, chosen, names=names)


def tile(random: Random) -> Case:
    shape = shape_of(random)
    return Case("Tile", {"a": floats(random, shape)}, {"often": random.integers(1, 4, len(shape))})


def pad(random: Random) -> Case:
    shape = [size + 2 for size in shape_of(random, int(random.integers(1, 4)))]
    mode = str(random.choice(["constant", "edge", "reflect", "wrap"]))
    widths = random.integers(-1 if mode == "constant" else 0, 3, 2 * len(shape))
    constants = {"widths": widths}
    if mode == "constant" and random.integers(2):
        constants["fill"] = np.array(2.5, np.float32)
    return Case("Pad", {"a": floats(random, shape)}, constants, {"mode": mode})


def gather_elements(random: Random) -> Case:
    shape = shape_of(random)
    axis = axis_of(random, len(shape))
    places = [int(random.integers(1, size + 1)) for size in shape]
    rows = random.integers(-shape[axis], shape[axis], places)
    return Case("GatherElements", {"a": floats(random, shape), "rows": rows}, attributes={"axis": axis})


def gather_nd_tensors(random: Random) -> Case:
    case = gather_nd(random)
    if random.integers(2) and case.inputs["a"].ndim > 1:
        a = floats(random, [2, *case.inputs["a"].shape])
        rows = np.stack([case.constants["rows"]] * 2)
        return Case("GatherND", {"a": a, "rows": rows}, attributes={"batch_dims": 1})
    return Case("GatherND", case.inputs | case.constants) if random.integers(2) else case


def scatter_elements(random: Random) -> Case:
    """Each element is written once, as the order of several is not defined."""
    shape = shape_of(random)
    axis = axis_of(random, len(shape))
    count = int(random.integers(1, shape[axis] + 1))
    places = [*shape]
    places[axis] = count
    order = np.argsort(random.random(shape), axis=axis)
    rows = np.take(order, range(count), axis=axis) - shape[axis] * random.integers(0, 2)
    inputs = {"a": floats(random, shape), "rows": rows, "new": floats(random, places)}
    return Case("ScatterElements", inputs, attributes={"axis": axis} | reduction_of(random))


def reduction_of(random: Random) -> dict[str, str]:
    kinds = ["none", "add", "mul", "max", "min"]
    return {"reduction": kinds[random.integers(5)]} if random.integers(2) else {}


def scatter_nd(random: Random) -> Case:
    shape = shape_of(random, int(random.integers(1, 4)))
    depth = int(random.integers(1, len(shape) + 1))
    cells = np.array(list(np.ndindex(*shape[:depth])))
    rows = random.permutation(cells)[: int(random.integers(1, len(cells) + 1))]
    rows = rows - np.array(shape[:depth]) * random.integers(0, 2, rows.shape)
    inputs = {"a": floats(random, shape), "rows": rows, "new": floats(random, [len(rows), *shape[depth:]])}
    return Case("ScatterND", inputs, attributes=reduction_of(random))


def one_hot(random: Random) -> Case:
    depth = int(random.integers(1, 6))
    shape = shape_of(random, int(random.integers(1, 4)))
    rows = random.integers(-depth, depth, shape)
    attributes = {"axis": axis_of(random, len(shape) + 1)} if random.integers(2) else {}
    values = np.array([-1.5, 2.5], np.float32)
    return Case("OneHot", {"rows": rows}, {"depth": np.array(depth), "values": values}, attributes)


def top_k(random: Random) -> Case:
    shape = shape_of(random)
    axis = axis_of(random, len(shape))
    a = random.permutation(int(np.prod(shape))).reshape(shape).astype(np.float32)  # without ties
    k = np.array([random.integers(1, shape[axis] + 1)])
    attributes = {"axis": axis} | ({"largest": 0} if random.integers(2) else {})
    return Case("TopK", {"a": a}, {"k": k}, attributes, outputs=2)


def einsum(random: Random) -> Case:
    sizes = dict(zip("bhijd", shape_of(random, 5), strict=True))
    equations = ["bhid,bhjd->bhij", "bhij,bhjd->bhid", "i,j->ij", "bid,hd->bih", "bij->bji", "bij->b", "bi,bi->b"]
    equation = equations[random.integers(len(equations))]
    terms = equation.split("->")[0].split(",")
    inputs = {f"a{n}": floats(random, [sizes[letter] for letter in term]) for n, term in enumerate(terms)}
    return Case("Einsum", inputs, attributes={"equation": equation})


def modulo(random: Random) -> Case:
    shape = shape_of(random)
    whole = bool(random.integers(2))
    a, b = (random.integers(-9, 10, shape) for _ in range(2))
    b = np.where(b == 0, 4, b)
    if whole:
        return Case("Mod", {"a": a, "b": b}, attributes={"fmod": int(random.integers(2))})
    a, b = (each.astype(np.float32) + np.float32(0.25) for each in (a, b))
    return Case("Mod", {"a": a, "b": b}, attributes={"fmod": 1})


def infinite(random: Random) -> Case:
    a = random.choice(np.array([np.inf, -np.inf, 1, np.nan], np.float32), shape_of(random))
    signs = {name: 0 for name in ("detect_positive", "detect_negative") if random.integers(3) == 0}
    return Case("IsInf", {"a": a}, attributes=signs)


def rms_norm(random: Random) -> Case:
    made = layer_norm(random)
    inputs = {name: array for name, array in made.inputs.items() if name != "bias"}
    return Case("RMSNormalization", inputs, attributes=made.attributes)


def rotary(random: Random) -> Case:
    B, heads, T, half = shape_of(random, 4)
    size, rotated = 2 * half + 2, 2 * half
    merged, whole = bool(random.integers(2)), bool(random.integers(2))
    half += whole
    attributes = {"interleaved": int(random.integers(2))} | ({} if whole else {"rotary_embedding_dim": rotated})
    attributes |= {"num_heads": heads} if merged else {}
    inputs = {"x": floats(random, [B, T, heads * size] if merged else [B, heads, T, size])}
    if random.integers(2):
        inputs |= {"cos": floats(random, [9, half]), "sin": floats(random, [9, half])}
        inputs["places"] = random.integers(0, 9, (B, T))
    else:
        inputs |= {"cos": floats(random, [B, T, half]), "sin": floats(random, [B, T, half])}
    return Case("RotaryEmbedding", inputs, attributes=attributes)


def cast_like(random: Random) -> Case:
    like = [np.float32(0), np.int64(0), np.int32(0), np.bool_(0)][random.integers(4)]
    a = np.round(random.uniform(-9, 9, shape_of(random)), 1).astype(np.float32)
    return Case("CastLike", {"a": a, "like": np.array([like])})


def dropout(random: Random) -> Case:
    outputs = int(random.integers(1, 3))
    return Case("Dropout", {"a": floats(random, shape_of(random))}, outputs=outputs, opset=int(random.integers(12, 24)))


def flatten(random: Random) -> Case:
    shape = shape_of(random)
    attributes = {"axis": int(random.integers(-len(shape), len(shape) + 1))} if random.integers(3) else {}
    return Case("Flatten", {"a": floats(random, shape)}, attributes=attributes)


def eye_like(random: Random) -> Case:
    attributes: dict[str, Any] = {"k": int(random.integers(-2, 3))} if random.integers(2) else {}
    attributes |= {"dtype": TensorProto.INT64} if random.integers(2) else {}
    return Case("EyeLike", {"a": floats(random, shape_of(random, 2))}, attributes=attributes)


def constant_node(random: Random) -> Case:
    kinds: list[dict[str, Any]] = [
        {"value_float": 1.5},
        {"value_floats": [1.5, -2.0]},
        {"value_int": 3},
        {"value_ints": [3, -4]},
        {"value": numpy_helper.from_array(floats(random, shape_of(random)))},
        {"value": numpy_helper.from_array(booleans(random, shape_of(random)))},
    ]
    return Case("Constant", attributes=kinds[random.integers(len(kinds))], opset=int(random.integers(12, 24)))


CURVES = {
    "Abs": curve("Abs"),
    "Ceil": curve("Ceil"),
    "Cos": curve("Cos"),
    "Elu": curve("Elu", alpha=0.5),
    "Exp": curve("Exp"),
    "Floor": curve("Floor"),
    "HardSigmoid": curve("HardSigmoid", alpha=0.3, beta=0.4),
    "HardSwish": curve("HardSwish", -5, 5),
    "Identity": one("Identity"),
    "LeakyRelu": curve("LeakyRelu", alpha=0.2),
    "Log": curve("Log", 0.1, 9),
    "Mish": curve("Mish"),
    "Neg": curve("Neg"),
    "Reciprocal": curve("Reciprocal", 0.2, 4),
    "Round": lambda random: Case("Round", {"a": random.integers(-7, 8, shape_of(random)).astype(np.float32) / 2}),
    "Selu": curve("Selu", alpha=1.2, gamma=0.9),
    "Sigmoid": curve("Sigmoid", -9, 9),
    "Sign": lambda random: Case("Sign", {"a": small(random, shape_of(random))}),
    "Sin": curve("Sin"),
    "Softplus": curve("Softplus", -30, 30),
    "Softsign": curve("Softsign"),
    "Sqrt": curve("Sqrt", 0, 9),
    "Swish": curve("Swish", alpha=1.7),
}
CASES_OF |= CURVES
CASES_OF |= {
    f"Reduce{name}": reduction(f"Reduce{name}")
    for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
}
CASES_OF |= {
    "ArgMax": arg("ArgMax"),
    "ArgMin": arg("ArgMin"),
    "BitwiseAnd": two("BitwiseAnd", integers),
    "BitwiseNot": lambda random: Case("BitwiseNot", {"a": integers(random, shape_of(random))}),
    "BitwiseOr": two("BitwiseOr", integers),
    "BitwiseXor": two("BitwiseXor", integers),
    "CastLike": cast_like,
    "Clip": clip,
    "Constant": constant_node,
    "CumSum": cumulative,
    "Dropout": dropout,
    "Einsum": einsum,
    "EyeLike": eye_like,
    "Flatten": flatten,
    "GatherElements": gather_elements,
    "GatherND": gather_nd_tensors,
    "IsInf": infinite,
    "LogSoftmax": flat_softmax("LogSoftmax"),
    "Mean": of_all("Mean"),
    "Mod": modulo,
    "OneHot": one_hot,
    "Pad": pad,
    "RMSNormalization": rms_norm,
    "RotaryEmbedding": rotary,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
    "Softmax": flat_softmax("Softmax"),
    "Size": one("Size"),
    "Split": older_split,
    "Squeeze": older(squeeze, 13),
    "Sum": of_all("Sum"),
    "Tile": tile,
    "TopK": top_k,
    "Trilu": triangle,
    "Unsqueeze": older(unsqueeze, 13),
    "Xor": two("Xor", booleans),
}
# ONNX's evaluator takes no such operators of before opset 13, and not all legal inputs of these.
BY_ONNXRUNTIME = {"GatherElements", "Pad"}
# These take formulas, sequences or a cache: see the tests below and tests/tvm_frontend/test_family.py.
ELSEWHERE = {"If", "NonZero", "TensorScatter"} | {
    name for name in CONVERTERS if "Sequence" in name and name not in CASES_OF
}
# What asks for sizes when it is converted.
SIZED = [
    "Add",
    "ArgMax",
    "Concat",
    "CumSum",
    "Einsum",
    "Expand",
    "EyeLike",
    "Flatten",
    "Gather",
    "GatherElements",
    "GatherND",
    "Gemm",
    "LayerNormalization",
    "LogSoftmax",
    "MatMul",
    "OneHot",
    "Pad",
    "RMSNormalization",
    "ReduceMean",
    "ReduceLogSumExp",
    "Reshape",
    "RotaryEmbedding",
    "ScatterElements",
    "ScatterND",
    "Slice",
    "Softmax",
    "Split",
    "Squeeze",
    "Tile",
    "TopK",
    "Transpose",
    "Trilu",
    "Unsqueeze",
    "Where",
]
# What an importer that refuses everything would pass: of an operator's cases with symbols, at least so many are taken.
LEAST_TAKEN = {"GatherND": 1, "Reshape": 1, "RotaryEmbedding": 0, "ScatterND": 0, "Slice": 3, "Split": 2}


def model_of(cases: list[Case], *, symbols: bool = False) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """One file with a node for each case, and what to feed it; symbols: sizes of inputs above 1 have but names."""
    nodes, inputs, weights, outputs, feeds = [], [], [], [], {}
    for number, case in enumerate(cases):
        for name, array in case.inputs.items():
            feeds[f"{name}{number}"] = array
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            shape = [f"n{size}" if symbols and size > 1 else size for size in array.shape]
            inputs.append(helper.make_tensor_value_info(f"{name}{number}", kind, shape))
        weights += [
            numpy_helper.from_array(np.asarray(array), f"{name}{number}") for name, array in case.constants.items()
        ]
        produced = [f"y{number}_{index}" for index in range(case.outputs)]
        names = case.names or (*case.inputs, *case.constants)
        used = [name and f"{name}{number}" for name in names]
        nodes.append(helper.make_node(case.op, used, produced, name=f"node{number}", **case.attributes))
        outputs += [helper.make_empty_tensor_value_info(name) for name in produced]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", cases[0].opset)], ir_version=10), feeds


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
        if f"node {node!r}" not in str(error) or "TVM" in str(error):
            raise
        return False
    return True


def judged(proto: onnx.ModelProto, feeds: dict[str, np.ndarray], *, by_onnxruntime: bool) -> list[np.ndarray]:
    if not by_onnxruntime:
        return ReferenceEvaluator(proto).run(None, feeds)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def compare(proto: onnx.ModelProto, feeds: dict[str, np.ndarray], cases: list[Case]) -> None:
    expected = judged(proto, feeds, by_onnxruntime=cases[0].opset < 13 or cases[0].op in BY_ONNXRUNTIME)
    owners: Iterator[Case] = (case for case in cases for _ in range(case.outputs))
    for found, wanted, case in zip(run(proto, feeds), expected, owners, strict=True):
        assert (found.shape, found.dtype) == (np.shape(wanted), np.asarray(wanted).dtype), case
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-6, err_msg=str(case))


def test_every_operator_is_tried() -> None:
    judged_by_onnxruntime = contrib.CONVERTERS.keys() | quantized.CONVERTERS.keys()  # beside this file
    assert CASES_OF.keys() | ELSEWHERE == CONVERTERS.keys() - judged_by_onnxruntime


def compare_by_opset(cases: list[Case], *, symbols: bool = False) -> None:
    for opset in {case.opset for case in cases}:
        of_one = [case for case in cases if case.opset == opset]
        compare(*model_of(of_one, symbols=symbols), of_one)


@pytest.mark.parametrize("op", CASES_OF)
def test_an_operator_gives_the_references_values(op: str) -> None:
    random = np.random.default_rng([list(CASES_OF).index(op), 22])
    compare_by_opset([CASES_OF[op](random) for _ in range(CASES)])


@pytest.mark.slow
@pytest.mark.parametrize("op", SIZED)
def test_an_operator_gives_the_references_values_for_sizes_without_numbers_or_is_refused(op: str) -> None:
    random = np.random.default_rng([list(CASES_OF).index(op), 23])
    cases = [CASES_OF[op](random) for _ in range(SYMBOLIC)]
    cases = [case for case in cases if is_read(model_of([case], symbols=True)[0], "node0")]
    assert len(cases) >= LEAST_TAKEN.get(op, SYMBOLIC)
    compare_by_opset(cases, symbols=True)


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
    "in one row by its axis": ("Flatten", ["f"], {"axis": 0}),
    "the same, as another type": ("Cast", ["f"], {"to": TensorProto.DOUBLE}),
    "every other column, backwards": ("Slice", ["f", "minus_one_list", "least", "axis_one", "minus_two"], {}),
    "tiled": ("Tile", ["f", "twos"], {}),
    "padded": ("Pad", ["f", "widths"], {}),
    "padded by what is at the edge": ("Pad", ["f", "widths"], {"mode": "edge"}),
    "elements of each row": ("GatherElements", ["f", "nothing"], {"axis": 1}),
    "the number of elements": ("Size", ["f"], {}),
    "the product of sizes": ("ReduceProd", ["s"], {"keepdims": 0}),
    "the largest size": ("ReduceMax", ["s"], {}),
    "the negative": ("Neg", ["f"], {}),
    "without a sign": ("Abs", ["f"], {}),
    "the remainder": ("Mod", ["f", "three"], {}),
    "limited": ("Clip", ["f", "minus_three", "three"], {}),
    "summed up": ("Sum", ["f", "three", "f"], {}),
    "different": ("Xor", ["c", "c2"], {}),
    "sums of unequal numbers": ("CumSum", ["f", "plus_one"], {}),
    "the largest of a row": ("ReduceMax", ["f", "axis_one"], {}),
    "counted down": ("Range", ["n1", "zero_scalar", "minus_one"], {}),
    "a square's diagonal": ("EyeLike", ["f"], {"k": 1}),
    "places of what is not 0": ("NonZero", ["both_ends"], {}),
}
NUMBERS = {
    "minus_one": -1, "plus_one": 1, "both_ends": [-1, 0], "one": [1], "zero": [0],
    "large": [2**63 - 1], "minus_one_list": [-1], "minus_two": [-2], "three_one_one": [3, 1, 1], "three": 3,
    "minus_three": -3, "seven": 7, "ten": 10, "two": 2, "axis_one": [1], "axis_zero": [0], "zero_scalar": 0,
    "least": [-(2**63) + 1], "twos": [2, 3], "widths": [1, 0, 2, 1],
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
    ("Sub", ["ones", "ones"], "nothing", {}),
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
    assert names == list(FORMULAS)
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
