"""ONNX Runtime's CPU provider on the exported files as its own dynamic quantisation makes them."""

from pathlib import Path
from typing import ClassVar

from bench.artifacts import CACHED_INT8, EXPORTED_INT8, Artifacts
from bench.backends import onnxruntime


class Quantized(Artifacts):
    """The same folder, the quantised files in the others' place."""

    @property
    def exported(self) -> Path:
        return self.folder / EXPORTED_INT8

    @property
    def cached(self) -> Path:
        return self.folder / CACHED_INT8


class Engine(onnxruntime.Engine):
    """As in float32, but for the files."""

    summary = "ONNX Runtime, CPU provider, weights and activations in 8 bits; the limit beside it is float32's"
    dtype = "int8"
    variants: ClassVar[dict[str, dict[str, str]]] = {
        "": {"prefill": EXPORTED_INT8, "decode": CACHED_INT8, "generate": CACHED_INT8}
    }

    def _load(self, artifacts: Artifacts, threads: int, variant: str) -> None:
        super()._load(Quantized(artifacts.folder), threads, variant)
