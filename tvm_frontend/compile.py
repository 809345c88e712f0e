"""Compiles a model to a library.

python -m tvm_frontend.compile                                   # artifacts/model.onnx for this machine's CPU
python -m tvm_frontend.compile --opt-level 0                     # TVM's own untuned pipeline, to compare with
python -m tvm_frontend.compile --target cuda --arch sm_86        # cross-compiles: no GPU needed
python -m tvm_frontend.compile --frontend torch artifacts/ckpt.pt
python -m tvm_frontend.compile --frontend relay --batch 1 --tokens 64    # by TVM's former importer, after `make relay`
"""

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is one line too
    from gpt.cli import run_main

    run_main("tvm_frontend.compile")

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tvm
import tvm_ffi
import tyro
from tvm.support.cc import get_cc

from export.signature import Signature
from gpt.cli import UserError, disk_trouble
from gpt.files import atomic_output, check_replaceable, find_input
from gpt.version import PROJECT, project_version
from tvm_frontend.arguments import CpuArgument, FolderArgument, FrontendArgument, ModelArgument, default_model
from tvm_frontend.artifact import (
    CACHED,
    PLAIN,
    RELAY,
    CompiledModel,
    is_ours,
    library_name,
    load_compiled,
    save_compiled,
)
from tvm_frontend.check import check_only, check_or_why_not
from tvm_frontend.coverage import Coverage
from tvm_frontend.cuda_toolchain import find_compiler, verify_cuda_library
from tvm_frontend.frontends import DEFAULT, Source, read_source
from tvm_frontend.graph import ENTRY, Graph
from tvm_frontend.kernels import PRECISIONS, Precision
from tvm_frontend.kernels.cuda import FORMATS, OLDEST_ARCH
from tvm_frontend.options import DEFAULT_OPTIONS, CompileOptions
from tvm_frontend.passes.preallocate import NotPossible, preallocate
from tvm_frontend.pipeline import OPT_LEVELS, Compiled, compile_graph
from tvm_frontend.relay.compile import OptLevel, compile_relay
from tvm_frontend.target import CompileTarget, resolve_target
from tvm_frontend.tvm_patches import register_errors

if TYPE_CHECKING:
    from tvm_frontend.search import Search

FORMS = {"forward": "", "cached": "cache", "graph": ""}  # each form of an export with its word in the folder's name


