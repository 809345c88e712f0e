"""Holds the graph while it is being read: the value of each name in the ONNX file."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
import tvm
from tvm import relax, te
from tvm.relax import op

from gpt.cli import UserError
from tvm_frontend.frontends.onnx.operators.symbolic import (
    FEW,
    Indexed,
    band,
    constant,
    depends_on,
    elements,
    equal,
    expression,
    is_number,
    is_one,
    position_symbols,
    said,
    settled,
    simplified,
    sizes_in,
    smallest_of,
    written,
)
from tvm_frontend.graph import ENTRY

Value: TypeAlias = relax.Expr | Indexed


class Unequal(UserError):
    """Says that two sizes differ which must be equal."""


class Learnt(Exception):
    """Says that a size of an input must be that of an expression of others, or at most a number.

    The file is read again with it.
    """

    def __init__(self, symbol: tvm.tirx.Var, value: Any = None, most: int = 0) -> None:
        super().__init__(f"{symbol} = {value}" if most == 0 else f"{symbol} <= {most}")
        self.symbol, self.value, self.most = symbol, value, most


@dataclass
class Reading:
    """Holds the weights, and the value of each ONNX name read so far.

    opset: of ONNX's own operators. sizes: the symbols of the inputs' dimensions, in the order of their inputs.
    limits: the most that a size may be, as its formula is written, without reading behind the end of a weight.
    sequences: the values of each name that is a sequence of tensors. convert: converts a node of a subgraph.
    """

    opset: int = 0
    sizes: list[tvm.tirx.Var] = field(default_factory=list)
    builder: relax.BlockBuilder = field(default_factory=relax.BlockBuilder)
    limits: dict[str, int] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    sequences: dict[str, list[Value]] = field(default_factory=dict)
    convert: Callable[[onnx.NodeProto], None] = lambda node: None
    _computed: dict[str, relax.Expr] = field(default_factory=dict)

    @contextmanager
    def function(self, inputs: int) -> Iterator[None]:
        """Build the function `forward` within the block, which has that many inputs before its weights.

        An error in the block ends the function too, as TVM prints a warning of each that is left open.
        """
        with self.builder.function(ENTRY, attrs={"num_input": inputs}):
            try:
                yield
            except BaseException:
                self.builder._end_block()
                raise

    def add_constant(self, name: str, array: np.ndarray) -> None:
        """Give a name the value of an array in the file: a formula of few integers, of one number, or of a mask.

        Others are weights.
        """
        few = array.size <= FEW and (np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_)
        if (formula := band(array)) is not None:
            self.values[name] = formula
        elif array.size == 1 or (few and array.size):
            self.values[name] = constant(array)
        elif array.size:
            self.add_weight(name, array)
        else:
            self.values[name] = Indexed(list(array.shape), str(array.dtype), lambda *_: 0)

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

    def numbers(self, name: str) -> list[int]:
        """List the elements of a value that holds numbers alone. Raises UserError for another."""
        found = self.integers(name)
        if not all(map(is_number, found)):
            raise UserError(f"{name!r} is {found}, where numbers, known while compiling, are needed")
        return [int(each) for each in found]

    def shape(self, name: str) -> list:
        value = self.values[name]
        return list(value.shape if isinstance(value, Indexed) else value.ty.shape.values)

    def dtype(self, name: str) -> str:
        value = self.values[name]
        return value.dtype if isinstance(value, Indexed) else str(value.ty.dtype)

    def same_size(self, left: Any, right: Any) -> Any:
        """Give the size that two sizes both are.

        Where they are not known to be equal but must be, one symbol of an input's dimension follows from the others:
        raises Learnt, upon which the file is read again. Raises Unequal if they cannot be equal, and UserError if no
        size of an input follows.
        """
        if equal(left, right):
            return left if is_number(left) or not is_number(right) else right
        difference = simplified(left - right)
        if is_number(difference):
            raise Unequal(f"sizes {said(left)} and {said(right)} differ")
        bare = [each for each in (left, right) if isinstance(each, tvm.tirx.Var)]
        own = [symbol for symbol in reversed(self.sizes) if any(symbol.same_as(each) for each in sizes_in(difference))]
        own.sort(key=lambda symbol: not any(symbol.same_as(each) for each in bare))
        for symbol in own:
            linear = tvm.sym.detect_linear_equation(difference, [symbol])
            factor = int(linear[0]) if len(linear) == 2 and is_number(linear[0]) else 0
            if factor and (is_number(linear[1]) or abs(factor) == 1):
                solved = simplified(-linear[1] // factor if abs(factor) != 1 else -linear[1] * factor)
                if is_number(solved) and (solved < 1 or solved * factor != -linear[1]):
                    raise Unequal(
                        f"sizes {said(left)} and {said(right)} would be equal for {said(symbol)} = {solved} only"
                    )
                raise Learnt(symbol, solved)
        for symbol, most in (*smallest_of(left), *smallest_of(right)):
            self.limit(symbol, most)
            raise Learnt(symbol, most=most)
        raise UserError(f"sizes {said(left)} and {said(right)}: whether they are equal is only known when it runs")

    def limit(self, size: Any, most: Any) -> None:
        """Note the most that a size of the inputs, a symbol or a sum of them, may be."""
        if not is_number(size) and is_number(most) and (key := written(size)):
            self.limits[key] = min(int(most), self.limits.get(key, int(most)))

    def broadcast(self, *shapes: list[Any]) -> list[Any]:
        """Give the shape that several broadcast to. Sizes that are not known to be 1 must be equal: see same_size."""
        rank = max(map(len, shapes))
        padded = [[1] * (rank - len(shape)) + list(shape) for shape in shapes]
        result = []
        for dims in zip(*padded, strict=True):
            kept = [dim for dim in dims if not is_one(dim)]
            size = kept[0] if kept else 1
            for dim in kept[1:]:
                size = self.same_size(size, dim)
            result.append(size)
        return result

    def bound(self, value: Any, name: str = "") -> Value:
        """Bind a result of a converter to a variable of a name; let the elements of a formula be computed once.

        Raises UserError for a tensor whose shape is only known when it runs.
        """
        if isinstance(value, Indexed):
            return settled(value)
        if not isinstance(value, relax.Var | tvm.ir.GenericConst):
            value = self.builder.emit(value, name_hint=name)
        if not isinstance(value.ty, relax.TensorType) or not isinstance(value.ty.shape, relax.ShapeExpr):
            raise UserError("the shape of the result is only known when it runs")
        return value

    def emit(self, expr: relax.Expr) -> relax.Expr:
        """Bind the expression to a variable, unless it is one or is a constant."""
        return expr if isinstance(expr, relax.Var | tvm.ir.GenericConst) else self.builder.emit(expr)


Converter = Callable[[Reading, onnx.NodeProto, dict[str, Any]], Value | tuple[Value, ...]]


def given(node: onnx.NodeProto, position: int) -> str:
    """Name the input at a position, or give "" where it is left out."""
    return node.input[position] if len(node.input) > position else ""


def axes_of(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> list[int] | None:
    """List the axes of a node, which are its second input or, in older opsets, an attribute; None without either."""
    if name := given(node, 1):
        return reading.numbers(name)
    return list(attributes["axes"]) if "axes" in attributes else None


def axis_in(axis: int, rank: int) -> int:
    """Count an axis from the front. Raises UserError for one that is not there."""
    if not -rank <= axis < max(rank, 1):
        raise UserError(f"axis {axis} of {rank} dimensions")
    return axis % max(rank, 1)


def held_as(dtype: str) -> str:
    """Give the dtype in which values of another are held: 16-bit floats in float32."""
    return "float32" if dtype in ("bfloat16", "float16") else dtype


def known(size: Any, what: str) -> int:
    """Give a size that must be a number. Raises UserError for a symbol."""
    if not is_number(size):
        raise UserError(f"{what}, {said(size)}, is not supported, only a number")
    return int(size)


def refuse_unless(attributes: dict[str, Any], **expected: Any) -> None:
    """Raise UserError if an attribute is present with a value other than the one that is supported."""
    for name, value in expected.items():
        found = attributes.get(name, value)
        if found != value:
            raise UserError(f"attribute {name}={found!r} is not supported, only {value!r}")


def computed(reading: Reading, value: Indexed) -> relax.Expr:
    """Compute a tensor of the value: a constant, a range, or a kernel that computes each element."""
    if value.dtype == "int32":  # whose elements are counted in int64
        whole = computed(reading, Indexed(value.shape, "int64", value.at))
        if isinstance(whole, tvm.ir.GenericConst):
            return relax.const(whole.value.numpy().astype("int32"), "int32")
        return op.astype(reading.emit(whole), "int32")
    known = all(map(is_number, value.shape))
    shape = [int(dim) for dim in value.shape] if known else []
    if known and np.prod(shape, dtype=int) <= FEW:
        found = [getattr(element, "value", element) for element in elements(value)]
        if not any(isinstance(element, tvm.ir.Expr) for element in found):
            return relax.const(np.array(found, value.dtype).reshape(shape), value.dtype)
    positions, analyzer = position_symbols(value.shape)
    element = analyzer.simplify(expression(value.at(*positions), value.dtype))
    if isinstance(element, tvm.tirx.IntImm | tvm.tirx.FloatImm) and known:
        return relax.const(np.full(shape, element.value, value.dtype), value.dtype)
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
