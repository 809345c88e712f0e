"""Values that follow from shapes alone: formulas over sizes and positions, computed only where a tensor is needed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm

LARGE = 2**40  # more positions than any tensor has


@dataclass(frozen=True)
class Indexed:
    """A value that follows from shapes alone, as positions and masks do: the element at an index is an expression.

    Nothing is computed while it only makes other shapes or other such values. shape: numbers and symbols.
    at: the element, given one number or expression for each dimension.
    """

    shape: list[Any]
    dtype: str
    at: Callable[..., Any]


def constant(array: np.ndarray | np.generic) -> Indexed:
    """Make a value of a list, or of one number, from the file."""
    return listed(array.ravel().tolist(), array.shape == (), str(array.dtype))


def listed(values: list[Any], scalar: bool = False, dtype: str = "int64") -> Indexed:
    """Make a value of a list of numbers and symbols, or (scalar) of the one in it."""

    def at(*index: Any) -> Any:
        if scalar or len(values) == 1:
            return values[0]
        if is_number(index[0]):
            return values[int(index[0])]
        picked = values[-1]
        for position in range(len(values) - 2, -1, -1):
            here = tvm.tirx.EQ(index[0], tvm.tirx.const(position, "int64"))
            picked = tvm.tirx.Select(here, expression(values[position], dtype), expression(picked, dtype))
        return picked

    return Indexed([] if scalar else [len(values)], dtype, at)


def elements(value: Indexed) -> list[Any]:
    """List the elements of a value of one known length, or its one."""
    indices = [()] if not value.shape else [(i,) for i in range(int(value.shape[0]))]
    return [simplified(value.at(*index)) for index in indices]


def is_number(value: Any) -> bool:
    return isinstance(value, int | tvm.tirx.IntImm)


def is_one(value: Any) -> bool:
    return is_number(value) and int(value) == 1


def simplified(value: Any) -> Any:
    """Simplify a size, to a Python number if it can be."""
    value = tvm.sym.Analyzer().simplify(value) if isinstance(value, tvm.ir.Expr) else value
    return int(value) if is_number(value) else value


def expression(value: Any, dtype: str) -> tvm.ir.Expr:
    """Make an element an expression of that type, which plain numbers lack."""
    if isinstance(value, tvm.ir.Expr) and str(value.ty.dtype) == dtype:
        return value
    return tvm.tirx.Cast(dtype, value) if isinstance(value, tvm.ir.Expr) else tvm.tirx.const(value, dtype)


def position_symbols(shape: list[Any]) -> tuple[list[Any], tvm.sym.Analyzer]:
    """Make a symbol for the position in each dimension, 0 where its size is 1, and an analyzer with their ranges."""
    analyzer = tvm.sym.Analyzer()
    positions = [0 if is_one(dim) else tvm.tirx.Var(f"i{axis}", "int64") for axis, dim in enumerate(shape)]
    for position in positions:
        if not is_number(position):
            analyzer.bind(position, tvm.ir.Range(0, LARGE))
    return positions, analyzer


def bind_sizes(analyzer: tvm.sym.Analyzer, element: tvm.ir.Expr) -> None:
    """Tell an analyzer that the sizes in an element are not negative; positions are bound before."""
    for variable in tvm.tirx.analysis.undefined_vars(element, []):
        if not analyzer.can_prove(variable >= 0):
            analyzer.bind(variable, tvm.ir.Range(0, LARGE))


def depends_on(element: tvm.ir.Expr, positions: list[Any]) -> bool:
    """Tell if an element differs between positions."""
    used = tvm.tirx.analysis.undefined_vars(element, [])
    return any(variable.same_as(position) for variable in used for position in positions)
