"""Runs an ONNX file in float64 by ONNX's reference evaluator, whoever wrote it: what its engines are compared with."""

from collections.abc import Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, inliner
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from bench.correctness.contrib import CONTRIB, Op, Product, dynamically_quantized, erf, gelu
from gpt.cli import UserError

FLOATS: dict[int, Any] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.BFLOAT16: ml_dtypes.bfloat16,
    TensorProto.DOUBLE: np.float64,
}
# Attributes that name a type: of a cast, of what a softmax or a division computes in, of what comes out.
TYPES = ("to", "dtype", "softmax_precision", "output_dtype", "precision")
OF_ONNX = ("", "ai.onnx")


class Erf(OpRun):
    """ONNX's own rounds to float32."""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        return (erf(x),)


class Gelu(OpRun):
    """ONNX's own is a function with float32 constants."""

    def _run(self, x: np.ndarray, approximate: str = "none") -> tuple[np.ndarray]:
        return (gelu(x, tanh=approximate == "tanh"),)


class LayerNormalization(OpRun):
    """Takes every stash_type, and files older than ONNX's own LayerNormalization, which ONNX Runtime writes."""

    def _run(
        self,
        x: np.ndarray,
        scale: np.ndarray,
        bias: np.ndarray | None = None,
        axis: int = -1,
        epsilon: float = 1e-5,
        stash_type: int = 1,
    ) -> tuple[np.ndarray, ...]:
        axes = tuple(range(axis % x.ndim, x.ndim))
        mean = x.mean(axes, keepdims=True)
        inverse = 1 / np.sqrt(((x - mean) ** 2).mean(axes, keepdims=True) + np.asarray(epsilon, x.dtype))
        y = (x - mean) * inverse * scale
        return (y if bias is None else y + bias), mean, inverse


class DequantizeLinear(OpRun):
    """ONNX's own rounds whole numbers of 32 bits to float32, which have 24."""

    def _run(
        self,
        x: np.ndarray,
        scale: np.ndarray,
        zero_point: np.ndarray | None = None,
        axis: int = 1,
        block_size: int = 0,
        output_dtype: int = 0,
    ) -> tuple[np.ndarray]:
        def spread(parameter: np.ndarray) -> np.ndarray:
            if block_size:
                whole = np.repeat(parameter, block_size, axis)
                return whole[(slice(None),) * (axis % x.ndim) + (slice(x.shape[axis]),)]
            dims = [1] * x.ndim
            if parameter.size > 1:
                dims[axis] = parameter.size
            return parameter.reshape(dims)

        dtype = FLOATS[output_dtype] if output_dtype else scale.dtype
        wide = x.astype(np.float64)
        if zero_point is not None:
            wide = wide - spread(zero_point.astype(np.float64))
        return ((wide * spread(scale.astype(np.float64))).astype(dtype),)


class DynamicQuantizeLinear(OpRun):
    """ONNX's own computes the scale in float32."""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        return dynamically_quantized(x)


class MatMul(Op):
    """A product of two matrices, or of many."""

    def _run(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray]:
        return (self.product_of(a, b),)


class Gemm(Op):
    """A product of two matrices, and what is added to it."""

    def _run(
        self,
        a: np.ndarray,
        b: np.ndarray,
        c: np.ndarray | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
        transA: int = 0,
        transB: int = 0,
    ) -> tuple[np.ndarray]:
        product = self.product_of(a.T if transA else a, b.T if transB else b) * np.asarray(alpha, a.dtype)
        return (product if c is None else product + np.asarray(beta, a.dtype) * c,)


OWN: tuple[type[OpRun], ...] = (
    Erf,
    Gelu,
    LayerNormalization,
    DequantizeLinear,
    DynamicQuantizeLinear,
    MatMul,
    Gemm,
    *CONTRIB,
)


def evaluator_of(
    proto: onnx.ModelProto, product: Product | None = None, ops: Iterable[type[OpRun]] = ()
) -> ReferenceEvaluator:
    """Build ONNX's reference evaluator, with operators of its own and of ONNX Runtime's that compute as precisely.

    product: computes each product of matrices, by the two and the name of its result; by default numpy. ops: take the
    place of operators. Raises UserError for an operator that has no definition here.
    """
    check_known(proto)
    own = list(OWN)
    if product is not None:
        by_product = {"product": staticmethod(product)}
        own = [type(op.__name__, (op,), by_product) if issubclass(op, Op) else op for op in own]
    return ReferenceEvaluator(proto, new_ops=[*own, *ops])


def check_known(proto: onnx.ModelProto) -> None:
    """Raise UserError for an operator that has no definition here, so that nothing could be compared."""
    own = {(op.op_domain, op.__name__) for op in OWN}
    local = {(function.domain, function.name) for function in proto.functions}
    for node in _nodes(proto.graph):
        domain = "" if node.domain in OF_ONNX else node.domain
        if (domain, node.op_type) in own | local or (domain == "" and onnx.defs.has(node.op_type)):
            continue
        name = f"{node.op_type}{f' of domain {domain}' if domain else ''}"
        raise UserError(f"no float64 reference: operator {name} is not defined in ONNX, nor known here")


def inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Write out the functions of a file where they are called."""
    return inliner.inline_local_functions(proto) if proto.functions else proto


def widened(proto: onnx.ModelProto, to: int = TensorProto.DOUBLE) -> onnx.ModelProto:
    """Copy a model with every floating tensor, attribute, cast, input and output of another type, by default float64.

    Functions of the file are written out, and domains that it uses and does not name are named. to: a type of
    onnx.TensorProto.
    """
    wide = onnx.ModelProto()
    wide.CopyFrom(inlined(proto))
    for node in _nodes(wide.graph):
        node.domain = "" if node.domain in OF_ONNX else node.domain
    named = {entry.domain for entry in wide.opset_import}
    for domain in sorted({node.domain for node in _nodes(wide.graph)} - named):
        wide.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    _widen(wide.graph, to)
    return wide


def _widen(graph: onnx.GraphProto, to: int) -> None:
    for tensor in graph.initializer:
        _widen_tensor(tensor, to)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                _widen(attribute.g, to)
            elif attribute.type == AttributeProto.TENSOR:
                _widen_tensor(attribute.t, to)
            elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                values = np.array(onnx.helper.get_attribute_value(attribute), FLOATS[to])
                attribute.CopyFrom(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(values)))
            elif attribute.name in TYPES and attribute.i in FLOATS:
                attribute.i = to
        if node.op_type == "ConstantOfShape" and not node.attribute:  # of float32 zeros, if it does not say
            zero = onnx.numpy_helper.from_array(np.zeros(1, FLOATS[to]))
            node.attribute.append(onnx.helper.make_attribute("value", zero))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in FLOATS:
            value.type.tensor_type.elem_type = to
    graph.ClearField("value_info")


def _widen_tensor(tensor: TensorProto, to: int) -> None:
    if tensor.data_type in FLOATS and tensor.data_type != to:
        array = onnx.numpy_helper.to_array(tensor).astype(FLOATS[to])
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _nodes(attribute.g)
