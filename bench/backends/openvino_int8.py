"""OpenVINO's CPU plugin on the exported files with their weights in 8 bits, by NNCF."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bench.artifacts import OPENVINO, OPENVINO_PAST, Artifacts
from bench.backends import openvino


def files_of(bits: int) -> dict[str, str]:
    """Each phase with the folder that it needs."""
    past = OPENVINO_PAST.format(bits)
    return {"prefill": OPENVINO.format(bits), "decode": past, "generate": past}


@dataclass(frozen=True)
class Quantized(Artifacts):
    """The same folder, the quantised files in the others' place."""

    bits: int

    @property
    def exported(self) -> Path:
        return self.folder / OPENVINO.format(self.bits) / "model.xml"

    @property
    def past(self) -> Path:
        return self.folder / OPENVINO_PAST.format(self.bits) / "model.xml"


class Engine(openvino.Engine):
    """As in float32, but for the files; activations are quantised as the plugin sees fit."""

    requires: ClassVar[dict[str, str]] = openvino.Engine.requires | {"nncf": "nncf"}
    summary = "OpenVINO, CPU plugin, weights in 8 bits; the limit beside it is float32's"
    dtype = "int8"
    bits: ClassVar[int] = 8
    variants: ClassVar[dict[str, dict[str, str]]] = {"": files_of(bits)}

    def _load(self, artifacts: Artifacts, threads: int, variant: str) -> None:
        super()._load(Quantized(artifacts.folder, self.bits), threads, variant)
