"""OpenVINO's CPU plugin on the exported files with their weights in 4 bits, by NNCF."""

from typing import ClassVar

from bench.backends import openvino_int8
from bench.backends.openvino_int8 import files_of


class Engine(openvino_int8.Engine):
    """As in 8 bits, but for the files."""

    summary = "OpenVINO, CPU plugin, weights in 4 bits, tables and head in 8; the limit beside it is float32's"
    dtype = "int4"
    bits: ClassVar[int] = 4
    variants: ClassVar[dict[str, dict[str, str]]] = {"": files_of(bits)}
