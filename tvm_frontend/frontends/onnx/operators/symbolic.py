"""Values that follow from shapes alone: formulas over sizes and positions, computed only where a tensor is needed."""

import re
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import tvm
import tvm_ffi

LARGE = 2**40  # more positions than any tensor has
# The largest that a symbol may be, of the file that is being read.
MOST: ContextVar[tuple[tuple[tvm.tirx.Var, int], ...]] = ContextVar("MOST", default=())
FEW = 64  # elements of a value that is kept as a list


@dataclass(frozen=True)
class Indexed:
    """A value that follows from shapes alone, as positions and masks do: the element at an index is an expression.

    Nothing is computed while it only makes other shapes or other such values. shape: numbers and symbols.
    at: the element, given one number or expression for each dimension.
    """

    shape: list[Any]
    dtype: str
    at: Callable[..., Any]

    def element(self, *index: Any) -> tvm.ir.Expr:
        """Give the element as an expression. Integers of 32 bits are counted in 64, which sizes are made of."""
        return expression(self.at(*index), "int64" if self.dtype == "int32" else self.dtype)


def constant(array: np.ndarray | np.generic) -> Indexed:
    """Make a value of a few numbers from the file."""
    return arranged(array.ravel().tolist(), list(array.shape), str(array.dtype))


def band(array: np.ndarray) -> Indexed | None:
    """Give the formula of an array [.., N, N] of one number in a band along the diagonal and another elsewhere.

    GPTs keep masks so, for the longest sequence, and slice them: the causal one, whose band has no end below, and those
    of windows. As a formula the former can be proven to be causal. None for an array of another kind.
    """
    rows = array.shape[-1] if array.ndim > 1 else 1
    if rows < 2 or array.shape[-2] != rows or array.size != rows * rows:
        return None
    square = array.reshape(rows, rows)
    if square[0, 0] != square[-1, -1] or not np.array_equal(square[1:, 1:], square[:-1, :-1]):
        return None
    by_distance = np.concatenate([square[0, :0:-1], square[:, 0]])  # of the query from the key, from 1 - N to N - 1
    inside = np.flatnonzero(by_distance == square[0, 0])
    outside = np.unique(by_distance[by_distance != square[0, 0]])
    first, last = inside[0] - rows + 1, inside[-1] - rows + 1
    if len(outside) != 1 or last - first + 1 != len(inside):
        return None
    dtype = str(array.dtype)
    counted = "int64" if dtype == "int32" else dtype

    def at(*index: Any) -> Any:
        query, key = (expression(position, "int64") for position in index[-2:])
        bounds = [key <= query - int(first)] if first > 1 - rows else []
        bounds += [query - int(last) <= key] if last < rows - 1 else []
        chosen = (tvm.tirx.const(each.item(), counted) for each in (square[0, 0], outside[0]))
        return tvm.tirx.Select(tvm.tirx.all(*bounds), *chosen)

    return Indexed(list(array.shape), dtype, at)


def listed(values: list[Any], scalar: bool = False, dtype: str = "int64") -> Indexed:
    """Make a value of a list of numbers and symbols, or (scalar) of the one in it."""
    return arranged(values, [] if scalar else [len(values)], dtype)


def arranged(values: list[Any], shape: list[int], dtype: str) -> Indexed:
    """Make a value of a list of numbers and symbols, in the order of their positions in a shape."""

    def at(*index: Any) -> Any:
        if len(values) == 1:
            return values[0]
        place = flat(index, shape)
        if is_number(place):
            return values[int(place)]
        picked = values[-1]
        for position in range(len(values) - 2, -1, -1):
            here = tvm.tirx.EQ(place, tvm.tirx.const(position, "int64"))
            picked = tvm.tirx.Select(here, expression(values[position], dtype), expression(picked, dtype))
        return picked

    return Indexed(shape, dtype, at)


def flat(index: Iterable[Any], shape: Iterable[Any]) -> Any:
    """Give the position of an element among all of a shape, counted from 0."""
    place: Any = 0
    for position, size in zip(index, shape, strict=True):
        place = place * size + position
    return simplified(place)


