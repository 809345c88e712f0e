"""Masks that a graph computes although they are the causal one, which Attention can be told by an attribute."""

import numpy as np
import onnx
from onnx import NodeProto, helper
from onnx.reference import ReferenceEvaluator

SHAPES = ((1, 1), (1, 2), (2, 5), (3, 8))  # (B, T) at which a mask is compared with the causal one
HIDDEN = -1e4  # what a mask that is added holds at most where nothing is to be seen


def say_causal(graph: onnx.GraphProto, opset: int) -> int:
    """Replace the mask of each Attention by is_causal=1 where it is the causal one; the number of those.

    Others compute it anew in every call, from the shape of the ids, with operators that compilers need not know. A mask
    is the causal one if it depends on nothing but that shape and is equal at several.
    """
    makers = {name: node for node in graph.node for name in node.output}
    known: dict[str, bool] = {}
    found = 0
    for node in graph.node:
        if node.op_type != "Attention" or len(node.input) != 4 or not node.input[3]:
            continue
        causal = next((attribute for attribute in node.attribute if attribute.name == "is_causal"), None)
        if causal is not None and causal.i:
            continue
        name = node.input[3]
        if name not in known:
            known[name] = _is_causal(graph, _nodes_of(name, makers), name, opset)
        if known[name]:
            del node.input[3]
            if causal is not None:
                node.attribute.remove(causal)
            node.attribute.append(helper.make_attribute("is_causal", 1))
            found += 1
    return found


def _nodes_of(name: str, makers: dict[str, NodeProto]) -> list[NodeProto]:
    """The nodes that a value is computed by, each behind those that it needs."""
    nodes: dict[str, NodeProto] = {}
    waiting = [name]
    while waiting:
        node = makers.get(waiting[-1])
        if node is None or node.output[0] in nodes:
            waiting.pop()
        elif missing := [each for each in node.input if each in makers and makers[each].output[0] not in nodes]:
            waiting += missing
        else:
            nodes[node.output[0]] = node
    return list(nodes.values())


def _is_causal(graph: onnx.GraphProto, nodes: list[NodeProto], name: str, opset: int) -> bool:
    ids = graph.input[0]
    if any(ids.name in node.input and node.op_type != "Shape" for node in nodes):
        return False  # it hides tokens by what they are
    read = {each for node in nodes for each in node.input}
    weights = [tensor for tensor in graph.initializer if tensor.name in read]
    output = onnx.ValueInfoProto(name=name)
    mask = helper.make_graph(nodes, "mask", [ids], [output], weights)
    evaluator = ReferenceEvaluator(helper.make_model(mask, opset_imports=[helper.make_opsetid("", opset)]))
    for B, T in SHAPES:
        (values,) = evaluator.run(None, {ids.name: np.zeros((B, T), np.int64)})
        if values.dtype != bool:
            if not np.all((values == 0) | (values <= HIDDEN)):
                return False
            values = values == 0
        if values.shape[-2:] != (T, T) or not np.array_equal(
            values, np.broadcast_to(np.tri(T, dtype=bool), values.shape)
        ):
            return False
    return True
