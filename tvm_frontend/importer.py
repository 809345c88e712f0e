"""ONNX to Relax, with B and T symbolic and the weights as parameters.

TVM's own importer needs static shapes for these graphs: it turns Shape, Range and Concat into tensors. Here a shape is
a list of symbolic integers while the graph is read, so index arithmetic never reaches the compiled program.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import tvm
import tvm_ffi
from onnx import numpy_helper
from tvm import relax, te
from tvm.relax import op

from gpt.cli import UserError
from tvm_frontend.graph import ENTRY, Graph

OLDEST_OPSET, NEWEST_OPSET = 18, 25
LARGE = 2**31  # as the end of a slice: all there is
WHOLE_OPSET = 23  # from here on Attention is an operator


@dataclass(frozen=True)
class Integers:
    """The value of an index computation: symbolic or plain integers, a list of them or (scalar) one."""

    values: list[Any]
    scalar: bool = False


Value = relax.Expr | Integers


@dataclass
class _Import:
    """The graph while it is being read: the weights, and what each ONNX name stands for so far."""

    builder: relax.BlockBuilder = field(default_factory=relax.BlockBuilder)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)

    def add_weight(self, name: str, array: np.ndarray) -> relax.Var:
        """The parameter of that name, made where it is not there yet."""
        if name not in self.weights:
            self.weights[name] = array
            self.values[name] = relax.Var(name, relax.TensorType(array.shape, str(array.dtype)))
        return self.values[name]

    def tensor(self, name: str) -> relax.Expr:
        value = self.values[name]
        if isinstance(value, Integers):
            raise UserError(f"{name!r} is index arithmetic where a tensor is needed")
        return value

    def integers(self, name: str) -> list[Any]:
        value = self.values[name]
        if not isinstance(value, Integers):
            raise UserError(f"{name!r} is a tensor where a shape, known while compiling, is needed")
        return value.values

    def shape(self, name: str) -> list:
        return list(self.tensor(name).ty.shape.values)


Converter = Callable[[_Import, onnx.NodeProto, dict[str, Any]], Value | tuple[Value, ...]]


def import_onnx(proto: onnx.ModelProto) -> Graph:
    """Read a GPT written by `export.onnx` into a Relax function `forward(*inputs, *weights)`.

    Its result is the file's one output, or a tuple of all. Dimensions named in the file (B, T) become symbolic
    integers. Raises UserError naming the first node that is not supported, with its operator, domain and opset.
    """
    opset = check_operators(proto)
    state = _Import()
    symbols: dict[str, tvm.tirx.Var] = {}
    inputs = [_declare_input(state, value, symbols) for value in proto.graph.input]
    _declare_initializers(state, proto.graph)
    with state.builder.function(ENTRY, attrs={"num_input": len(inputs)}):
        with state.builder.dataflow():
            for node in proto.graph.node:
                _convert(state, node, opset)
            outputs = [state.builder.emit_output(state.tensor(value.name)) for value in proto.graph.output]
        state.builder.emit_func_output(
            outputs[0] if len(outputs) == 1 else relax.Tuple(outputs),
            [*inputs, *(state.values[name] for name in state.weights)],
        )
    return Graph(state.builder.finalize(), state.weights)


def check_operators(proto: onnx.ModelProto) -> int:
    """The file's opset, after checking it and every node; raises UserError naming the first that is not supported."""
    opsets = {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import}
    opset = opsets.get("ai.onnx", 0)
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise UserError(
            f"opset {opset}: supported are {OLDEST_OPSET} to {NEWEST_OPSET}; export with --opset {WHOLE_OPSET}"
        )
    for node in proto.graph.node:
        domain = node.domain or "ai.onnx"
        if domain != "ai.onnx" or node.op_type not in CONVERTERS:
            raise UserError(
                f"node {node.name!r}: operator {node.op_type} of domain {domain} (opset {opsets.get(domain, '?')}) is "
                f"not supported, only {', '.join(CONVERTERS)} are; export a checkpoint with python -m export.onnx and "
                f"opset {WHOLE_OPSET} or later, which keeps attention as one node"
            )
    return opset


