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
LOOKUPS = ("Gather", "GatherND")  # give the rows of a table that an index names
# Operators that give some rows of a table, and those that hand rows on in another layout.
SELECTORS, LAYOUTS = (*LOOKUPS, "Slice", "Split"), (*CARRIERS, "Expand", "Squeeze", "Unsqueeze")
IDS, MASK, POSITIONS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"  # transformers' names


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
        return [self.constants[factor.name] for factor in self._factors]

    @property
    def matrices(self) -> set[str]:
        """The names of the constants that a matrix product reads."""
        return {factor.name for factor in self._factors}

    @property
    def flops_per_token(self) -> int:
        """2·N, N being the weights of matrix products; attention is not in it."""
        return 2 * sum(weight.numbers for weight in self.product_weights)

    @cached_property
    def inputs(self) -> list[ValueInfoProto]:
        """The inputs that a caller gives; older files list the initialisers among them."""
        return [value for value in self.graph.input if value.name not in self.constants]

    @cached_property
    def ids(self) -> ValueInfoProto | None:
        """The input of token ids: by its name, or the only one of whole numbers with two dimensions."""
        for name in ("ids", IDS):
            for value in self.inputs:
                if value.name == name:
                    return value
        whole = [
            value
            for value in self.inputs
            if value.type.tensor_type.elem_type in (TensorProto.INT64, TensorProto.INT32)
            and len(dims_of(value)) == 2
            and value.name not in (MASK, POSITIONS)
        ]
        return whole[0] if len(whole) == 1 else None

    @cached_property
    def logits(self) -> ValueInfoProto | None:
        """The output of logits: by its name, or the only floating one with three dimensions."""
        outputs = list(self.graph.output)
        named = [value for value in outputs if value.name == LOGITS]
        shaped = [value for value in outputs if value.type.tensor_type.elem_type in FLOATS and len(dims_of(value)) == 3]
        found = named or shaped
        return found[0] if len(found) == 1 else None

    @cached_property
    def vocab_size(self) -> int | None:
        """The rows of the table that the ids look up; None if no such table is found."""
        rows = [self.constants[self._carried(self._maker[name].input[0])].dims[0] for name in self._embedded[1]]
        return min(rows, default=None)

    @cached_property
    def longest(self) -> int | None:
        """The rows of the table of positions, which no position may be beyond; None if no such table is found."""
        name = self._added_to(self._embedded[1])
        return self.constants[name].numbers // self.constants[name].dims[-1] if name else None

    def config(self) -> GPTConfig:
        """Return the shape of the GPT-2 that this graph is. Raises UserError that says what it does not find.

        What a weight is follows from what reads it, never from its size, as sizes may be equal: the table of tokens is
        looked up by the ids, the table of positions is added to what comes of that, and the head is in the last product
        before the logits. The head is tied if it is the table of tokens itself; a copy of it is a head of its own.
        """
        tokens, (V, C), block_size = self._tables()
        if not self._factors:
            raise UserError("it has no product with a matrix of weights, so no head")
        *linears, head = self._factors
        if head.dims != (C, V):
            raise UserError(
                f"its last matrix product is with {list(head.dims)}, not with a head of as many columns as there are "
                f"token ids, which would be {[C, V]}"
            )
        config = GPTConfig(
            block_size=block_size,
            vocab_size=V,
            n_layer=len(self._attentions),
            n_head=self._heads(),
            n_embd=C,
            bias=any(self._has_bias(factor) for factor in linears),
            activation=self._activation(),
            tied_head=head.name == tokens,
        )
        if (found := self.flops_per_token // 2) != matmul_parameters(config):
            raise UserError(
                f"its matrix products have {found:,} weights where a GPT-2 of its size ({config.n_layer} layers, "
                f"width {C}, {V} ids) has {matmul_parameters(config):,}"
            )
        return config

    def _tables(self) -> tuple[str, tuple[int, ...], int]:
        """Return the name and the shape [V, C] of the table of tokens, and the rows of the table of positions."""
        looked_up, embedded = self._embedded
        tokens = {self._carried(self._maker[name].input[0]) for name in embedded}
        positions = self._added_to(embedded)
        tables = looked_up | ({positions: self.constants[positions].dims} if positions else {})
        if len(tables) != 2 or len(tokens) != 1 or positions is None or len({dims[-1] for dims in tables.values()}) > 1:
            dims = ", ".join(str(list(dims)) for dims in tables.values()) or "none"
            raise UserError(
                f"it gathers from tables {dims}, where a GPT-2 has two of one width: of tokens, by the ids, and of "
                "positions, by how many ids there are"
            )
        (name,) = tokens
        return name, tables[name], self.constants[positions].numbers // tables[name][1]

    @cached_property
    def _embedded(self) -> tuple[dict[str, tuple[int, ...]], set[str]]:
        """The shapes of the tables of which rows are looked up, by name, and the values that are rows of tokens."""
        looked_up: dict[str, tuple[int, ...]] = {}
        embedded: set[str] = set()
        for node in self._nodes:
            if node.op_type in LOOKUPS and (table := self._weight(node.input[0])) and len(table[1]) == 2:
                looked_up[table[0]] = table[1]
                if node.input[1] in self._of_ids and not _attributes(node).get("axis"):
                    embedded.add(node.output[0])
        return looked_up, embedded

    def _added_to(self, embedded: set[str]) -> str | None:
        """Return the table of which rows, chosen without regard to the ids, meet the embedded tokens; None if none."""
        reached = set(embedded)
        for node in self._nodes:
            if node.op_type in (*PRODUCTS, "Attention") or reached.isdisjoint(node.input):
                continue
            for name in node.input:
                if name not in reached and (table := self._selected(name)):
                    return table
            reached.update(node.output)
        return None

    def _selected(self, name: str) -> str | None:
        """Return the constant of which a value is some rows, chosen without regard to the ids; None if it is not."""
        selected = False
        while name not in self.constants:
            node = self._maker.get(name)
            if node is None or name in self._of_ids or node.op_type not in (*SELECTORS, *LAYOUTS):
                return None
            selected = selected or node.op_type in SELECTORS
            name = node.input[0]
        table = self.constants[name]
        alone = table.numbers == math.prod(sorted(table.dims[:-1])[-1:]) * table.dims[-1] if table.dims else False
        return name if selected and alone and len(table.dims) > 1 and table.dtype in FLOATS else None

    @cached_property
    def _of_ids(self) -> set[str]:
        """The values that depend on what the token ids are; not those that depend only on how many there are."""
        found = {self.ids.name} if self.ids else set()
        for node in self.graph.node:
            if node.op_type not in ("Shape", "Size") and not found.isdisjoint(node.input):
                found.update(node.output)
        return found

    @cached_property
    def _nodes(self) -> list[NodeProto]:
        """The nodes that the logits depend on, in order; all nodes where no output is the logits."""
        if self.logits is None:
            return list(self.graph.node)
        needed, found = {self.logits.name}, []
        for node in reversed(self.graph.node):
            if not needed.isdisjoint(node.output):
                found.append(node)
                needed.update(node.input)
        return found[::-1]

    @cached_property
    def _factors(self) -> list["_Factor"]:
        """The matrices of weights in products, in the order of the products."""
        found = []
        for node in (node for node in self._nodes if node.op_type in PRODUCTS):
            for side, name in enumerate(node.input[:2]):
                weight = self._weight(name)
                if weight and len(weight[1]) == 2:
                    turned = bool(_attributes(node).get("transA" if side == 0 else "transB")) != (side == 0)
                    found.append(_Factor(weight[0], weight[1][::-1] if turned else weight[1], node))
        return found

    def _has_bias(self, factor: "_Factor") -> bool:
        """Return whether a vector of weights is added to a product: by the product itself, or behind it."""
        if factor.node.op_type == "Gemm" and len(factor.node.input) > 2:
            return True
        reached = {factor.node.output[0]}
        for node in self._nodes:
            if reached.isdisjoint(node.input):
                continue
            if node.op_type in (*CARRIERS, "Mul"):  # Mul: the scale of a quantised product
                reached.update(node.output)
            elif node.op_type == "Add":
                added = [self.constants.get(self._carried(name)) for name in node.input if name not in reached]
                if any(each and each.dtype in FLOATS and each.numbers == factor.dims[1] for each in added):
                    return True
        return False

    @cached_property
    def _attentions(self) -> list[NodeProto]:
        """The node of each layer's attention that knows the heads: Attention, or the Softmax over the scores."""
        whole = [node for node in self._nodes if node.op_type == "Attention"]
        return whole or [node for node in self._nodes if node.op_type == "Softmax"]

    def _heads(self) -> int:
        if not self._attentions:
            raise UserError("it has neither Attention nor Softmax nodes, so no attention that could be recognised")
        found: set[int] = set()
        for node in self._attentions:
            heads = _attributes(node).get("q_num_heads") or next(iter(self._dims_of(node.input[0])[1:2]), None)
            if not isinstance(heads, int) or heads < 1:
                raise UserError(
                    f"the number of heads at {node.op_type} {node.name!r} is not a number; infer shapes first"
                )
            found.add(heads)
        if len(found) > 1:
            raise UserError(f"its layers have different numbers of heads: {', '.join(map(str, sorted(found)))}")
        return found.pop()

    def _dims_of(self, name: str) -> list[int | str]:
        """Return the shape of a value as the file, or else ONNX's inference, has it; empty if neither has."""
        return self._written_dims.get(name) or self._inferred_dims.get(name, [])

    @cached_property
    def _written_dims(self) -> dict[str, list[int | str]]:
        return {value.name: dims_of(value) for value in self.graph.value_info}

    @cached_property
    def _inferred_dims(self) -> dict[str, list[int | str]]:
        try:
            inferred = onnx.shape_inference.infer_shapes(without_weights(self.proto), data_prop=True)
        except onnx.shape_inference.InferenceError:  # an operator that ONNX does not know, for one
            return {}
        return {value.name: dims_of(value) for value in inferred.graph.value_info}

    def _activation(self) -> str:
        if gelus := [node for node in self._nodes if node.op_type == "Gelu"]:
            return "gelu" if _attributes(gelus[0]).get("approximate", b"none") == b"none" else "gelu_tanh"
        operators = {node.op_type for node in self._nodes}
        for operator, name in (("Tanh", "gelu_tanh"), ("Erf", "gelu"), ("Relu", "relu")):
            if operator in operators:
                return name
        raise UserError("it has no Gelu, Tanh, Erf or Relu, so no activation of a GPT-2")

    def _carried(self, name: str) -> str:
        """Return the value that a weight began as, before it was transposed, cast or dequantised."""
        while name not in self.constants and (node := self._maker.get(name)) and node.op_type in CARRIERS:
            name = node.input[0]
        return name

    def _weight(self, name: str) -> tuple[str, tuple[int, ...]] | None:
        """Return the constant that a value is, and the shape that it has there; None for a value that is computed."""
        if name in self.constants:
            return name, self.constants[name].dims
        node = self._maker.get(name)
        if node is None or node.op_type not in CARRIERS or (weight := self._weight(node.input[0])) is None:
            return None
        constant, dims = weight
        if node.op_type == "Transpose":
            return constant, tuple(dims[axis] for axis in _attributes(node).get("perm", range(len(dims))[::-1]))
        if node.op_type == "Reshape":
            known = [dim for dim in self._dims_of(name) if isinstance(dim, int)]
            dims = tuple(known) if math.prod(known) == math.prod(dims) else dims
        return constant, dims


@dataclass(frozen=True)
class _Factor:
    """A matrix of weights in a product. name: of the constant. dims: as [in, out]. node: the product."""

    name: str
    dims: tuple[int, ...]
    node: NodeProto


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


def without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
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
