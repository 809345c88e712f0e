"""Holds the graph while it is being read: the value of each name in the ONNX file."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
import tvm
from tvm import relax, te
from tvm.relax import op

from gpt.cli import UserError
from tvm_frontend.frontends.onnx.operators.symbolic import (
    Indexed,
    depends_on,
    elements,
    expression,
    is_number,
    position_symbols,
    simplified,
)

Value: TypeAlias = relax.Expr | Indexed


@dataclass
class Reading:
    """Holds the weights, and the value of each ONNX name read so far."""

    builder: relax.BlockBuilder = field(default_factory=relax.BlockBuilder)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    _computed: dict[str, relax.Expr] = field(default_factory=dict)

    def add_weight(self, name: str, array: np.ndarray) -> relax.Var:
        """Give the parameter of that name; make it if it is not there yet."""
        if name not in self.weights:
            self.weights[name] = array
            self.values[name] = relax.Var(name, relax.TensorType(array.shape, str(array.dtype)))
        return self.values[name]

    def tensor(self, name: str) -> relax.Expr:
        """Give the value as a tensor: one that follows from shapes is computed from here on."""
        value = self.values[name]
        if not isinstance(value, Indexed):
            return value
        if name not in self._computed:
            self._computed[name] = self.emit(computed(self, value))
        return self._computed[name]

    def indexed(self, *names: str) -> list[Indexed] | None:
        """Give the values if each follows from shapes alone, else None."""
        values = [self.values[name] for name in names]
        found = [value for value in values if isinstance(value, Indexed)]
        return found if len(found) == len(values) else None

    def integers(self, name: str) -> list[Any]:
        """List the elements of a value that follows from shapes, one for a scalar. Raises UserError for a tensor."""
        value = self.values[name]
        if not isinstance(value, Indexed) or len(value.shape) > 1 or not all(is_number(dim) for dim in value.shape):
            raise UserError(f"{name!r} is a tensor where a shape, known while compiling, is needed")
        return elements(value)

    def shape(self, name: str) -> list:
        value = self.values[name]
        return list(value.shape if isinstance(value, Indexed) else value.ty.shape.values)

    def emit(self, expr: relax.Expr) -> relax.Expr:
        """Bind the expression to a variable, unless it is one or is a constant."""
        return expr if isinstance(expr, relax.Var | tvm.ir.GenericConst) else self.builder.emit(expr)


Converter = Callable[[Reading, onnx.NodeProto, dict[str, Any]], Value | tuple[Value, ...]]


def refuse_unless(attributes: dict[str, Any], **expected: Any) -> None:
    """Raise UserError if an attribute is present with a value other than the one that is supported."""
    for name, value in expected.items():
        found = attributes.get(name, value)
        if found != value:
            raise UserError(f"attribute {name}={found!r} is not supported, only {value!r}")


def computed(reading: Reading, value: Indexed) -> relax.Expr:
    """Compute a tensor of the value: a constant, a range, or a kernel that computes each element."""
    if any(is_number(dim) and int(dim) == 0 for dim in value.shape) and all(map(is_number, value.shape)):
        return relax.const(np.zeros([int(dim) for dim in value.shape], value.dtype), value.dtype)
    positions, analyzer = position_symbols(value.shape)
    element = analyzer.simplify(expression(value.at(*positions), value.dtype))
    if isinstance(element, tvm.tirx.IntImm | tvm.tirx.FloatImm) and all(map(is_number, value.shape)):
        return relax.const(np.full([int(dim) for dim in value.shape], element.value, value.dtype), value.dtype)
    if value.dtype == "int64":
        first = analyzer.simplify(element - [0, *positions][-1])
        if not depends_on(first, positions):
            return _counted(reading, first, value.shape)
    return _by_kernel(reading, value, element, positions)


def _counted(reading: Reading, first: tvm.ir.Expr, shape: list[Any]) -> relax.Expr:
    """Count first, first + 1, … along the last axis."""
    end = simplified(first + [1, *shape][-1])
    counted = op.arange(*map(relax.prim_value, (first, end, 1)), dtype="int64")
    if len(shape) == 1:
        return counted
    counted = reading.emit(counted)
    return op.broadcast_to(counted, shape) if shape else op.squeeze(counted, [0])


def _by_kernel(reading: Reading, value: Indexed, element: tvm.ir.Expr, positions: list[Any]) -> relax.Expr:
    used = tvm.tirx.analysis.undefined_vars(element, [])
    sizes = [symbol for symbol in used if not any(symbol.same_as(position) for position in positions)]

    def compute(*passed: tvm.tirx.Var) -> te.Tensor:
        def element_at(*index: Any) -> tvm.ir.Expr:
            element = expression(value.at(*(expression(position, "int64") for position in index)), value.dtype)
            for size, given in zip(sizes, passed, strict=True):  # a kernel knows only the sizes of its arguments
                element = tvm.tirx.Let(size, given, element)
            return element

        return te.compute(value.shape, element_at, name="computed")

    return reading.builder.call_te(compute, *sizes, primfunc_name_hint="computed")