def _declare_input(state: _Import, value: onnx.ValueInfoProto, symbols: dict[str, tvm.tirx.Var]) -> relax.Var:
    shape = []
    for dim in value.type.tensor_type.shape.dim:
        if dim.dim_param:
            shape.append(symbols.setdefault(dim.dim_param, tvm.tirx.Var(dim.dim_param, "int64")))
        else:
            shape.append(dim.dim_value)
    dtype = str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
    var = relax.Var(value.name, relax.TensorType(shape, dtype))
    state.values[value.name] = var
    return var


def _declare_initializers(state: _Import, graph: onnx.GraphProto) -> None:
    """Floating-point initialisers become parameters; integers (shapes, axes, ranges) become numbers."""
    for initializer in graph.initializer:
        array = numpy_helper.to_array(initializer)
        if np.issubdtype(array.dtype, np.integer):
            state.values[initializer.name] = Integers(array.ravel().tolist(), scalar=array.ndim == 0)
        else:
            state.add_weight(initializer.name, array)


def _convert(state: _Import, node: onnx.NodeProto, opset: int) -> None:
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    try:
        results = CONVERTERS[node.op_type](state, node, attributes)
    except UserError as error:
        raise UserError(f"node {node.name!r} ({node.op_type}, ai.onnx opset {opset}): {error}") from error
    results = results if isinstance(results, tuple) else (results,)
    if len(node.output) != len(results):
        raise UserError(
            f"node {node.name!r} ({node.op_type}, ai.onnx opset {opset}): outputs {', '.join(node.output)} are not "
            f"supported, only the first {len(results)}"
        )
    for name, result in zip(node.output, results, strict=True):
        known = isinstance(result, Integers | relax.Var)
        state.values[name] = result if known else state.builder.emit(result, name_hint=name)


def _refuse_unless(attributes: dict[str, Any], **expected: Any) -> None:
    """Raise UserError if an attribute is present with a value other than the one that is supported."""
    for name, value in expected.items():
        found = attributes.get(name, value)
        if found != value:
            raise UserError(f"attribute {name}={found!r} is not supported, only {value!r}")


# ---- index arithmetic ----


