"""Converts elementwise operators, on tensors or on values that follow from shapes alone."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import onnx
import tvm
from tvm import relax, tirx
from tvm.relax import op

from tvm_frontend.frontends.onnx.operators.context import Converter, Reading, Value, given, held_as
from tvm_frontend.frontends.onnx.operators.masks import hidden_later
from tvm_frontend.frontends.onnx.operators.shapes import expanded
from tvm_frontend.frontends.onnx.operators.symbolic import Indexed, analyzer_of, constant, expression

Unary = Callable[[relax.Expr], relax.Expr]


@dataclass(frozen=True)
class Elementwise:
    """Converts an operator on tensors, or on elements that are expressions; dtype: the result's, if not the inputs'."""

    on_tensors: Callable[..., relax.Expr]
    on_elements: Callable[..., Any] | None = None
    dtype: str | None = None

    def __call__(self, reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
        found = reading.indexed(*node.input)
        if found is None or self.on_elements is None:
            reading.broadcast(*map(reading.shape, node.input))
            return self.on_tensors(*map(reading.tensor, node.input))
        return _on_each(reading, self.on_elements, found, self.dtype or found[0].dtype)


@dataclass(frozen=True)
class Curve:
    """Converts a function of one number. of_number: the function itself, where only a constant is to be computed.

    steps: computes it on tensors, given a function that binds each step.
    """

    steps: Callable[[Unary, relax.Expr, dict[str, Any]], relax.Expr]
    of_number: Callable[[float], float] | None = None

    def __call__(self, reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
        found = reading.indexed(node.input[0])
        if found and self.of_number and not found[0].shape:
            element = found[0].element()
            if isinstance(element, tirx.FloatImm):
                number: Any = np.array(element.value, found[0].dtype)[()]
                return constant(np.array(self.of_number(number), found[0].dtype))
        return self.steps(reading.emit, reading.tensor(node.input[0]), attributes)


def _on_each(reading: Reading, function: Callable[..., Any], inputs: list[Indexed], dtype: str) -> Indexed:
    shape = reading.broadcast(*(each.shape for each in inputs))
    inputs = [expanded(each, shape) for each in inputs]
    return Indexed(shape, dtype, lambda *index: function(*(each.element(*index) for each in inputs)))


def _add(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    for scores, mask in (node.input, node.input[::-1]):
        if (found := reading.indexed(mask)) and not reading.indexed(scores):
            hidden = hidden_later(reading, reading.tensor(scores), found[0])
            if hidden is not None:
                return hidden
    return ADD(reading, node, attributes)


def _where(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    if found := reading.indexed(*node.input):
        return _on_each(reading, _select, found, found[1].dtype)
    reading.broadcast(*map(reading.shape, node.input))
    condition, chosen, other = node.input
    nothing = constant(np.float32(0))  # choosing between scores and a number equals adding a mask of 0 and the number
    for scores, fill in ((chosen, other), (other, chosen)):
        found = reading.indexed(condition, fill)
        if found and not reading.indexed(scores) and found[1].dtype == reading.dtype(scores) == "float32":
            choices = [found[1], nothing] if fill == chosen else [nothing, found[1]]
            mask = _on_each(reading, _select, [found[0], *choices], "float32")
            hidden = hidden_later(reading, reading.tensor(scores), mask, chosen=True)
            if hidden is not None:
                return hidden
    return op.where(*map(reading.tensor, node.input))


def _select(condition: tvm.ir.Expr, chosen: tvm.ir.Expr, other: tvm.ir.Expr) -> tvm.ir.Expr:
    known = analyzer_of(condition).simplify(condition)
    if isinstance(known, tirx.IntImm):
        return chosen if known.value else other
    return tirx.Select(condition, chosen, other)


def _divide(x: Any, y: Any) -> Any:
    if not str(x.ty.dtype).startswith("int"):
        return x / y
    analyzer = analyzer_of(x, y)
    if analyzer.can_prove(x >= 0) and analyzer.can_prove(y > 0):
        return tirx.floordiv(x, y)
    return tirx.truncdiv(x, y)


def _mod(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Convert the remainder: with the sign of the divisor or, where fmod is asked for, of the dividend."""
    truncated = bool(attributes.get("fmod", 0))
    whole = reading.dtype(node.input[0]).startswith("int")
    if not truncated:
        return Elementwise(op.floor_mod, tirx.floormod if whole else None)(reading, node, attributes)
    return Elementwise(op.mod, tirx.truncmod if whole else None)(reading, node, attributes)


