"""The options of a compilation, which the commands, the pipeline and Relay share."""

from dataclasses import dataclass, field
from pathlib import Path

from tvm_frontend.frontends import DEFAULT


@dataclass(frozen=True)
class CompileOptions:
    """Says how to compile a model; the file to read and the folder to write are arguments beside it.

    target: `llvm` or `cuda`. mcpu: the host CPU by LLVM's name, None for this machine's. arch: the GPU archs with
    commas between them, as `sm_80,sm_86`; None for the default. opt_level: 0 or 3, with Relay 0 to 3. precision: of
    the products, None for the target's default. frontend: one of FRONTENDS, or `relay`. fixed_shape: the one [B, T]
    to compile for, where the frontend needs one; None for all. cuda_compiler: `auto`, `nvcc` or `nvrtc`. fast_math:
    whether CUDA code may use fast division, roots and functions. without: names of phases to leave out. dump_ir:
    the folder for the IR after each phase, None to write none. check: whether to run what was made, as
    `tvm_frontend.check` does, before it gets its name; the commands do. shapes: of some inputs of a file that
    others wrote, by name, to compile it for these alone.
    """

    target: str = "llvm"
    mcpu: str | None = None
    arch: str | None = None
    opt_level: int = 3
    precision: str | None = None
    frontend: str = DEFAULT
    fixed_shape: tuple[int, int] | None = None
    cuda_compiler: str = "auto"
    fast_math: bool = False
    without: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dump_ir: Path | None = None
    check: bool = False


DEFAULT_OPTIONS = CompileOptions()