def unflat(place: Any, shape: list[Any]) -> list[Any]:
    """Give the index of the element at a position among all of a shape."""
    index = []
    for axis, size in enumerate(shape):
        behind = prod(shape[axis + 1 :])
        index.append(0 if is_one(size) else simplified(place // behind % size if axis else place // behind))
    return index


def elements(value: Indexed) -> list[Any]:
    """List the elements of a value of known sizes, in the order of their positions."""
    return [simplified(value.at(*index)) for index in np.ndindex(*map(int, value.shape))]


def settled(value: Indexed) -> Indexed:
    """Compute each element once: at once where they are few, else when it is first asked for."""
    if all(map(is_number, value.shape)) and prod(map(int, value.shape)) <= FEW:
        return arranged(elements(value), [int(dim) for dim in value.shape], value.dtype)
    known: dict[tuple[int, ...], tuple[Any, ...]] = {}

    def at(*index: Any) -> Any:
        key = tuple(int(i) if is_number(i) else tvm_ffi.structural_hash(i) for i in index)
        if key not in known:
            known[key] = (simplified(value.at(*index)), index)  # the index is kept, as its symbols are its hash
        return known[key][0]

    return Indexed([simplified(dim) for dim in value.shape], value.dtype, at)


def is_number(value: Any) -> bool:
    return isinstance(value, int | tvm.tirx.IntImm)


def is_one(value: Any) -> bool:
    return is_number(value) and int(value) == 1


def is_zero(value: Any) -> bool:
    return is_number(value) and int(value) == 0


def sizes_in(*values: Any) -> list[tvm.tirx.Var]:
    """List the symbols in expressions, each once."""
    found = [
        each
        for value in values
        if isinstance(value, tvm.ir.Expr)
        for each in tvm.tirx.analysis.undefined_vars(value, [])
    ]
    return [each for place, each in enumerate(found) if not any(each.same_as(other) for other in found[:place])]


def analyzer_of(*values: Any, least: int = 0) -> tvm.sym.Analyzer:
    """Make an analyzer that knows that the symbols in some expressions are sizes and positions: at least 0."""
    analyzer = tvm.sym.Analyzer()
    for symbol in sizes_in(*values):
        if str(symbol.ty.dtype) == "int64":
            most = next((most for other, most in MOST.get() if symbol.same_as(other)), LARGE)
            analyzer.bind(symbol, tvm.ir.Range(least, most + 1))
    return analyzer


def simplified(value: Any) -> Any:
    """Simplify a size or an element, to a Python number if it is an integer."""
    value = analyzer_of(value).simplify(value) if isinstance(value, tvm.ir.Expr) else value
    return int(value) if is_number(value) and not isinstance(value, bool) else value


def written(size: Any) -> str:
    """Write a size that is a symbol, or sums and products of them, as Python would; "" if it is another formula."""
    if is_number(size):
        return str(int(size))
    if isinstance(size, tvm.tirx.Var):
        return str(size.name)
    signs = {tvm.tirx.Add: "+", tvm.tirx.Sub: "-", tvm.tirx.Mul: "*"}
    sign = next((sign for kind, sign in signs.items() if isinstance(size, kind)), "")
    sides = [written(size.a), written(size.b)] if sign else [""]
    sides = [f"({side})" if sign == "*" and " " in side else side for side in sides]
    return f" {sign} ".join(sides) if all(sides) else ""


def said(size: Any) -> str:
    """Write any size for a person to read."""
    return written(size) or re.sub(r"T\.int64\((-?\d+)\)", r"\1", str(size))


def smallest_of(value: Any) -> list[tuple[tvm.tirx.Var, int]]:
    """List the symbols and numbers in an expression of which it takes the smaller one."""
    if isinstance(value, tvm.tirx.Min):
        pairs = [(x, y) for x, y in ((value.a, value.b), (value.b, value.a)) if isinstance(x, tvm.tirx.Var)]
        return [(x, int(y)) for x, y in pairs if is_number(y)]
    return [pair for side in ("a", "b") if hasattr(value, side) for pair in smallest_of(getattr(value, side))]


def equal(left: Any, right: Any) -> bool:
    """Tell if two sizes are provably equal."""
    return bool(analyzer_of(left, right).can_prove_equal(left, right))


def expression(value: Any, dtype: str) -> tvm.ir.Expr:
    """Make an element an expression of that type, which plain numbers lack."""
    if isinstance(value, tvm.ir.Expr) and str(value.ty.dtype) == dtype:
        return value
    if isinstance(value, tvm.tirx.IntImm | tvm.tirx.FloatImm):
        value = value.value
    if isinstance(value, float) and not dtype.startswith(("float", "bfloat")):
        value = bool(value) if dtype == "bool" else int(value)
    return tvm.tirx.Cast(dtype, value) if isinstance(value, tvm.ir.Expr) else tvm.tirx.const(value, dtype)


def position_symbols(shape: list[Any]) -> tuple[list[Any], tvm.sym.Analyzer]:
    """Make a symbol for the position in each dimension, 0 where its size is 1, and an analyzer with their ranges."""
    positions = [0 if is_one(dim) else tvm.tirx.Var(f"i{axis}", "int64") for axis, dim in enumerate(shape)]
    return positions, analyzer_of(*positions, *shape)


def depends_on(element: tvm.ir.Expr, positions: list[Any]) -> bool:
    """Tell if an element differs between positions."""
    used = tvm.tirx.analysis.undefined_vars(element, [])
    return any(variable.same_as(position) for variable in used for position in positions)