def _cast(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    return _as_type(reading, node, held_as(str(onnx.helper.tensor_dtype_to_np_dtype(attributes["to"]))))


def _cast_like(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    return _as_type(reading, node, reading.dtype(node.input[1]))


def _as_type(reading: Reading, node: onnx.NodeProto, dtype: str) -> Value:
    if found := reading.indexed(node.input[0]):
        if found[0].dtype in WHOLE and dtype in WHOLE:  # sizes and positions are far from the largest of 32 bits
            return Indexed(found[0].shape, dtype, found[0].at)
        return _on_each(reading, lambda x: expression(x, "int64" if dtype == "int32" else dtype), found, dtype)
    x = reading.tensor(node.input[0])
    return x if str(x.ty.dtype) == dtype else op.astype(x, dtype)


def _power(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Raise x to the power y; squares and cubes become products, as TVM warns of its pow for negative x."""
    dtype = reading.dtype(node.input[0])
    shape = reading.broadcast(*map(reading.shape, node.input))
    exponent = reading.indexed(node.input[1])
    known = None
    if exponent and len(shape) == len(reading.shape(node.input[0])) and all(size == 1 for size in exponent[0].shape):
        element = exponent[0].element(*(0 for _ in exponent[0].shape))
        known = element.value if isinstance(element, tirx.FloatImm | tirx.IntImm) else None
    x = reading.tensor(node.input[0])
    if known in (2, 3):
        return op.multiply(x, x) if known == 2 else op.multiply(reading.emit(op.multiply(x, x)), x)
    y = reading.tensor(node.input[1])
    if str(y.ty.dtype) != dtype:
        y = reading.emit(op.astype(y, dtype))
    if not dtype.startswith("float"):
        x, y = (reading.emit(op.astype(each, "float64")) for each in (x, y))
        return op.astype(reading.emit(op.power(x, y)), dtype)
    return op.power(x, y)


def _clip(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Limit to bounds, which are inputs or, in opset 6, attributes; with crossed bounds the upper one holds."""
    names = [node.input[0], *(given(node, position) for position in (1, 2))]
    found = reading.indexed(*filter(None, names))
    dtype = reading.dtype(node.input[0])
    limits = [
        reading.values[name] if name else constant(np.array(attributes[key], dtype)) if key in attributes else None
        for name, key in zip(names[1:], ("min", "max"), strict=True)
    ]
    if found:
        (x, *_) = found

        def at(*index: Any) -> Any:
            element = x.element(*index)
            for limit, of_two in zip(limits, (tirx.Max, tirx.Min), strict=True):
                if isinstance(limit, Indexed):
                    element = of_two(element, limit.element(*(0 for _ in limit.shape)))
            return element

        return Indexed(x.shape, x.dtype, at)
    result = reading.tensor(names[0])
    for name, limit, of_two in zip(names[1:], limits, (op.maximum, op.minimum), strict=True):
        if limit is not None:
            bound = reading.tensor(name) if name else relax.const(limit.element().value, dtype)
            result = reading.emit(of_two(result, bound))
    return result


def _is_infinite(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    x = reading.tensor(node.input[0])
    positive, negative = (attributes.get(f"detect_{sign}", 1) for sign in ("positive", "negative"))
    infinite = reading.emit(op.isinf(x))
    if positive and negative:
        return infinite
    nothing = relax.const(0, str(x.ty.dtype))
    if not positive and not negative:
        return op.logical_and(infinite, reading.emit(op.logical_not(infinite)))
    signed = reading.emit((op.greater if positive else op.less)(x, nothing))
    return op.logical_and(infinite, signed)


def _identity(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    return reading.values[node.input[0]]


def _mean(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    reading.broadcast(*map(reading.shape, node.input))
    total = reading.emit(reduce(lambda x, y: reading.emit(op.add(x, y)), map(reading.tensor, node.input)))
    return op.divide(total, relax.const(len(node.input), str(total.ty.dtype)))


def _compared(of_numbers: Callable[..., Any], of_bools: Callable[..., Any]) -> Callable[..., Any]:
    """Compare elements, which TVM's own comparisons take for numbers alone."""
    return lambda x, y: of_bools(x, y) if str(x.ty.dtype) == "bool" else of_numbers(x, y)


def _differ(x: tvm.ir.Expr, y: tvm.ir.Expr) -> tvm.ir.Expr:
    return tirx.Or(tirx.And(x, tirx.Not(y)), tirx.And(y, tirx.Not(x)))


def _of_all(of_two: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda *inputs: reduce(of_two, inputs)


def _number(value: float, like: relax.Expr) -> relax.Expr:
    return relax.const(value, str(like.ty.dtype))


def _simple(function: Callable[[relax.Expr], relax.Expr], of_number: Callable[[Any], Any] | None = None) -> Curve:
    return Curve(lambda emit, x, attributes: function(x), of_number)


def _swish(emit: Unary, x: relax.Expr, attributes: dict[str, Any]) -> relax.Expr:
    alpha = attributes.get("alpha", 1.0)
    inner = x if alpha == 1.0 else emit(op.multiply(x, _number(alpha, x)))
    return op.multiply(x, emit(op.sigmoid(inner)))


def _hard_sigmoid(emit: Unary, x: relax.Expr, attributes: dict[str, Any]) -> relax.Expr:
    alpha, beta = attributes.get("alpha", 0.2), attributes.get("beta", 0.5)
    line = emit(op.add(emit(op.multiply(x, _number(alpha, x))), _number(beta, x)))
    return op.clip(line, 0, 1)


def _hard_swish(emit: Unary, x: relax.Expr, attributes: dict[str, Any]) -> relax.Expr:
    return op.multiply(x, emit(_hard_sigmoid(emit, x, {"alpha": 1 / 6, "beta": 0.5})))


def _elu(emit: Unary, x: relax.Expr, attributes: dict[str, Any]) -> relax.Expr:
    below = emit(op.minimum(x, _number(0, x)))
    curve = emit(op.subtract(emit(op.exp(below)), _number(1, x)))
    return op.add(emit(op.nn.relu(x)), emit(op.multiply(curve, _number(attributes.get("alpha", 1.0), x))))


def _selu(emit: Unary, x: relax.Expr, attributes: dict[str, Any]) -> relax.Expr:
    alpha, gamma = attributes.get("alpha", 1.6732632423543772), attributes.get("gamma", 1.0507009873554805)
    return op.multiply(emit(_elu(emit, x, {"alpha": alpha})), _number(gamma, x))


def _leaky_relu(emit: Unary, x: relax.Expr, attributes: dict[str, Any]) -> relax.Expr:
    below = emit(op.multiply(x, _number(attributes.get("alpha", 0.01), x)))
    return op.where(emit(op.less(x, _number(0, x))), below, x)


def _softplus(emit: Unary, x: relax.Expr, attributes: dict[str, Any]) -> relax.Expr:
    """Compute log(1 + eˣ), as max(x, 0) + log(1 + e^-|x|), which no large x can overflow."""
    small = emit(op.exp(emit(op.negative(emit(op.abs(x))))))
    return op.add(emit(op.nn.relu(x)), emit(op.log(emit(op.add(small, _number(1, x))))))


def _mish(emit: Unary, x: relax.Expr, attributes: dict[str, Any]) -> relax.Expr:
    return op.multiply(x, emit(op.tanh(emit(_softplus(emit, x, attributes)))))


def _softsign(emit: Unary, x: relax.Expr, attributes: dict[str, Any]) -> relax.Expr:
    return op.divide(x, emit(op.add(emit(op.abs(x)), _number(1, x))))


def _reciprocal(emit: Unary, x: relax.Expr, attributes: dict[str, Any]) -> relax.Expr:
    return op.divide(_number(1, x), x)


WHOLE = ("int64", "int32")
ADD = Elementwise(op.add, lambda x, y: x + y)
CONVERTERS: dict[str, Converter] = {
    "Abs": Elementwise(op.abs, lambda x: tirx.Select(x < 0, -x, x)),
    "Add": _add,
    "And": Elementwise(op.logical_and, tirx.And),
    "BitwiseAnd": Elementwise(op.bitwise_and),
    "BitwiseNot": Elementwise(op.bitwise_not),
    "BitwiseOr": Elementwise(op.bitwise_or),
    "BitwiseXor": Elementwise(op.bitwise_xor),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": _simple(op.ceil, np.ceil),
    "Clip": _clip,
    "Cos": _simple(op.cos, np.cos),
    "Div": Elementwise(op.divide, _divide),
    "Elu": Curve(_elu),
    "Equal": Elementwise(op.equal, _compared(tirx.EQ, lambda x, y: tirx.Not(_differ(x, y))), "bool"),
    "Erf": _simple(op.erf),
    "Exp": _simple(op.exp, np.exp),
    "Floor": _simple(op.floor, np.floor),
    "Greater": Elementwise(op.greater, tirx.GT, "bool"),
    "GreaterOrEqual": Elementwise(op.greater_equal, tirx.GE, "bool"),
    "HardSigmoid": Curve(_hard_sigmoid),
    "HardSwish": Curve(_hard_swish),
    "Identity": _identity,
    "IsInf": _is_infinite,
    "IsNaN": _simple(op.isnan),
    "LeakyRelu": Curve(_leaky_relu),
    "Less": Elementwise(op.less, tirx.LT, "bool"),
    "LessOrEqual": Elementwise(op.less_equal, tirx.LE, "bool"),
    "Log": _simple(op.log, np.log),
    "Max": Elementwise(_of_all(op.maximum), _of_all(tirx.Max)),
    "Mean": _mean,
    "Min": Elementwise(_of_all(op.minimum), _of_all(tirx.Min)),
    "Mish": Curve(_mish),
    "Mod": _mod,
    "Mul": Elementwise(op.multiply, lambda x, y: x * y),
    "Neg": Elementwise(op.negative, lambda x: -x),
    "Not": Elementwise(op.logical_not, tirx.Not),
    "Or": Elementwise(op.logical_or, tirx.Or),
    "Pow": _power,
    "Reciprocal": Curve(_reciprocal, lambda x: 1 / x),
    "Relu": _simple(op.nn.relu),
    "Round": _simple(op.round, np.round),
    "Selu": Curve(_selu),
    "Sigmoid": _simple(op.sigmoid),
    "Sign": _simple(op.sign, np.sign),
    "Sin": _simple(op.sin, np.sin),
    "Softplus": Curve(_softplus),
    "Softsign": Curve(_softsign),
    "Sqrt": _simple(op.sqrt, np.sqrt),
    "Sub": Elementwise(op.subtract, lambda x, y: x - y),
    "Sum": Elementwise(_of_all(op.add), _of_all(lambda x, y: x + y)),
    "Swish": Curve(_swish),
    "Tanh": _simple(op.tanh),
    "Where": _where,
    "Xor": Elementwise(op.logical_xor, _differ),
}
