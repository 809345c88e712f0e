"""What follows from shapes alone: formulas over sizes and places, computed only where a tensor is needed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm

LARGE = 2**40  # more positions than any tensor has


@dataclass(frozen=True)
class Indexed:
    """What follows from shapes alone, as positions and masks do: the element at an index is an expression.

    Nothing of it is computed while it only makes other shapes or other such values. shape: numbers and symbols.
    at: the element, given one number or expression for each dimension.
    """

    shape: list[Any]
    dtype: str
    at: Callable[..., Any]


def constant(array: np.ndarray | np.generic) -> Indexed:
    """A list or one number from the file."""
    return listed(array.ravel().tolist(), array.shape == (), str(array.dtype))


def listed(values: list[Any], scalar: bool = False, dtype: str = "int64") -> Indexed:
    """A list of numbers and symbols, or (scalar) the one in it."""

    def at(*index: Any) -> Any:
        if scalar or len(values) == 1:
            return values[0]
        if is_number(index[0]):
            return values[int(index[0])]
        picked = values[-1]
        for place in range(len(values) - 2, -1, -1):
            here = tvm.tirx.EQ(index[0], tvm.tirx.const(place, "int64"))
            picked = tvm.tirx.Select(here, expression(values[place], dtype), expression(picked, dtype))
        return picked

    return Indexed([] if scalar else [len(values)], dtype, at)


def elements(value: Indexed) -> list[Any]:
    """The elements of a value of one known length, or its one."""
    indices = [()] if not value.shape else [(i,) for i in range(int(value.shape[0]))]
    return [simplified(value.at(*index)) for index in indices]


def is_number(value: Any) -> bool:
    return isinstance(value, int | tvm.tirx.IntImm)


def is_one(value: Any) -> bool:
    return is_number(value) and int(value) == 1


def simplified(value: Any) -> Any:
    """A size in its shortest form, one of Python's numbers if it can be."""
    value = tvm.sym.Analyzer().simplify(value) if isinstance(value, tvm.ir.Expr) else value
    return int(value) if is_number(value) else value


def expression(value: Any, dtype: str) -> tvm.ir.Expr:
    """An element as an expression of that type, which plain numbers lack."""
    if isinstance(value, tvm.ir.Expr) and str(value.ty.dtype) == dtype:
        return value
    return tvm.tirx.Cast(dtype, value) if isinstance(value, tvm.ir.Expr) else tvm.tirx.const(value, dtype)


def places_in(shape: list[Any]) -> tuple[list[Any], tvm.sym.Analyzer]:
    """A symbol for the place in each dimension, 0 where it has one only, and an analyzer that knows their range."""
    analyzer = tvm.sym.Analyzer()
    places = [0 if is_one(dim) else tvm.tirx.Var(f"i{axis}", "int64") for axis, dim in enumerate(shape)]
    for place in places:
        if not is_number(place):
            analyzer.bind(place, tvm.ir.Range(0, LARGE))
    return places, analyzer


def depends_on(element: tvm.ir.Expr, places: list[Any]) -> bool:
    """Whether an element differs from place to place."""
    used = tvm.tirx.analysis.undefined_vars(element, [])
    return any(variable.same_as(place) for variable in used for place in places)
