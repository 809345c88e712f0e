"""Where the files of one model lie. Standard library only."""

from dataclasses import dataclass
from pathlib import Path

# The files of a folder by their names: which of them an engine works on, it says itself.
CHECKPOINT = "ckpt.pt"
EXPORTED = "model.onnx"
CACHED = "model-cache.onnx"
PAST = "model-past.onnx"
COMPILED_O0 = "tvm-llvm-O0"
COMPILED_O3 = "tvm-llvm-O3"
COMPILED_CACHED = "tvm-llvm-O3-cache"
COMPILED_LOW = ("tvm-llvm-O3-{}", "tvm-llvm-O3-{}-cache")  # of a precision
COMPILED_RELAY = "tvm-llvm-O{}-relay"  # of an opt level: a folder with a compiled model for each shape, as 1x64
CTRANSLATE2 = "ctranslate2"
EXPORTED_INT8 = "model-int8.onnx"
CACHED_INT8 = "model-cache-int8.onnx"
OPENVINO = "model-openvino-int{}"
OPENVINO_PAST = "model-past-openvino-int{}"
DEVICE_CACHED = "model-cache-unproven{}.onnx"  # as `export.onnx` writes it with proof=False; of a precision, if -bf16
DEVICE_LAST = "model-last-unproven.onnx"  # no cache, and logits of the last position alone
DEVICE_RELAY = "tvm-{}-O3-unproven-relay"  # of a target's name, from that: as COMPILED_RELAY
DEVICE_COMPILED = ("tvm-{}-O0-unproven-cache", "tvm-{}-O3-bf16-unproven-cache")  # of a target's name, from that


@dataclass(frozen=True)
class Artifacts:
    """The folder of one model: its checkpoint, its exports, and their compiled forms, each made from one before."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        """The trained or seeded weights."""
        return self.folder / CHECKPOINT

    @property
    def exported(self) -> Path:
        """The ONNX file of the forward pass."""
        return self.folder / EXPORTED

    @property
    def cached(self) -> Path:
        """The ONNX file over a preallocated KV cache."""
        return self.folder / CACHED
