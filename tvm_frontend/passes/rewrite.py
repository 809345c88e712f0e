"""Matches a pattern in the graph and replaces it by a kernel, for every rewrite."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.dpl import DFPattern, is_op, rewrite_call

from tvm_frontend.graph import ENTRY, Graph

Matched = dict[DFPattern, relax.Expr]
NARROW = ("bfloat16", "float16")
OPAQUE = 8  # kOpaque of TVM's relax/op_attr_types.h: TVM does not fuse it with others

# Operators that `Rewriting.number` computes of numbers.
FOLDED: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "astype": np.float64,
    "divide": np.divide,
    "multiply": np.multiply,
    "negative": np.negative,
    "reshape": np.float64,
    "sqrt": np.sqrt,
    "subtract": np.subtract,
}


class Rewriting:
    """Holds a graph while it is being rewritten: its weights may be read and new weights and kernels added."""

    def __init__(self, graph: Graph) -> None:
        self.builder = relax.BlockBuilder(graph.module.clone())  # which it would change
        self.function = graph.module[ENTRY]
        self.inputs = list(self.function.params[: int(self.function.attrs["num_input"])])
        self.weights = dict(graph.weights)
        self._bound: dict[relax.Var, relax.Expr] = {}
        self._read_by: dict[relax.Var, list[relax.Expr]] = {}
        self.variables = dict(zip(graph.weights, self.function.params[len(self.inputs) :], strict=True))

    def weight(self, expr: relax.Expr) -> np.ndarray | None:
        """Give the array of `expr` if it is one of the weights, else None."""
        return next((self.weights[name] for name, var in self.variables.items() if var.same_as(expr)), None)

    def name(self, expr: relax.Expr) -> str:
        """Give the name of the weight that `expr` is."""
        return next(name for name, var in self.variables.items() if var.same_as(expr))

    def is_input(self, expr: relax.Expr) -> bool:
        """Tell if `expr` is an input of the function, which a weight is not."""
        return any(expr.same_as(var) for var in self.inputs)

    def is_input_used_once(self, expr: relax.Expr) -> bool:
        """Tell if `expr` is an input of the function that one operation reads, so that it may be written to."""
        if not self.is_input(expr):
            return False
        readers = self._readers(expr)
        return len(readers) == 1 and not readers[0].same_as(self.function.body.body)

    def change_input(self, var: relax.Var, type_: relax.TensorType) -> relax.Var:
        """Replace an input by one of another type, which all readers of `var` must be rewritten to read."""
        changed = relax.Var(var.name, type_)
        self.inputs = [changed if each.same_as(var) else each for each in self.inputs]
        return changed

    def value(self, expr: relax.Expr) -> relax.Expr:
        """Give the value that a variable is bound to; a parameter, or another expression, as it is."""
        return self._bound.get(expr, expr) if isinstance(expr, relax.Var) else expr

    def value_read_once(self, expr: relax.Expr) -> relax.Expr | None:
        """Give the value that a variable is bound to if one operation alone reads it, else None."""
        return self.value(expr) if isinstance(expr, relax.Var) and len(self._readers(expr)) == 1 else None

    def number(self, expr: relax.Expr) -> float | None:
        """Give the number that a constant of one element is, or that is computed from such; None for other values.

        TorchScript computes the scale of attention so, from the shape of the keys.
        """
        value = self.value(expr)
        if not isinstance(value, relax.Call):
            return number_of(value)
        compute = next((function for name, function in FOLDED.items() if calls(value, name)), None)
        numbers = [self.number(each) for each in value.args if isinstance(each.ty, relax.TensorType)]
        if compute is None or None in numbers or not str(value.ty.dtype).startswith("float"):
            return None
        with np.errstate(all="ignore"):
            return float(compute(*numbers))

    def add_weight(self, name: str, value: Callable[[], np.ndarray]) -> relax.Var:
        """Give the parameter of that name; make it from `value()` if it is not there yet."""
        if name not in self.weights:
            array = value()
            self.weights[name] = array
            self.variables[name] = relax.Var(name, relax.TensorType(array.shape, str(array.dtype)))
        return self.variables[name]

    def is_narrowed(self, call: relax.Expr) -> bool:
        """Tell if every reader of a call's result casts it to 16 bits."""
        var = next((var for var, value in self._bound.items() if value.same_as(call)), None)
        readers = [] if var is None else self._readers(var)
        casts = [str(reader.ty.dtype) in NARROW for reader in readers if calls(reader, "astype")]
        return bool(readers) and len(casts) == len(readers) and all(casts)

    def call(self, name: str, kernel: tvm.tirx.PrimFunc, arguments: list[relax.Expr], like: relax.Expr) -> relax.Expr:
        """Call `kernel`, which gives [B, T, C], in the place of `like` [.., C]; equal kernels are kept once.

        Arguments and results of another type than the kernel's are cast, and those [.., C] that it takes as [B, T, C]
        are reshaped.
        """
        *taken, given = _dtypes(kernel)
        function = self.builder.add_func(with_root(kernel), name)
        shape = list(like.ty.shape.values)
        type_ = relax.TensorType(_rows(shape), given)
        ranks = [len(param.ty.shape) for param in kernel.params]
        arguments = [
            each if len(argument.ty.shape.values) == rank else relax.op.reshape(each, _rows(argument.ty.shape.values))
            for argument, each, rank in zip(arguments, _cast_all(arguments, taken), ranks, strict=False)
        ]
        result = relax.call_tir(function, arguments, out_ty=type_)
        result = result if len(shape) == 3 else relax.op.reshape(result, shape)
        return _cast(result, given, str(like.ty.dtype))

    def call_in_place(
        self,
        name: str,
        kernel: tvm.tirx.PrimFunc,
        arguments: list[relax.Expr],
        written: list[relax.Expr],
        like: relax.Expr,
    ) -> relax.Expr:
        """Do as `call` for a kernel that also writes to the tensors `written`, its last arguments but the output."""
        *taken, given = _dtypes(kernel)
        indices = [-1, *range(len(arguments), len(arguments) + len(written))]
        types = [relax.TensorType(like.ty.shape, given), *(tensor.ty for tensor in written)]
        function = self.builder.add_func(with_root(kernel), name)
        arguments = _cast_all(arguments, taken[: len(arguments)])
        results = relax.op.call_tir_inplace(function, [*arguments, *written], indices, types)
        return _cast(relax.TupleGetItem(results, 0), given, str(like.ty.dtype))

    def apply(self, pattern: DFPattern, rewriter: Callable[[relax.Expr, Matched], relax.Expr | None]) -> None:
        """Replace each match by what `rewriter` returns; None leaves it as it is."""

        def replace(call: relax.Expr, matched: Matched) -> relax.Expr:
            replacement = rewriter(call, matched)
            return call if replacement is None else replacement

        self._bound = {binding.var: binding.value for block in self.function.body.blocks for binding in block.bindings}
        self._read_by = {}
        self.function = rewrite_call(pattern, replace, self.function)

    def _readers(self, var: relax.Var) -> list[relax.Expr]:
        """List the bound values, and the function's result, that read a variable."""
        if not self._read_by:  # built once for all matches of a pattern
            for value in [*self._bound.values(), self.function.body.body]:
                for each in relax.analysis.free_vars(value):
                    self._read_by.setdefault(each, []).append(value)
        return self._read_by.get(var, [])

    def finish(self) -> Graph:
        """Give the rewritten graph, without the weights that nothing uses any more."""
        used = set(relax.analysis.free_vars(self.function.body))
        kept = [name for name, var in self.variables.items() if var in used]
        function = relax.Function(
            [*self.inputs, *(self.variables[name] for name in kept)],
            self.function.body,
            self.function.ret_ty,
            attrs=self.function.attrs,
        )
        module = self.builder.get()
        module.update_func(module.get_global_var(ENTRY), function)
        return Graph(module, {name: self.weights[name] for name in kept})


