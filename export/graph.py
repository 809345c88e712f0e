"""Read from an ONNX graph, whoever wrote it, how its model is called, its weights and its shape. No torch."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import onnx
from onnx import AttributeProto, NodeProto, TensorProto, ValueInfoProto
from onnx.helper import get_attribute_value, tensor_dtype_to_np_dtype

from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.costs import matmul_parameters

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
PRODUCTS = ("MatMul", "Gemm", "MatMulInteger")
# Operators that hand a weight on to the product that reads it.
CARRIERS = ("Cast", "DequantizeLinear", "Identity", "Reshape", "Transpose")


@dataclass(frozen=True)
class Tensor:
    """A constant of a graph. dtype: one of onnx.TensorProto.DataType."""

    dims: tuple[int, ...]
    dtype: int

    @property
    def numbers(self) -> int:
        """The number of its elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Their size: four bits have half a byte."""
        if self.dtype in (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1):
            return (self.numbers + 1) // 2
        return self.numbers * tensor_dtype_to_np_dtype(self.dtype).itemsize


class GraphReader:
    """Reads a parsed file by its nodes and the shapes of its weights; it needs no external data."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.graph = proto.graph
        self._maker = {name: node for node in self.graph.node for name in node.output}

    @cached_property
    def constants(self) -> dict[str, Tensor]:
        """Every initialiser and every tensor that a Constant node gives, by name."""
        found = {each.name: Tensor(tuple(each.dims), each.data_type) for each in self.graph.initializer}
        for node in self.graph.node:
            if node.op_type == "Constant" and (value := _attributes(node).get("value")) is not None:
                found[node.output[0]] = Tensor(tuple(value.dims), value.data_type)
        return found

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all constants, each once."""
        return sum(constant.bytes for constant in self.constants.values())

    @property
    def node_counts(self) -> Counter[str]:
        """Counts of each operator, nodes of subgraphs included; those of other domains are `domain.Operator`."""
        return Counter(
            node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
            for node in _all_nodes(self.graph)
        )

    @cached_property
    def product_weights(self) -> list[Tensor]:
        """The constants that a matrix product reads, a tied embedding included, one for each product."""
        found = []
        for node in self.graph.node:
            if node.op_type in PRODUCTS:
                weights = [self.constants.get(self._carried(name)) for name in node.input[:2]]
                found += [weight for weight in weights if weight and len(weight.dims) == 2]
        return found

    @property
    def flops_per_token(self) -> int:
        """2·N, N being the weights of matrix products; attention is not in it."""
        return 2 * sum(weight.numbers for weight in self.product_weights)

    @cached_property
    def inputs(self) -> list[ValueInfoProto]:
        """The inputs that a caller gives; older files list the initialisers among them."""
        return [value for value in self.graph.input if value.name not in self.constants]

    def config(self) -> GPTConfig:
        """Return the shape of the GPT-2 that this graph is. Raises UserError that says what it does not find."""
        vocab_size, n_embd, block_size = self._tables()
        config = GPTConfig(
            block_size=block_size,
            vocab_size=vocab_size,
            n_layer=len(self._attentions),
            n_head=self._heads(),
            n_embd=n_embd,
            bias=any(constant.dims in ((3 * n_embd,), (4 * n_embd,)) for constant in self.constants.values()),
            activation=self._activation(),
            tied_head=sum(sorted(each.dims) == sorted((vocab_size, n_embd)) for each in self.constants.values()) < 2,
        )
        if (found := self.flops_per_token // 2) != matmul_parameters(config):
            raise UserError(
                f"its matrix products have {found:,} weights where a GPT-2 of its size ({config.n_layer} layers, "
                f"width {n_embd}, {vocab_size} ids) has {matmul_parameters(config):,}"
            )
        return config

    def _tables(self) -> tuple[int, int, int]:
        """Return V, C and block_size: the token table's rows and width, the rows of the table of positions."""
        tables = []
        for node in self.graph.node:
            table = self.constants.get(self._carried(node.input[0])) if node.op_type == "Gather" else None
            if table and table.dtype in FLOATS and len(table.dims) == 2 and table not in tables:
                tables.append(table)
        if len(tables) != 2 or tables[0].dims[1] != tables[1].dims[1]:
            dims = ", ".join(str(list(table.dims)) for table in tables) or "none"
            raise UserError(
                f"it gathers from tables {dims}, where a GPT-2 has two of one width: of tokens, of positions"
            )
        rows = [table.dims[0] for table in tables]
        V = next((weight.dims[n] for weight in self.product_weights[-1:] for n in (0, 1) if weight.dims[n] in rows), 0)
        if V not in rows:
            raise UserError("its last matrix product is not with a head of as many columns as there are token ids")
        rows.remove(V)
        return V, tables[0].dims[1], rows[0]

    @cached_property
    def _attentions(self) -> list[NodeProto]:
        """The node of each layer's attention that knows the heads: Attention, or the Softmax over the scores."""
        whole = [node for node in self.graph.node if node.op_type == "Attention"]
        return whole or [node for node in self.graph.node if node.op_type == "Softmax"]

    def _heads(self) -> int:
        if not self._attentions:
            raise UserError("it has neither Attention nor Softmax nodes, so no attention that could be recognised")
        first = self._attentions[0]
        heads = _attributes(first).get("q_num_heads") or self._dims_of(first.input[0])[1:2]
        heads = heads[0] if isinstance(heads, list) and heads else heads
        if not isinstance(heads, int) or heads < 1:
            raise UserError(
                f"the number of heads at {first.op_type} {first.name!r} is not a number; infer shapes first"
            )
        return heads

    def _dims_of(self, name: str) -> list[int | str]:
        """Return the shape of a value as the file, or else ONNX's inference, has it; empty if neither has."""
        return self._written_dims.get(name) or self._inferred_dims.get(name, [])

    @cached_property
    def _written_dims(self) -> dict[str, list[int | str]]:
        return {value.name: dims_of(value) for value in self.graph.value_info}

    @cached_property
    def _inferred_dims(self) -> dict[str, list[int | str]]:
        try:
            inferred = onnx.shape_inference.infer_shapes(_without_weights(self.proto))
        except onnx.shape_inference.InferenceError:  # an operator that ONNX does not know, for one
            return {}
        return {value.name: dims_of(value) for value in inferred.graph.value_info}

    def _activation(self) -> str:
        counts = self.node_counts
        if gelus := [node for node in self.graph.node if node.op_type == "Gelu"]:
            return "gelu" if _attributes(gelus[0]).get("approximate", b"none") == b"none" else "gelu_tanh"
        for operator, name in (("Tanh", "gelu_tanh"), ("Erf", "gelu"), ("Relu", "relu")):
            if counts[operator]:
                return name
        raise UserError("it has no Gelu, Tanh, Erf or Relu, so no activation of a GPT-2")

    def _carried(self, name: str) -> str:
        """Return the value that a weight began as, before it was transposed, cast or dequantised."""
        while name not in self.constants and (node := self._maker.get(name)) and node.op_type in CARRIERS:
            name = node.input[0]
        return name


