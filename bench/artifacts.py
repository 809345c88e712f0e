"""Where the files of one model lie. Standard library only."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Artifacts:
    """The folder of one model: its checkpoint, its export, and its compiled forms, each made from the one before."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        """The trained or seeded weights."""
        return self.folder / "ckpt.pt"

    @property
    def exported(self) -> Path:
        """The ONNX file."""
        return self.folder / "model.onnx"

    def compiled(self, level: str) -> Path:
        """The directory that TVM compiled for this CPU at opt level `O0` or `O3`."""
        return self.folder / f"tvm-llvm-{level}"
