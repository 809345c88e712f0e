"""Names and paths of the files of one model. Imports the standard library only."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# File names within a folder; each engine declares which of them it needs.
CHECKPOINT = "ckpt.pt"
EXPORTED = "model.onnx"
CACHED = "model-cache.onnx"
PAST = "model-past.onnx"
COMPILED_O0 = "tvm-llvm-O0"
COMPILED_O3 = "tvm-llvm-O3"
COMPILED_CACHED = "tvm-llvm-O3-cache"
COMPILED_LOW = ("tvm-llvm-O3-{}", "tvm-llvm-O3-{}-cache")  # {} is a precision
COMPILED_RELAY = "tvm-llvm-O{}-relay"  # {} is an opt level; a folder with a compiled model per shape, such as 1x64
CTRANSLATE2 = "ctranslate2"
EXPORTED_INT8 = "model-int8.onnx"
CACHED_INT8 = "model-cache-int8.onnx"
OPENVINO = "model-openvino-int{}"
OPENVINO_PAST = "model-past-openvino-int{}"
DEVICE_CACHED = "model-cache-unproven{}.onnx"  # exported with proof=False; {} is -bf16, -fp16 or empty
DEVICE_LAST = "model-last-unproven.onnx"  # no cache; logits of the last position alone
DEVICE_RELAY = (
    "tvm-{}-O3-unproven-relay"  # {} is a target's name; compiled from DEVICE_LAST, laid out as COMPILED_RELAY
)
DEVICE_COMPILED = (
    "tvm-{}-O0-unproven-cache",
    "tvm-{}-O3-bf16-unproven-cache",
)  # {} is a target's name; compiled from DEVICE_CACHED
# An external ONNX file is one for all phases, and so is what is made of it: each of these names is that of another.
OF_ONE_FILE = {
    CACHED: EXPORTED,
    PAST: EXPORTED,
    COMPILED_CACHED: COMPILED_O3,
    CACHED_INT8: EXPORTED_INT8,
    **{COMPILED_LOW[1].format(precision): COMPILED_LOW[0].format(precision) for precision in ("bf16", "int8", "int4")},
    **{OPENVINO_PAST.format(bits): OPENVINO.format(bits) for bits in (8, 4)},
}


@dataclass(frozen=True)
class Artifacts:
    """The folder of one model: its checkpoint, exports and compiled forms, each built from one of those before it.

    onnx: the external ONNX file that stands for the exports, if there is one; the folder then has what is made of it.
    """

    folder: Path
    onnx: Path | None = field(default=None, kw_only=True)

    def __getstate__(self) -> dict[str, Any]:
        """Spell paths as text: Python 3.13 pickles them by a name that Relay's, which is older, does not have."""
        return vars(self) | {"folder": str(self.folder), "onnx": self.onnx and str(self.onnx)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"folder": Path(state["folder"]), "onnx": state["onnx"] and Path(state["onnx"])})

    @property
    def checkpoint(self) -> Path:
        """Return the path of the trained or seeded weights."""
        return self.folder / CHECKPOINT

    @property
    def exported(self) -> Path:
        """Return the path of the ONNX file of the forward pass."""
        return self.path(EXPORTED)

    @property
    def cached(self) -> Path:
        """Return the path of the ONNX file with a preallocated KV cache."""
        return self.path(CACHED)

    def name_of(self, name: str) -> str:
        """Return the name under which a file is kept: of an external ONNX file, one serves all phases."""
        return name if self.onnx is None else OF_ONE_FILE.get(name, name)

    def path(self, name: str) -> Path:
        """Return the path of one of the files, by its name."""
        name = self.name_of(name)
        return self.onnx if self.onnx is not None and name == EXPORTED else self.folder / name
