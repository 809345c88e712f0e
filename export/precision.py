"""Reduced precision: which operators ONNX Runtime's CPU provider cannot compute in it, and casts around exactly those.

It has no bfloat16 kernel of MatMul, Add and others and refuses a graph that asks for one, so these compute in float32
between casts, an island. Where it has no float16 kernel it casts by itself, so such a graph stays as it is.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime
from onnx import NodeProto, TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

LOW = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Lacking:
    """Operators without a kernel in a dtype, sorted: those refused, now islands, and those that are cast in silence."""

    islands: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()


def add_islands(proto: onnx.ModelProto, dtype: str) -> Lacking:
    """Put the nodes that ONNX Runtime refuses in `dtype` between casts to float32 and back, and say which."""
    if dtype not in LOW:
        return Lacking()
    low, types = LOW[dtype], _types_of(proto)
    kernels = _Kernels(proto, types)
    found = [kernels.find(node) if _touches(node, types, low) else "own" for node in proto.graph.node]
    islands, silent = (
        tuple(sorted({node.op_type for node, kernel in zip(proto.graph.node, found, strict=True) if kernel == kind}))
        for kind in ("none", "cast")
    )
    if islands:
        _cast_around(proto.graph, [kernel == "none" for kernel in found], types, low)
    return Lacking(islands, silent)


def _types_of(proto: onnx.ModelProto) -> dict[str, int]:
    """Return the element type of every value."""
    graph = onnx.shape_inference.infer_shapes(proto).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def _touches(node: NodeProto, types: dict[str, int], low: int) -> bool:
    return low in (types[name] for name in (*node.input, *node.output) if name)


class _Kernels:
    """Asks ONNX Runtime, by a graph of one node, what it has for a kind of node; each kind once."""

    def __init__(self, proto: onnx.ModelProto, types: dict[str, int]) -> None:
        self.opsets, self.ir_version, self.types = proto.opset_import, proto.ir_version, types
        self.found: dict[bytes, str] = {}

    def find(self, node: NodeProto) -> str:
        """Return `own`, `cast` (by float32, in silence) or `none`."""
        alone = NodeProto()
        alone.CopyFrom(node)
        alone.name = ""
        alone.input[:] = [f"x{i}" if name else "" for i, name in enumerate(node.input)]
        alone.output[:] = [f"y{i}" if name else "" for i, name in enumerate(node.output)]
        inputs, outputs = (
            [
                helper.make_tensor_value_info(new, self.types[old], None)
                for new, old in zip(news, olds, strict=True)
                if old
            ]
            for news, olds in ((alone.input, node.input), (alone.output, node.output))
        )
        graph = helper.make_graph([alone], "one", inputs, outputs)
        key = graph.SerializeToString(deterministic=True)
        if key not in self.found:
            model = helper.make_model(graph, opset_imports=self.opsets, ir_version=self.ir_version)
            self.found[key] = self._try(model.SerializeToString(), node.op_type)
        return self.found[key]

    @staticmethod
    def _try(model: bytes, operator: str) -> str:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # the refusal is the answer, not an error
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        with tempfile.TemporaryDirectory() as folder:
            options.optimized_model_filepath = str(Path(folder) / "as_run.onnx")
            try:
                onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            except NoKernel:
                return "none"
            as_run = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
        return "cast" if operator != "Cast" and "Cast" in as_run else "own"


def _cast_around(graph: onnx.GraphProto, refused: list[bool], types: dict[str, int], low: int) -> None:
    """Give the refused nodes float32 inputs and outputs by casts, each value cast once at most in each direction.

    A value that goes from one island to another stays float32 on its way.
    """
    nodes: list[NodeProto] = []
    made = {(value.name, low) for value in (*graph.input, *graph.initializer)}

    def name_of(value: str, dtype: int) -> str:
        return value if dtype == low else f"{value}_fp32"

    def take(value: str, dtype: int) -> str:
        if (value, dtype) not in made:
            other = low if dtype == TensorProto.FLOAT else TensorProto.FLOAT
            name = f"{value}_cast" if dtype == TensorProto.FLOAT else f"{value}_cast_back"
            nodes.append(helper.make_node("Cast", [name_of(value, other)], [name_of(value, dtype)], name, to=dtype))
            made.add((value, dtype))
        return name_of(value, dtype)

    for node, is_island in zip(graph.node, refused, strict=True):
        dtype = TensorProto.FLOAT if is_island else low
        if node.op_type == "Cast" and (node.input[0], TensorProto.FLOAT) in made:
            dtype = TensorProto.FLOAT  # a cast takes either, so nothing is rounded before it
        new = NodeProto()
        new.CopyFrom(node)
        new.input[:] = [take(name, dtype) if types.get(name) == low else name for name in node.input]
        new.output[:] = [name_of(name, dtype) if types.get(name) == low else name for name in node.output]
        made |= {(name, dtype) for name in node.output}
        nodes.append(new)
    for value in graph.output:
        if types[value.name] == low:
            take(value.name, low)
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]  # it describes the values as they were