def compile_model(
    model: Path,
    output: Path | None = None,
    options: CompileOptions = DEFAULT_OPTIONS,
    *,
    search: "Search | None" = None,
    say: Callable[[str], object] = lambda line: None,
) -> CompiledModel:
    """Compile a file that one of the FRONTENDS or Relay reads, by default one written by `export.onnx`.

    One artifact serves every B, and every T up to block_size, unless a frontend needs a `fixed_shape` [B, T], and every
    arch that is named. The result is a folder, `tvm-<llvm or archs>-O<level>` (and the precision, `cache` and the
    frontend where they are not the default) beside the model unless `output` names another, and it is there whole or
    not at all. search: schedules the kernels that have no hand schedule; `tvm_frontend.tune` passes it. say: is given
    one line about the check, if the options ask for it. Raises UserError for a bad file, option or output, and
    RuntimeError if the check fails.
    """
    if options.frontend == RELAY:
        return compile_relay(model, output, options, say=say)
    compile_for, precision = _resolve(options)
    if get_cc() is None:
        raise UserError("no C++ compiler on PATH, and one must link the library: install g++ or clang++")
    if compile_for.kind == "cuda":
        find_compiler(options.cuda_compiler)  # a missing compiler is an error before the import, not after it
    elif options.fast_math:
        raise UserError("--fast-math is for --target cuda: leave it out")
    source = read_source(options.frontend, model, options.fixed_shape, options.shapes)
    if search is not None:
        search.check(source, compile_for)
    output = output or model.with_name(_folder_name(replace(options, precision=precision), compile_for, source, search))
    check_replaceable(output, is_ours, "compiled model")
    if search is not None:
        search.keep_in(output.with_name(f"{output.name}-search"))
    register_errors()
    graphs = _graphs(source, options.opt_level)
    with atomic_output(output, directory=True) as folder:
        phases_s: Counter[str] = Counter()
        for one in compile_for.each():
            dump_ir = options.dump_ir / one.name if options.dump_ir and len(compile_for.archs) > 1 else options.dump_ir
            made = {}
            for part, import_graph in graphs.items():
                part_ir = dump_ir / part if dump_ir else None
                one_options = replace(options, precision=precision, dump_ir=part_ir)
                try:
                    made[part] = compile_graph(import_graph, one, one_options, search)
                except NotPossible as why:
                    say(f"its KV cache stays as it is in the file, copied in every step: {why}")
                    continue
                except tvm.error.InternalError as error:
                    if source.form != "graph":
                        raise
                    line = " ".join(str(error).split())[:300]
                    raise UserError(f"{model}: TVM cannot compile what it was read as ({line})") from error
                _link(made[part].executable, folder / library_name(one.arch, part))
                phases_s.update(made[part].phases_s)
        compiled = made[next(reversed(made))]
        weights, names = _shared({part: each.graph.weights for part, each in made.items()})
        save_compiled(
            folder,
            weights,
            {
                "config": source.config and asdict(source.config),
                "tokenizer": source.tokenizer,
                "dtype": source.dtype,
                "form": source.form,
                "frontend": options.frontend,
                "fixed_shape": search.shape if search else options.fixed_shape,
                "precision": precision,
                "target": compile_for.to_json(),
                "opt_level": options.opt_level,
                "entry_points": compiled.graph.entry_points,
                "caches": compiled.graph.caches if source.form == "cached" else [],
                "pipeline": list(phases_s),
                "phases_s": dict(phases_s),
                "kernels": compiled.graph.kernels,
                "launches": compiled.launches,
                "exported_sha256": source.sha256,
                "checkpoint_sha256": source.checkpoint_sha256,
                "search": search.to_json() if search else None,
                "coverage": compiled.coverage.to_json() if compiled.coverage else None,
                "signature": source.signature and replace(source.signature, limits=_limits(made)).to_json(),
                "parts": {
                    part: {
                        "weights": names[part],
                        "entry_points": each.graph.entry_points,
                        "caches": each.graph.caches if part == CACHED else [],
                    }
                    for part, each in made.items()
                    if source.form == "graph"
                },
                "versions": {
                    PROJECT: project_version(),
                    "apache-tvm": tvm.__version__,
                    "apache-tvm-ffi": tvm_ffi.__version__,
                },
            },
        )
        for arch in compile_for.archs:
            for part in made:
                verify_cuda_library(folder / library_name(arch, part), arch)
        if options.check:
            say(check_or_why_not(load_compiled(folder), source.run, source.run_dtype, model, output))
    return load_compiled(output)


def _graphs(source: Source, opt_level: int) -> dict[str, Callable[[], Graph]]:
    """Name the graphs to compile, a library each, as `CompiledModel.parts`; at opt level 0 no cache is changed."""
    graphs = {"": source.import_graph}
    if source.import_plain is not None:
        graphs[PLAIN] = source.import_plain
    signature = source.signature
    if signature is not None and signature.past and signature.longest and not signature.unknown and opt_level > 0:
        graphs[CACHED] = partial(_with_cache, source.import_plain or source.import_graph, signature)
    return graphs


def _with_cache(import_graph: Callable[[], Graph], signature: Signature) -> Graph:
    """Import a file whose cache grows for one that is preallocated. Raises NotPossible."""
    if signature.logits is None or signature.ids is None or signature.longest is None:
        raise NotPossible("its ids or its logits could not be told")
    inputs = [port.name for port in signature.inputs if port.name not in signature.plain]
    outputs = [port.name for port in signature.outputs]
    presents = {inputs.index(past): outputs.index(present) for past, present in signature.presents.items()}
    ids, logits = inputs.index(signature.ids), outputs.index(signature.logits)
    return preallocate(import_graph(), ids, logits, presents, signature.longest)


def _limits(made: Mapping[str, Compiled]) -> dict[str, int]:
    """Give how large sizes may be, by what was found while each graph but that of a preallocated cache was imported."""
    limits: dict[str, int] = {}
    for part in ("", PLAIN):
        attributes = made[part].graph.module[ENTRY].attrs if part in made else {}
        for formula, most in dict(attributes.get("limits", {}) if attributes else {}).items():
            limits[str(formula)] = min(int(most), limits.get(str(formula), int(most)))
    return limits


def _shared(parts: dict[str, dict[str, np.ndarray]]) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Put the weights of several libraries together, equal ones once; give the names of each library's, in order."""
    together: dict[str, np.ndarray] = {}
    names: dict[str, list[str]] = {}
    for part, weights in parts.items():
        names[part] = []
        for name, array in weights.items():
            while name in together and not _same(together[name], array):
                name += "'"
            together[name] = array
            names[part].append(name)
    return together, names


