"""ONNX to a compiled library.

python -m tvm_frontend.compile                                   # artifacts/model.onnx for this machine's CPU
python -m tvm_frontend.compile --opt-level 0                     # TVM's own untuned pipeline, to compare with
python -m tvm_frontend.compile --target cuda --arch sm_86        # cross-compiles: no GPU needed
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import onnx
import tvm
import tvm_ffi
import tyro
from tvm.support.cc import get_cc

from export.artifact import ExportedModel, exported_from, read_proto
from gpt.cli import UserError, run_command
from gpt.files import atomic_output
from tvm_frontend.artifact import LIBRARY, CompiledModel, is_ours, load_compiled, save_compiled
from tvm_frontend.cuda_toolchain import find_compiler, verify_cuda_library
from tvm_frontend.importer import check_operators
from tvm_frontend.pipeline import OPT_LEVELS, compile_onnx
from tvm_frontend.schedules import PRECISIONS
from tvm_frontend.target import resolve_target

FOLDER_SUFFIXES = {"forward": "", "cached": "-cache"}  # by the form of the export


def compile_model(
    model: Path,
    output: Path | None = None,
    *,
    target: str = "llvm",
    mcpu: str | None = None,
    arch: str | None = None,
    opt_level: int = 3,
    precision: str = "fp32",
    cuda_compiler: str = "auto",
    dump_ir: Path | None = None,
) -> CompiledModel:
    """Compile an ONNX file written by `export.onnx`; one artifact serves every B, and every T up to block_size.

    The result is a folder, `tvm-<llvm or arch>-O<level>` (`…-cache` of a model with a KV cache) beside the ONNX file
    unless `output` names another, and it is there whole or not at all. Raises UserError for a bad file, target, arch
    or output.
    """
    if opt_level not in OPT_LEVELS:
        raise UserError(f"opt level {opt_level}: must be 0 ({OPT_LEVELS[0]}) or 3 ({OPT_LEVELS[3]})")
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r}: must be one of {', '.join(PRECISIONS)}")
    if precision != "fp32" and (opt_level == 0 or target != "llvm"):
        raise UserError(f"precision {precision}: only with --target llvm and --opt-level 3, whose kernels know it")
    for exception in (KeyboardInterrupt, UserError):  # else TVM hands on what a rewrite raises as a RuntimeError
        tvm_ffi.register_error(exception.__name__, exception)
    if get_cc() is None:
        raise UserError("no C++ compiler on PATH, and one must link the library: install g++ or clang++")
    compile_for = resolve_target(target, mcpu=mcpu, arch=arch)
    if compile_for.kind == "cuda":
        find_compiler(cuda_compiler)  # say at once what is missing, not after the import
    proto = read_proto(model)
    try:
        exported = exported_from(proto, model)
    except UserError:
        check_operators(proto)  # of a file not made by us, a node that cannot be read says more
        raise
    _check_form(exported)
    check_operators(proto)
    if exported.weights is not None:
        onnx.load_external_data_for_model(proto, str(exported.weights.parent))
    output = output or model.with_name(f"tvm-{compile_for.name}-O{opt_level}{_suffix(exported, precision)}")
    if output.exists() and not is_ours(output):
        raise UserError(f"{output}: exists and is no compiled model, so it is not replaced; choose another with -o")
    with atomic_output(output, directory=True) as folder:
        compiled = compile_onnx(
            proto, compile_for, opt_level, precision=precision, cuda_compiler=cuda_compiler, dump_ir=dump_ir
        )
        save_compiled(
            folder,
            compiled.executable,
            compiled.graph.weights,
            {
                "config": asdict(exported.config),
                "tokenizer": exported.tokenizer,
                "dtype": exported.dtype,
                "form": exported.form,
                "precision": precision,
                "target": compile_for.to_json(),
                "opt_level": opt_level,
                "pipeline": list(compiled.phases_s),
                "phases_s": compiled.phases_s,
                "exported_sha256": exported.sha256,
                "checkpoint_sha256": exported.checkpoint_sha256,
                "versions": {"apache-tvm": tvm.__version__, "apache-tvm-ffi": tvm_ffi.__version__},
            },
        )
        if compile_for.kind == "cuda":
            verify_cuda_library(folder / LIBRARY, compile_for.arch)
    return load_compiled(output)


def _suffix(exported: ExportedModel, precision: str) -> str:
    return ("" if precision == "fp32" else f"-{precision}") + FOLDER_SUFFIXES[exported.form]


def _check_form(exported: ExportedModel) -> None:
    if exported.form not in FOLDER_SUFFIXES:
        raise UserError(
            f"{exported.path}: keeps its cache as {exported.form}, which grows with each token; "
            "export with --with-cache for a preallocated one"
        )
    if exported.dtype != "float32":
        raise UserError(
            f"{exported.path}: of {exported.precision}, and only fp32 is compiled; export with --precision fp32"
        )


def compile_command(
    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ONNX")] = Path("artifacts/model.onnx"),
    output: Annotated[
        Path | None,
        tyro.conf.arg(
            aliases=["-o"],
            metavar="DIR",
            help_behavior_hint="(default: tvm-llvm-O3, tvm-sm_86-O3, … beside the model)",
        ),
    ] = None,
    target: str = "llvm",
    mcpu: Annotated[
        str | None, tyro.conf.arg(metavar="CPU", help_behavior_hint="(default: this machine's, as LLVM detects it)")
    ] = None,
    arch: Annotated[str | None, tyro.conf.arg(metavar="SM", help_behavior_hint="(default for cuda: sm_86)")] = None,
    opt_level: Literal[0, 3] = 3,
    precision: Literal["fp32", "bf16", "int8"] = "fp32",
    compiler: Literal["auto", "nvcc", "nvrtc"] = "auto",
    dump_ir: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: not written)")] = None,
    print_pass_times: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> None:
    """Compile an exported model with TVM, for this machine's CPU or for an NVIDIA GPU.

    Args:
        model: a file written by python -m export.onnx
        output: the folder to write
        target: llvm (the CPU) or cuda
        mcpu: the CPU to compile for, by LLVM's name
        arch: the GPU to compile for; none needs to be present
        opt_level: 0 is TVM's own untuned pipeline, 3 this project's rewrites and schedules
        precision: of the products of linear layers; bf16 and int8 round weights and inputs, sums are wide
        compiler: what makes CUDA machine code; auto takes nvcc if it is there, else NVRTC
        dump_ir: write the IR after each phase into this folder
        print_pass_times: print how long each phase and each of TVM's passes took
    """
    timing = tvm.ir.instrument.PassTimingInstrument()
    with tvm.transform.PassContext(instruments=[timing] if print_pass_times else []):
        compiled = compile_model(
            model,
            output,
            target=target,
            mcpu=mcpu,
            arch=arch,
            opt_level=opt_level,
            precision=precision,
            cuda_compiler=compiler,
            dump_ir=dump_ir,
        )
        if print_pass_times:
            print(f"TVM's passes:\n{timing.render()}")
            print("phases:")
            for name, seconds in compiled.phases_s.items():
                print(f"  {seconds:8.3f} s  {name}")
    size_mb = sum(file.stat().st_size for file in compiled.path.iterdir()) / 1e6
    for_what = compiled.target["arch"] or compiled.target["mcpu"]
    print(
        f"wrote {compiled.path} ({size_mb:.1f} MB, {target} {for_what}, opt level {opt_level}, "
        f"{sum(compiled.phases_s.values()):.1f} s)"
    )


def main() -> None:
    """Parse the command line and compile."""
    tyro.cli(compile_command, prog="python -m tvm_frontend.compile")


if __name__ == "__main__":
    run_command(main)
