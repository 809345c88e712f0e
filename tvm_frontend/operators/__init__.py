"""What each operator of ONNX becomes in Relax: one kind a file."""

from tvm_frontend.operators import elementwise, layers, shapes
from tvm_frontend.operators.reading import Converter

CONVERTERS: dict[str, Converter] = dict(
    sorted((elementwise.CONVERTERS | layers.CONVERTERS | shapes.CONVERTERS).items())
)