def _same(left: np.ndarray, right: np.ndarray) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return left is right or left.tobytes() == right.tobytes()


def _link(executable: tvm.relax.VMExecutable, library: Path) -> None:
    """Write an executable as a library. Raises UserError if the compiler that links it fails, as on a full disk."""
    try:
        executable.export_library(str(library))
    except RuntimeError as error:
        if not str(error).startswith("Compilation error:"):
            raise
        said = [line.strip() for line in str(error).partition("Command line:")[0].splitlines()[1:] if line.strip()]
        what = disk_trouble(error) or next(iter(said), "it does not say why")
        where = f"{library.parent} or {tempfile.gettempdir()}"
        raise UserError(f"{get_cc()} cannot link the library: {what}; is the disk full, at {where}?") from error


def _resolve(options: CompileOptions) -> tuple[CompileTarget, str]:
    """Give the target and the precision that the options ask for. Raises UserError for what there is not."""
    level, kind = options.opt_level, options.target
    if level not in OPT_LEVELS:
        raise UserError(
            f"opt level {level}: must be 0 ({OPT_LEVELS[0]}) or 3 ({OPT_LEVELS[3]}); --opt-level 1 and 2 are of "
            "--frontend relay"
        )
    target = resolve_target(kind, mcpu=options.mcpu, arch=options.arch)
    known = _precisions(options)
    precision = options.precision or known[0]
    if precision not in known:
        at_level = "" if level > 0 else f" and opt level {level}"
        raise UserError(f"precision {precision!r}: must be one of {', '.join(known)} for target {kind}{at_level}")
    if kind == "cuda" and level > 0 and precision in FORMATS:
        _refuse_older(target.archs, precision)
    return target, precision


def _refuse_older(archs: tuple[str, ...], precision: str) -> None:
    """Raise UserError for an arch that lacks instructions of this project's kernels."""
    number = {arch: int(arch.removeprefix("sm_")) for arch in (*archs, OLDEST_ARCH)}
    if older := [arch for arch in archs if number[arch] < number[OLDEST_ARCH]]:
        raise UserError(
            f"arch {older[0]!r}: the kernels of {precision} need {OLDEST_ARCH} or later; for an older one say "
            "--precision fp32, which TVM's own rules schedule"
        )


def _precisions(options: CompileOptions) -> tuple[str, ...]:
    """List the precisions of a target at an opt level, the default first."""
    return tuple(PRECISIONS[options.target]) if options.opt_level > 0 else ("fp32",)


def _folder_name(options: CompileOptions, target: CompileTarget, source: Source, search: "Search | None") -> str:
    """Name a compiled model's folder after its options where they are not the default."""
    words = [
        f"tvm-{target.name}-O{options.opt_level}",
        options.precision if options.precision != _precisions(options)[0] else "",
        FORMS[source.form],
        options.frontend if options.frontend != DEFAULT else "",
        "fast-math" if options.fast_math else "",
        "-".join(["without", *options.without]) if options.without else "",
        search.name if search else "",
    ]
    return "-".join(filter(None, words))