def dims_of(value: ValueInfoProto) -> list[int | str]:
    """Return the shape of an input or output: numbers, names, and `?` for what is not said."""
    return [
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in value.type.tensor_type.shape.dim
    ]


def dtype_of(value: ValueInfoProto) -> str:
    """Return the dtype of an input or output, by numpy's name."""
    return str(tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))


def opsets_of(proto: onnx.ModelProto) -> dict[str, int]:
    """Return the version of each domain; the default one is called ai.onnx."""
    return {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import}


def _attributes(node: NodeProto) -> dict:
    return {attribute.name: get_attribute_value(attribute) for attribute in node.attribute}


def _all_nodes(graph: onnx.GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _all_nodes(attribute.g)


def _without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with its large constants as inputs, so that inference does not copy gigabytes."""
    bare = onnx.ModelProto()
    for field in ("ir_version", "opset_import", "functions"):
        value = getattr(proto, field)
        getattr(bare, field).extend(value) if field != "ir_version" else setattr(bare, field, value)
    bare.graph.name = proto.graph.name
    bare.graph.node.extend(proto.graph.node)
    bare.graph.input.extend(proto.graph.input)
    bare.graph.output.extend(proto.graph.output)
    for each in proto.graph.initializer:
        if each.data_type in FLOATS:
            bare.graph.input.append(onnx.helper.make_tensor_value_info(each.name, each.data_type, each.dims))
        else:
            bare.graph.initializer.append(each)
    return bare
