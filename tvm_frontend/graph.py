"""What flows from the importer through the passes: a Relax module and its weights."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm

ENTRY = "forward"  # the name of the Relax function, ONNX to library
BODY, HEAD = "body", "head"  # of its two parts, beside it from `split_head` on
FORGET = "forget"  # of a function that `lower` puts beside them, which gives nothing back
CHOOSE = "choose"  # of the kernel that `add_choice` puts beside them
SHAPES = "shape_func"  # how TVM names the virtual machine's own functions among the kernels


@dataclass(frozen=True)
class Graph:
    """A Relax module whose function `forward(*inputs, *weights)` takes the weights in the order of the dict.

    Weights stay parameters: as constants they would be copied into every rewrite and baked in the library.
    """

    module: tvm.IRModule
    weights: dict[str, np.ndarray]

    @property
    def entry_points(self) -> list[str]:
        """The names of the model's Relax functions, and of the kernel that is called by itself, if it is there."""
        return sorted(
            name.name_hint
            for name, function in self.module.functions_items()
            if (isinstance(function, tvm.relax.Function) and name.name_hint != FORGET) or name.name_hint == CHOOSE
        )

    @property
    def kernels(self) -> dict[str, int]:
        """How often forward calls each kernel, of a graph that is lowered to such calls."""
        known = {name for name, function in self.module.functions_items() if isinstance(function, tvm.tirx.PrimFunc)}
        calls: Counter[str] = Counter()

        def count(node: tvm.relax.Expr) -> None:
            if isinstance(node, tvm.relax.Call):  # as itself, or through `vm.call_tir_dyn` where it has sizes to pass
                called = [each for each in (node.op, *node.args) if isinstance(each, tvm.ir.GlobalVar)]
                calls.update(each.name_hint for each in called if each in known)

        tvm.relax.analysis.post_order_visit(self.module[ENTRY], count)
        return {name: count for name, count in calls.items() if not name.startswith(SHAPES)}

    @property
    def caches(self) -> list[dict[str, Any]]:
        """The dtype, and the shape behind B, of each KV cache that forward takes after ids and pos."""
        function = self.module[ENTRY]
        types = [param.ty for param in function.params[2 : int(function.attrs["num_input"])]]
        return [{"dtype": str(each.dtype), "shape": [int(size) for size in each.shape.values[1:]]} for each in types]
