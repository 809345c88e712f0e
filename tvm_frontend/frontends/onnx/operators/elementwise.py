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

from tvm_frontend.frontends.onnx.operators.context import Converter, Reading, Value
from tvm_frontend.frontends.onnx.operators.masks import hidden_later
from tvm_frontend.frontends.onnx.operators.shapes import broadcast, expanded
from tvm_frontend.frontends.onnx.operators.symbolic import Indexed, constant, expression


@dataclass(frozen=True)
class Elementwise:
    """Converts an operator on tensors, or on elements that are expressions; dtype: the result's, if not the inputs'."""

    on_tensors: Callable[..., relax.Expr]
    on_elements: Callable[..., Any] | None = None
    dtype: str | None = None

    def __call__(self, reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
        found = reading.indexed(*node.input)
        if found is None or self.on_elements is None:
            return self.on_tensors(*map(reading.tensor, node.input))
        return _on_each(self.on_elements, found, self.dtype or found[0].dtype)


def _on_each(function: Callable[..., Any], inputs: list[Indexed], dtype: str) -> Indexed:
    shape = broadcast(*(each.shape for each in inputs))
    inputs = [expanded(each, shape) for each in inputs]
    return Indexed(shape, dtype, lambda *index: function(*(expression(each.at(*index), each.dtype) for each in inputs)))


def _add(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    for scores, mask in (node.input, node.input[::-1]):
        if (found := reading.indexed(mask)) and not reading.indexed(scores):
            hidden = hidden_later(reading, reading.tensor(scores), found[0])
            if hidden is not None:
                return hidden
    return ADD(reading, node, attributes)


def _where(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    if found := reading.indexed(*node.input):
        return _on_each(tirx.Select, found, found[1].dtype)
    condition, chosen, other = node.input
    nothing = constant(np.float32(0))  # choosing between scores and a number equals adding a mask of 0 and the number
    for scores, fill in ((chosen, other), (other, chosen)):
        if (found := reading.indexed(condition, fill)) and not reading.indexed(scores):
            choices = [found[1], nothing] if fill == chosen else [nothing, found[1]]
            mask = _on_each(tirx.Select, [found[0], *choices], "float32")
            hidden = hidden_later(reading, reading.tensor(scores), mask, chosen=True)
            if hidden is not None:
                return hidden
    return op.where(*map(reading.tensor, node.input))


def _divide(x: Any, y: Any) -> Any:
    return tirx.truncdiv(x, y) if str(x.ty.dtype).startswith("int") else x / y


def _cast(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    dtype = held_as(str(onnx.helper.tensor_dtype_to_np_dtype(attributes["to"])))
    if found := reading.indexed(node.input[0]):
        return _on_each(lambda x: tirx.Cast(dtype, x), found, dtype)
    x = reading.tensor(node.input[0])
    return x if str(x.ty.dtype) == dtype else op.astype(x, dtype)


def held_as(dtype: str) -> str:
    """Give the dtype in which values of another are held: 16-bit floats in float32."""
    return "float32" if dtype in ("bfloat16", "float16") else dtype


def _power(x: relax.Expr, y: relax.Expr) -> relax.Expr:
    """Raise x to the power y; squares and cubes become products, as TVM warns of its pow for negative x."""
    exponent = y.value.numpy() if isinstance(y, tvm.ir.GenericConst) else np.empty(2)
    if exponent.size == 1 and exponent.item() in (2, 3):
        return op.multiply(x, x) if exponent.item() == 2 else op.multiply(op.multiply(x, x), x)
    return op.power(x, y)


def _of_all(of_two: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda *inputs: reduce(of_two, inputs)


ADD = Elementwise(op.add, lambda x, y: x + y)
CONVERTERS: dict[str, Converter] = {
    "Add": _add,
    "And": Elementwise(op.logical_and, tirx.And),
    "Cast": _cast,
    "Div": Elementwise(op.divide, _divide),
    "Equal": Elementwise(op.equal, tirx.EQ, "bool"),
    "Erf": Elementwise(op.erf),
    "Greater": Elementwise(op.greater, tirx.GT, "bool"),
    "GreaterOrEqual": Elementwise(op.greater_equal, tirx.GE, "bool"),
    "IsNaN": Elementwise(op.isnan),
    "Less": Elementwise(op.less, tirx.LT, "bool"),
    "LessOrEqual": Elementwise(op.less_equal, tirx.LE, "bool"),
    "Max": Elementwise(_of_all(op.maximum), _of_all(tirx.Max)),
    "Min": Elementwise(_of_all(op.minimum), _of_all(tirx.Min)),
    "Mul": Elementwise(op.multiply, lambda x, y: x * y),
    "Not": Elementwise(op.logical_not, tirx.Not),
    "Or": Elementwise(op.logical_or, tirx.Or),
    "Pow": Elementwise(_power),
    "Relu": Elementwise(op.nn.relu),
    "Sigmoid": Elementwise(op.sigmoid),
    "Sub": Elementwise(op.subtract, lambda x, y: x - y),
    "Tanh": Elementwise(op.tanh),
    "Where": _where,
}
