"""Converts each operator of ONNX to Relax: one kind of operator a file."""

import onnx

from tvm_frontend.frontends.onnx.operators import attention, contrib, control, elementwise, layers, quantized, shapes
from tvm_frontend.frontends.onnx.operators.context import Converter

KINDS = (attention, contrib, control, elementwise, layers, quantized, shapes)
# By the operator's name, with its domain before it where that is not ONNX's own: Gelu, com.microsoft.FastGelu.
CONVERTERS: dict[str, Converter] = dict(sorted(pair for kind in KINDS for pair in kind.CONVERTERS.items()))


def converter_key(node: onnx.NodeProto) -> str:
    """Give the key of CONVERTERS for a node: `Operator`, or `domain.Operator` outside of ONNX's own domain."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