def _parsed_shapes(words: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Parse `input_ids=1x128`. Raises UserError for another form."""
    shapes = {}
    for word in words:
        name, _, sizes = word.rpartition("=")
        if not name or not re.fullmatch(r"\d+(x\d+)*", sizes):
            raise UserError(f"--shapes {word}: must be the name of an input and its sizes, as input_ids=1x128")
        shapes[name] = tuple(map(int, sizes.split("x")))
    return shapes


def compile_command(
    model: ModelArgument = None,
    output: Annotated[
        Path | None,
        tyro.conf.arg(
            aliases=["-o"],
            metavar="DIR",
            help_behavior_hint="(default: tvm-llvm-O3, tvm-sm_86-O3, … beside the model)",
        ),
    ] = None,
    target: str = "llvm",
    mcpu: CpuArgument = None,
    arch: Annotated[str | None, tyro.conf.arg(metavar="SM,…", help_behavior_hint="(default for cuda: sm_86)")] = None,
    opt_level: OptLevel = 3,
    precision: Annotated[
        Precision | None,
        tyro.conf.arg(help_behavior_hint="(default: fp32, for cuda bf16)"),
    ] = None,
    frontend: FrontendArgument = DEFAULT,
    batch: Annotated[int | None, tyro.conf.arg(metavar="B", help_behavior_hint="(default: any)")] = None,
    tokens: Annotated[int | None, tyro.conf.arg(metavar="T", help_behavior_hint="(default: any)")] = None,
    compiler: Literal["auto", "nvcc", "nvrtc"] = "auto",
    fast_math: tyro.conf.FlagCreatePairsOff[bool] = False,
    shapes: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=AxB", help_behavior_hint="(default: any)")] = (),
    without: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="PHASE", help_behavior_hint="(default: none)")
    ] = (),
    dump_ir: FolderArgument = None,
    print_pass_times: tyro.conf.FlagCreatePairsOff[bool] = False,
    no_check: tyro.conf.FlagCreatePairsOff[bool] = False,
    only_check: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> None:
    """Compile an exported model with TVM, for this machine's CPU or for an NVIDIA GPU.

    Args:
        model: a file written by python -m export.onnx, or any ONNX file of a decoder; for torch a checkpoint
        output: the folder to write
        target: llvm (the CPU) or cuda
        mcpu: the CPU to compile for, by LLVM's name
        arch: the GPU to compile for, or several, as sm_80,sm_86; none needs to be present
        opt_level: 0 is TVM's own untuned pipeline, 3 this project's rewrites and schedules; relay has its own, 0 to 3
        precision: of the products of linear layers; below fp32 their weights and inputs are rounded, sums are wide
            (llvm has fp32, bf16, int8, int4, cuda has bf16, fp16, tf32, fp32)
        frontend: who reads the model: this project's importer, TVM's own importer of ONNX, TVM's of torch.export, or
            Relay, TVM's former one, in the environment that make relay sets up
        batch: compile for this B alone, with --tokens; relay and relax-onnx need it
        tokens: compile for this T alone
        compiler: what makes CUDA machine code; auto takes nvcc if it is there, else NVRTC
        fast_math: let it use fast division, roots and functions, and drop numbers below float32's normal ones
        shapes: fix inputs of somebody else's file, as input_ids=1x128 attention_mask=1x128
        without: leave out a phase, to see what it adds, as fuse_attention; may be given again
        dump_ir: write the IR after each phase into this folder
        print_pass_times: print how long each phase and each of TVM's passes took
        no_check: do not run what was compiled; else one short batch is compared with the file by ONNX Runtime first
        only_check: compile nothing, and check the artifact that -o names, as on another machine
    """
    if (batch is None) != (tokens is None):
        raise UserError("--batch and --tokens: give both or neither")
    if batch is not None and tokens is not None and min(batch, tokens) < 1:
        raise UserError(f"--batch {batch} --tokens {tokens}: must be at least 1 each")
    model = find_input(model or default_model(frontend))
    if only_check:
        if output is None:
            raise UserError("--only-check: name the artifact to check with -o")
        print(check_only(find_input(output), model))
        return
    options = CompileOptions(
        target=target,
        mcpu=mcpu,
        arch=arch,
        opt_level=opt_level,
        precision=precision,
        frontend=frontend,
        fixed_shape=None if batch is None or tokens is None else (batch, tokens),
        cuda_compiler=compiler,
        fast_math=fast_math,
        without=without,
        shapes=_parsed_shapes(shapes),
        dump_ir=dump_ir,
        check=not no_check,
    )
    timing = tvm.ir.instrument.PassTimingInstrument()
    with tvm.transform.PassContext(instruments=[timing] if print_pass_times else []):
        compiled = compile_model(model, output, options, say=print)
        if print_pass_times:
            print(f"TVM's passes:\n{timing.render()}")
            print("phases:")
            for name, seconds in compiled.phases_s.items():
                print(f"  {seconds:8.3f} s  {name}")
    size_mb = sum(file.stat().st_size for file in compiled.path.iterdir()) / 1e6
    for_what = ", ".join(compiled.target["archs"]) or compiled.target["mcpu"]
    print(
        f"wrote {compiled.path} ({size_mb:.1f} MB, {target} {for_what}, opt level {opt_level}, "
        f"{sum(compiled.phases_s.values()):.1f} s)"
    )
    if compiled.coverage is not None:
        print(Coverage.from_json(compiled.coverage))


def main() -> None:
    """Parse the command line and compile."""
    tyro.cli(compile_command, prog="python -m tvm_frontend.compile")
