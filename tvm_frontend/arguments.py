"""The arguments that the commands `tvm_frontend.compile` and `tvm_frontend.tune` share, as types for tyro."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

ModelArgument = Annotated[
    tyro.conf.Positional[Path | None],
    tyro.conf.arg(metavar="MODEL", help_behavior_hint="(default: artifacts/model.onnx; torch: artifacts/ckpt.pt)"),
]
CpuArgument = Annotated[
    str | None, tyro.conf.arg(metavar="CPU", help_behavior_hint="(default: this machine's, as LLVM detects it)")
]
FrontendArgument = Literal["onnx", "relax-onnx", "torch", "relay"]  # the FRONTENDS, and RELAY
FolderArgument = Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: not written)")]


def default_model(frontend: str) -> Path:
    """Name the file that a command compiles if it is given none."""
    return Path("artifacts/ckpt.pt" if frontend == "torch" else "artifacts/model.onnx")
