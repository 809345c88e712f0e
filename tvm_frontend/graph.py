"""What flows from the importer through the passes: a Relax module and its weights."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm

ENTRY = "forward"  # the name of the Relax function, ONNX to library
BODY, HEAD = "body", "head"  # of its two parts, beside it from `split_head` on
CHOOSE = "choose"  # of the kernel that `add_choice` puts beside them


@dataclass(frozen=True)
class Graph:
    """A Relax module whose function `forward(*inputs, *weights)` takes the weights in the order of the dict.

    Weights stay parameters: as constants they would be copied into every rewrite and baked in the library.
    """

    module: tvm.IRModule
    weights: dict[str, np.ndarray]

    @property
    def entry_points(self) -> list[str]:
        """The names of the Relax functions."""
        functions = self.module.functions_items()
        return sorted(name.name_hint for name, function in functions if isinstance(function, tvm.relax.Function))

    @property
    def caches(self) -> list[dict[str, Any]]:
        """The dtype, and the shape behind B, of each KV cache that forward takes after ids and pos."""
        function = self.module[ENTRY]
        types = [param.ty for param in function.params[2 : int(function.attrs["num_input"])]]
        return [{"dtype": str(each.dtype), "shape": [int(size) for size in each.shape.values[1:]]} for each in types]
