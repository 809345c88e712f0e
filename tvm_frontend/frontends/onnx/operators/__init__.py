"""Converts each operator of ONNX to Relax: one kind of operator a file."""

from tvm_frontend.frontends.onnx.operators import attention, elementwise, layers, shapes
from tvm_frontend.frontends.onnx.operators.context import Converter

CONVERTERS: dict[str, Converter] = dict(
    sorted((attention.CONVERTERS | elementwise.CONVERTERS | layers.CONVERTERS | shapes.CONVERTERS).items())
)