def _shape(state: _Import, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    return Integers(state.shape(node.input[0])[attributes.get("start", 0) : attributes.get("end")])


def _squeeze(state: _Import, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    return Integers(state.integers(node.input[0]), scalar=True)


def _range(state: _Import, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    start, stop, step = (state.integers(name)[0] for name in node.input)
    return op.arange(relax.prim_value(start), relax.prim_value(stop), relax.prim_value(step), dtype="int64")


def _concat(state: _Import, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    if all(isinstance(state.values[name], Integers) for name in node.input):
        return Integers([item for name in node.input for item in state.integers(name)])
    return op.concat([state.tensor(name) for name in node.input], axis=attributes["axis"])


# ---- tensors ----


def _gather(state: _Import, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    return op.take(
        state.tensor(node.input[0]), state.tensor(node.input[1]), axis=attributes.get("axis", 0), mode="clip"
    )


def _add(state: _Import, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    return op.add(*(_as_tensor(state, name) for name in node.input))


def _as_tensor(state: _Import, name: str) -> relax.Expr:
    """A tensor, made of one number if need be."""
    value = state.values[name]
    if not isinstance(value, Integers) or len(value.values) != 1:
        return state.tensor(name)
    (number,) = value.values
    return state.builder.emit(op.arange(relax.prim_value(number), relax.prim_value(number + 1), dtype="int64"))


def _unsqueeze(state: _Import, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    return op.expand_dims(state.tensor(node.input[0]), state.integers(node.input[1]))


def _expand(state: _Import, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    return op.broadcast_to(state.tensor(node.input[0]), state.integers(node.input[1]))


def _slice(state: _Import, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Whole or from the end on, one axis: [-1:] is from T - 1 to T."""
    x = state.tensor(node.input[0])
    (start,), (stop,), (axis,) = (state.integers(name) for name in node.input[1:4])
    if len(node.input) > 4 and state.integers(node.input[4]) != [1]:
        raise UserError(f"steps {state.integers(node.input[4])} are not supported, only 1")
    size = x.ty.shape.values[axis]
    start, stop = (size + end if end < 0 else end for end in (start, stop))
    return op.strided_slice(x, [axis], [start], [size if stop >= LARGE else stop], assume_inbound=True)


def _gemm(state: _Import, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """a·b + c: a linear layer on [B·T, C], of which the one on [B, T, C] is made that the passes know."""
    _refuse_unless(attributes, alpha=1.0, beta=1.0, transA=0)
    a, b = state.tensor(node.input[0]), state.tensor(node.input[1])
    x = _before_reshape(state, a)
    x = x if x.ty.shape.values[-1] == a.ty.shape.values[-1] else a
    y = state.builder.emit(op.matmul(x, state.builder.emit(op.permute_dims(b)) if attributes.get("transB") else b))
    if len(node.input) > 2:
        y = state.builder.emit(op.add(y, state.tensor(node.input[2])))
    return y if x is a else op.reshape(y, [a.ty.shape.values[0], y.ty.shape.values[-1]])


def _before_reshape(state: _Import, x: relax.Expr) -> relax.Expr:
    """What a tensor was before it was reshaped, or the tensor itself."""
    binding = state.builder.lookup_binding(x) if isinstance(x, relax.Var) else None
    reshaped = isinstance(binding, relax.Call) and binding.op == tvm.ir.Op.get("relax.reshape")
    return binding.args[0] if reshaped else x


def _layer_norm(state: _Import, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    _refuse_unless(attributes, stash_type=1)
    x, gain = state.tensor(node.input[0]), state.tensor(node.input[1])
    if attributes.get("axis", -1) not in (-1, len(x.ty.shape.values) - 1):
        raise UserError(f"axis={attributes['axis']} is not supported, only the last one")
    if len(node.input) > 2:
        bias = state.tensor(node.input[2])
    else:  # Relax's operator always adds one
        C = int(gain.ty.shape.values[0])
        bias = state.add_weight(f"zeros_{C}", np.zeros(C, str(gain.ty.dtype)))
    return op.nn.layer_norm(x, gain, bias, axes=[-1], epsilon=attributes.get("epsilon", 1e-5))


def _gelu(state: _Import, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    exact = attributes.get("approximate", b"none") == b"none"
    return (op.nn.gelu if exact else op.nn.gelu_tanh)(state.tensor(node.input[0]))


def _split(state: _Import, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    x, axis = state.tensor(node.input[0]), attributes.get("axis", 0)
    if len(node.input) > 1:
        sizes = state.integers(node.input[1])
        parts: int | list[int] = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    else:
        parts = attributes.get("num_outputs", len(node.output))
    pieces = state.builder.emit(op.split(x, parts, axis))
    return tuple(relax.TupleGetItem(pieces, i) for i in range(len(node.output)))


def _reshape(state: _Import, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    x, shape = _before_reshape(state, state.tensor(node.input[0])), state.integers(node.input[1])
    return x if tvm_ffi.structural_equal(relax.ShapeExpr(shape), x.ty.shape) else op.reshape(x, shape)


def _transpose(state: _Import, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    return op.permute_dims(state.tensor(node.input[0]), attributes.get("perm"))


def _attention(state: _Import, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """ai.onnx Attention on q, k, v of [B, nh, T, hs]; Relax's takes [B, T, nh, hs]."""
    _refuse_unless({"is_causal": 0} | attributes, is_causal=1, qk_matmul_output_mode=0, softcap=0.0)
    names = dict(zip(("q", "k", "v", "mask", "past key", "past value", "end"), node.input, strict=False))
    if any(names.get(name) for name in ("mask", "past key", "past value")):
        raise UserError("a mask or a growing cache is not supported; export with --with-cache for a preallocated one")
    shapes = [state.shape(name) for name in node.input[:3]]
    if any(len(shape) != 4 for shape in shapes) or len({int(shape[1]) for shape in shapes}) != 1:
        raise UserError(f"q, k, v of shapes {shapes} are not supported, only [B, nh, T, hs] with one nh")
    scale = attributes.get("scale")
    if names.get("end"):
        return _attention_up_to(state, *(state.tensor(names[name]) for name in ("q", "k", "v", "end")), scale)
    q, k, v = (op.permute_dims(state.tensor(name), [0, 2, 1, 3]) for name in node.input[:3])
    y = op.nn.attention(q, k, v, scale=scale and tvm.tirx.const(scale, "float32"), causal_mask="TopLeft")
    return op.permute_dims(y, [0, 2, 1, 3])


def _attention_up_to(
    state: _Import, q: relax.Expr, k: relax.Expr, v: relax.Expr, end: relax.Expr, scale: float | None
) -> relax.Expr:
    """q [B, nh, T, hs] over k, v [B, nh, S, hs], of which sequence b fills end[b] rows; its queries are the last."""
    scale = int(q.ty.shape.values[3]) ** -0.5 if scale is None else scale

    def scores_up_to(scores: te.Tensor, end: te.Tensor) -> te.Tensor:
        T = scores.shape[2]
        return te.compute(
            scores.shape,
            lambda b, h, t, s: te.if_then_else(
                s <= end[b] - T + t, scores[b, h, t, s], tvm.tirx.min_value(scores.dtype)
            ),
            name="scores_up_to",
        )

    emit = state.builder.emit
    q = emit(op.multiply(q, relax.const(scale, q.ty.dtype)))
    scores = emit(op.matmul(q, emit(op.permute_dims(k, [0, 1, 3, 2]))))  # [B, nh, T, S]
    seen = state.builder.emit_te(scores_up_to, scores, end, primfunc_name_hint="scores_up_to")
    return op.matmul(emit(op.nn.softmax(seen, axis=-1)), v)


def _tensor_scatter(state: _Import, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """ai.onnx TensorScatter: rows [B, nh, T, hs] written into cache [B, nh, S, hs] from pos[b] on."""
    _refuse_unless({"axis": -2} | attributes, mode=b"linear")
    cache, rows, pos = (state.tensor(name) for name in node.input)
    if len(cache.ty.shape.values) != 4 or attributes.get("axis", -2) not in (-2, 2):
        raise UserError("only axis 2 of [B, nh, S, hs] is supported")

    def tensor_scatter(cache: te.Tensor, rows: te.Tensor, pos: te.Tensor) -> te.Tensor:
        T = rows.shape[2]
        return te.compute(
            cache.shape,
            lambda b, h, s, d: te.if_then_else(
                te.all(s >= pos[b], s < pos[b] + T),
                rows[b, h, te.max(te.min(s - pos[b], T - 1), 0), d],
                cache[b, h, s, d],
            ),
            name="tensor_scatter",
        )

    return state.builder.emit_te(tensor_scatter, cache, rows, pos, primfunc_name_hint="tensor_scatter")


def _on_tensors(operator: Callable[..., relax.Expr]) -> Converter:
    """An operator of Relax on the same tensors."""
    return lambda state, node, attributes: operator(*map(state.tensor, node.input))


CONVERTERS: dict[str, Converter] = {
    "Add": _add,
    "Attention": _attention,
    "Concat": _concat,
    "Expand": _expand,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "LayerNormalization": _layer_norm,
    "MatMul": _on_tensors(op.matmul),
    "Mul": _on_tensors(op.multiply),
    "Pow": _on_tensors(op.power),
    "Range": _range,
    "Relu": _on_tensors(op.nn.relu),
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tanh": _on_tensors(op.tanh),
    "TensorScatter": _tensor_scatter,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