def _rows(shape: Sequence) -> list:
    """Give [B, T, C] for a shape [.., C]."""
    *outer, C = shape
    return [1, *outer, C] if len(outer) == 1 else [outer[0], math.prod(outer[1:]), C]


def add_of(left: DFPattern, right: DFPattern) -> DFPattern:
    """Match left + right, in either order."""
    add = is_op("relax.add")
    return add(left, right) | add(right, left)


def calls(value: relax.Expr, name: str) -> bool:
    """Tell if a value is a call of that operator of Relax."""
    return isinstance(value, relax.Call) and getattr(value.op, "name", "") == f"relax.{name}"


def both_ways(value: relax.Expr) -> Iterator[tuple[relax.Expr, relax.Expr]]:
    """Give the two operands of an addition or a product, in either order."""
    if isinstance(value, relax.Call) and len(value.args) == 2:
        first, second = value.args
        yield first, second
        yield second, first


def is_transpose(value: relax.Expr) -> bool:
    """Tell if a value is a matrix whose rows and columns are exchanged."""
    if not calls(value, "permute_dims") or len(value.args[0].ty.shape.values) != 2:
        return False
    return value.attrs.axes is None or [int(axis) % 2 for axis in value.attrs.axes] == [1, 0]


def number_of(value: relax.Expr) -> float | None:
    """Give the number in a constant of one element; None for other values."""
    array = value.value.numpy() if isinstance(value, tvm.ir.GenericConst) else np.empty(0)
    return float(array.item()) if array.size == 1 else None


def same_shape(left: Sequence, right: Sequence) -> bool:
    """Tell if two shapes, of numbers or symbols, are provably equal."""
    analyzer = tvm.sym.Analyzer()
    return len(left) == len(right) and all(analyzer.can_prove_equal(x, y) for x, y in zip(left, right, strict=True))


def _dtypes(kernel: tvm.tirx.PrimFunc) -> list[str]:
    return [str(param.ty.dtype) for param in kernel.params]


def _cast(value: relax.Expr, dtype: str, wanted: str) -> relax.Expr:
    return value if dtype == wanted else relax.op.astype(value, wanted)


def _cast_all(values: Sequence[relax.Expr], wanted: Sequence[str]) -> list[relax.Expr]:
    return [_cast(value, str(value.ty.dtype), dtype) for value, dtype in zip(values, wanted, strict=True)]


def with_root(kernel: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    """Mark a kernel as the graph passes want it: opaque and scheduled."""
    # TVM's graph passes look into every kernel and expect its body to be a block, as scheduled ones have.
    block = tvm.s_tir.SBlock([], [], [], "root", kernel.body)
    scheduled = kernel.with_body(tvm.s_tir.SBlockRealize([], True, block)).with_attr("tirx.is_scheduled", True)
    return scheduled.with_attr("op_pattern", OPAQUE)  # else one that only calls a function would be fused
