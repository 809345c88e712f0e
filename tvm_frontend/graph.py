"""The graph that the importer makes and the passes rewrite: a Relax module and its weights."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm

ENTRY = "forward"  # the Relax function, named so from the importer to the library
BODY, HEAD = "body", "head"  # its two parts, which `split_head` puts beside it
FORGET = "forget"  # a function that `lower` puts beside them, which returns nothing
CHOOSE = "choose"  # the kernel that `add_choice` puts beside them
SHAPES = "shape_func"  # the prefix of the virtual machine's own functions among the kernels


@dataclass(frozen=True)
class Graph:
    """Holds a Relax module whose function `forward(*inputs, *weights)` takes the weights in the order of the dict.

    Weights stay parameters: as constants they would be copied into every rewrite and baked in the library.
    """

    module: tvm.IRModule
    weights: dict[str, np.ndarray]

    @property
    def entry_points(self) -> list[str]:
        """Name the model's Relax functions and, if it is there, the kernel that is called by itself."""
        return sorted(
            name.name_hint
            for name, function in self.module.functions_items()
            if (isinstance(function, tvm.relax.Function) and name.name_hint != FORGET) or name.name_hint == CHOOSE
        )

    @property
    def kernels(self) -> dict[str, int]:
        """Count forward's calls of each kernel, in a graph that is lowered to such calls."""
        known = {name for name, function in self.module.functions_items() if isinstance(function, tvm.tirx.PrimFunc)}
        calls: Counter[str] = Counter()

        def count(node: tvm.relax.Expr) -> None:
            if isinstance(node, tvm.relax.Call):  # a kernel itself, or `vm.call_tir_dyn` with the kernel and sizes
                called = [each for each in (node.op, *node.args) if isinstance(each, tvm.ir.GlobalVar)]
                calls.update(each.name_hint for each in called if each in known)

        tvm.relax.analysis.post_order_visit(self.module[ENTRY], count)
        return {name: count for name, count in calls.items() if not name.startswith(SHAPES)}

    @property
    def caches(self) -> list[dict[str, Any]]:
        """List the dtype, and the shape after B, of each KV cache that forward takes after ids and pos.

        Other inputs, as masks and pasts of any length, are none.
        """
        function = self.module[ENTRY]
        types = [param.ty for param in function.params[2 : int(function.attrs["num_input"])]]
        sizes = [size for each in types for size in each.shape.values[1:]]
        if not all(isinstance(size, tvm.tirx.IntImm) for size in sizes) or any(len(each.shape) != 4 for each in types):
            return []
        return [{"dtype": str(each.dtype), "shape": [int(size) for size in each.shape.values[1:]]} for each in types]
