"""Find masks that a graph computes although they are the causal one, and tell Attention by an attribute instead."""

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

SHAPES = ((1, 1), (1, 2), (2, 5), (3, 8))  # (B, T) at which a mask is compared with the causal one
HIDDEN = -1e4  # a mask that is added holds at most this where nothing is to be seen


def say_causal(graph: ir.Graph) -> int:
    """Replace the mask of each Attention by is_causal=1 where it is the causal one; the number of those.

    Others compute it anew in every call, from the shape of the ids, with operators that compilers need not know. A mask
    is the causal one if it depends on nothing but that shape and is equal at several.
    """
    known: dict[ir.Value, bool] = {}
    found = 0
    for node in graph:
        if node.op_type != "Attention" or len(node.inputs) != 4 or (mask := node.inputs[3]) is None:
            continue
        causal = node.attributes.get("is_causal")
        if causal is not None and causal.as_int():
            continue
        if mask not in known:
            known[mask] = _is_causal(graph, mask)
        if known[mask]:
            node.resize_inputs(3)
            node.attributes.add(ir.AttrInt64("is_causal", 1))
            found += 1
    return found


def _is_causal(graph: ir.Graph, mask: ir.Value) -> bool:
    part = ir.convenience.extract(graph, graph.inputs[:1], [mask])
    ids = part.inputs[0]
    if any(node.op_type != "Shape" for node in ids.consumers()):
        return False  # it hides tokens by what they are
    evaluator = ReferenceEvaluator(ir.to_proto(ir.Model(part, ir_version=onnx.IR_VERSION)))
    for B, T in SHAPES:
        (values,) = map(np.asarray, evaluator.run(None, {evaluator.input_names[0]: np.zeros((B, T), np.int64)}))
        if values.dtype != bool:
            if not np.all((values == 0) | (values <= HIDDEN)):
                return False
            values = values == 0
        if values.shape[-2:] != (T, T) or not np.array_equal(
            values, np.broadcast_to(np.tri(T, dtype=bool), values.shape)
        ):
            return False
    return True
