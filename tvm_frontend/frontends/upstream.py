"""Turns the modules of TVM's own importers into graphs of this project."""

import traceback
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_frontend.graph import ENTRY, Graph


def graph_of(module: tvm.IRModule) -> Graph:
    """Turn a module whose `main(*inputs)` has its weights as constants into one with forward(*inputs, *weights)."""
    main = module["main"]
    lifting = _Lifting()
    body = lifting.visit_expr(main.body)
    function = relax.Function([*main.params, *lifting.variables], body, main.ret_ty)
    function = function.with_attr({"num_input": len(main.params), "global_symbol": ENTRY})
    kernels = {name: kernel for name, kernel in module.functions_items() if name.name_hint != "main"}
    lifted = tvm.IRModule({**kernels, tvm.ir.GlobalVar(ENTRY): function})
    return Graph(relax.transform.Normalize()(lifted), lifting.weights)


def unknown_shape(graph: Graph) -> str | None:
    """Name the first operator with a result of unknown shape, for which no code can be generated, or give None."""
    for block in graph.module[ENTRY].body.blocks:
        for binding in block.bindings:
            if isinstance(binding.var.ty, relax.TensorType) and binding.var.ty.shape is None:
                return getattr(getattr(binding.value, "op", None), "name", "a part of a tuple")
    return None


def node_at(error: Exception, kind: type) -> Any:
    """Find the node that was being read when `error` was raised: a local variable `node` of that kind, or None."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return next((node for frame in frames if isinstance(node := frame.f_locals.get("node"), kind)), None)


def reason_of(error: Exception) -> str:
    """Put an error in one line, its type first, as some say no more than a missing key."""
    lines = [*filter(None, map(str.strip, str(error).splitlines())), ""]
    return f"{type(error).__name__}: {lines[0]}"


@relax.expr_functor.mutator
class _Lifting(relax.PyExprMutator):
    """Makes constants of one dimension or more variables; scalars stay, as the operators' patterns want them."""

    def __init__(self) -> None:
        super().__init__()
        self.variables: list[relax.Var] = []
        self.weights: dict[str, np.ndarray] = {}
        self._found: dict[tvm.ir.GenericConst, relax.Var] = {}

    def visit_generic_const_(self, constant: tvm.ir.GenericConst) -> relax.Expr:
        if not constant.value.shape:
            return constant
        if constant not in self._found:
            name = f"constant_{len(self.variables)}"
            self._found[constant] = relax.Var(name, constant.ty)
            self.variables.append(self._found[constant])
            self.weights[name] = constant.value.numpy()
        return self._found[constant]
