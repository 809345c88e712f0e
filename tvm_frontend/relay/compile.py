"""Compiles an ONNX file by Relay, for `python -m tvm_frontend.compile --frontend relay`."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import onnx
from onnx import inliner

from gpt.cli import UserError
from gpt.files import atomic_output, check_output, check_replaceable, cut_half_line, is_leftover
from gpt.version import PROJECT, project_version
from tvm_frontend.artifact import GRAPH, RELAY, CompiledModel, is_ours, library_name, load_compiled, save_compiled
from tvm_frontend.check import check_or_why_not
from tvm_frontend.cuda_toolchain import find_compiler, verify_cuda_library
from tvm_frontend.frontends import run_onnx
from tvm_frontend.frontends.relax_onnx import fold_shapes, read_plain
from tvm_frontend.options import CompileOptions
from tvm_frontend.relay.process import RelayProcess
from tvm_frontend.relay.worker import DATABASE, weights_of
from tvm_frontend.runtime.threads import chosen_threads
from tvm_frontend.target import CompileTarget, check_runs_here, resolve_relay_target

OptLevel = Literal[0, 1, 2, 3]
OPT_LEVELS: tuple[int, ...] = get_args(OptLevel)
NEWEST_OPSET = 18  # the newest that Relay's importer was written for
BUILD_DEADLINE_S = 3600.0
TRIAL_DEADLINE_S = 60.0  # added for each trial of a search, which takes a second or two
SUMMARY = "search.json"


def compile_relay(
    model: Path,
    output: Path | None,
    options: CompileOptions,
    *,
    trials: int | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> CompiledModel:
    """Compile a file of `export.onnx` for one [B, T] by Relay, in a process of its environment.

    The result is a folder, `tvm-<llvm or arch>-O<level>-relay-<B>x<T>` beside the model unless `output` names another,
    and it is there whole or not at all. options: `fixed_shape` must be given, and `dump_ir` takes Relay's text before
    and after it is optimised. trials: schedules that MetaSchedule tries first, with those of earlier runs, which are
    kept in `<output>-search`. say: as in `compile_model`. Raises UserError for a bad file, option or output, without
    Relay's environment or, for cuda, nvcc, and if Relay fails, and RuntimeError if the check fails.
    """
    _refuse_others(options)
    dump_ir = options.dump_ir
    if options.opt_level not in OPT_LEVELS:
        raise UserError(
            f"opt level {options.opt_level}: must be {', '.join(map(str, OPT_LEVELS))} with --frontend relay"
        )
    compile_for = resolve_relay_target(options.target, mcpu=options.mcpu, arch=options.arch)
    variables = {"TVM_NUM_THREADS": str(chosen_threads())}  # a search times its candidates on them
    if compile_for.kind == "cuda":
        variables |= _with_nvcc(compile_for.gpu_arch)
    exported, proto = read_plain(model, RELAY)
    shape = _checked_shape(options.fixed_shape, exported.config.block_size)
    tuned = "tuned-" if trials is not None else ""
    name = f"tvm-{compile_for.name}-O{options.opt_level}-{RELAY}-{tuned}{shape[0]}x{shape[1]}"
    output = output or model.with_name(name)
    check_replaceable(output, is_ours, "compiled model")
    if dump_ir is not None:
        check_output(dump_ir / "01-import.relay")
    with (
        RelayProcess(variables, show_log=True) as relay,
        atomic_output(output, directory=True) as folder,
        tempfile.TemporaryDirectory() as scratch,
    ):
        start = time.perf_counter()
        prepared, library = Path(scratch, "model.onnx"), folder / library_name(compile_for.arch)
        onnx.save(_prepared(proto, shape), prepared, save_as_external_data=exported.weights is not None)
        prepare_s = time.perf_counter() - start
        request = {
            "model": str(prepared),
            "shape": shape,
            "target": compile_for.relay_name,
            "host": None if compile_for.kind == "llvm" else compile_for.relay_host,
            "opt_level": options.opt_level,
            "library": str(library.resolve()),
            "graph": str((folder / GRAPH).resolve()),
            "scratch": scratch,
            "dump": dump_ir is not None,
        }
        if trials is None:
            built = relay.ask("build", BUILD_DEADLINE_S, tuning=None, **request)
            search = None
        else:
            built, search = _tune(relay, output, trials, compile_for, request)
        if dump_ir is not None:
            for file in sorted(Path(scratch).glob("*.relay")):
                with atomic_output(dump_ir / file.name) as part:
                    part.write_bytes(file.read_bytes())
        phases_s = {"prepare": prepare_s, **built["phases_s"]}
        save_compiled(
            folder,
            weights_of(Path(scratch, "weights"), built["weights"]),
            {
                "config": asdict(exported.config),
                "tokenizer": exported.tokenizer,
                "dtype": exported.dtype,
                "form": exported.form,
                "frontend": RELAY,
                "fixed_shape": shape,
                "precision": "fp32",
                "target": compile_for.to_json(),
                "opt_level": options.opt_level,
                "entry_points": ["forward"],
                "caches": [],
                "pipeline": list(phases_s),
                "phases_s": phases_s,
                "kernels": built["kernels"],
                "launches": {},
                "exported_sha256": exported.sha256,
                "checkpoint_sha256": exported.checkpoint_sha256,
                "search": search,
                "versions": {PROJECT: project_version(), **built["versions"]},
            },
        )
        if compile_for.kind == "cuda":
            verify_cuda_library(library, compile_for.gpu_arch)
        if options.check:
            say(check_or_why_not(load_compiled(folder), partial(run_onnx, exported), exported.dtype, model, output))
    return load_compiled(output)


def _refuse_others(options: CompileOptions) -> None:
    """Raise UserError for the first option that is given, and that Relay has no use for."""
    given = {
        "precision": options.precision not in (None, "fp32"),
        "compiler": options.cuda_compiler == "nvrtc",
        "fast-math": options.fast_math,
        "without": bool(options.without),
    }
    if wrong := next((name for name, value in given.items() if value), None):
        raise UserError(
            f"--{wrong}: not with --frontend relay, which has fp32, nvcc and Relay's own phases; leave it out"
        )


def _checked_shape(shape: tuple[int, int] | None, block_size: int) -> tuple[int, int]:
    """Give the shape back. Raises UserError unless it is one that the model takes."""
    if shape is None:
        raise UserError(
            "--frontend relay compiles for one B and one T, as Relay's shapes are numbers: give --batch and --tokens, "
            f"--tokens of at most {block_size}"
        )
    if shape[0] < 1 or not 1 <= shape[1] <= block_size:
        raise UserError(f"--batch {shape[0]} --tokens {shape[1]}: B must be at least 1, and T in 1 … {block_size}")
    return shape


def _prepared(proto: onnx.ModelProto, shape: tuple[int, int]) -> onnx.ModelProto:
    """Rewrite the graph for one [B, T], in operators that Relay knows.

    Newer ones than NEWEST_OPSET has are spelled out as ONNX itself defines them. Relay's importer looks at a name
    alone: it takes Attention and Gelu for those of ONNX Runtime, whose Gelu is always the exact one.
    """
    first: dict[str, int] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            first[schema.name] = min(schema.since_version, first.get(schema.name, schema.since_version))
    newer = sorted({node.op_type for node in proto.graph.node if first.get(node.op_type, 0) > NEWEST_OPSET})
    spelled_out = inliner.inline_selected_functions(proto, [("", name) for name in newer], inline_schema_functions=True)
    return fold_shapes(spelled_out, shape)


def _with_nvcc(arch: str) -> dict[str, str]:
    """Make a search path on which TVM finds nvcc. Raises UserError if there is none that compiles for the arch."""
    try:
        nvcc = find_compiler("nvcc")
    except UserError:
        raise UserError(
            "--frontend relay --target cuda needs nvcc, and there is none on this machine: install NVIDIA's CUDA "
            "toolkit, and set CUDA_HOME to its folder"
        ) from None
    if arch not in (known := nvcc.archs()):
        raise UserError(f"{nvcc.path} does not compile for {arch}; it knows {', '.join(known)}")
    return {"PATH": os.pathsep.join([str(nvcc.path.parent), os.environ.get("PATH", os.defpath)])}


def _tune(
    relay: RelayProcess, output: Path, trials: int, target: CompileTarget, request: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Search, then build; give Relay's answer and the model's record of the search. Raises UserError."""
    if trials < 1:
        raise UserError(f"trials={trials}: must be at least 1")
    if target.kind != "llvm":
        raise UserError(f"target {target.name}: a search times its candidates on this machine, and takes llvm alone")
    check_runs_here(target.to_json())
    folder = output.with_name(f"{output.name}-search")
    found = {file.name for file in folder.iterdir() if not is_leftover(file)} if folder.exists() else set()
    if not found <= {*DATABASE, SUMMARY, "logs"}:
        raise UserError(f"{folder}: exists and is of no search of Relay's, so it is left alone; choose another with -o")
    folder.mkdir(parents=True, exist_ok=True)
    for name in DATABASE:
        cut_half_line(folder / name)  # a search that was killed left it, and all before it is good
    seconds = 0.0
    if (folder / SUMMARY).exists():
        before = json.loads((folder / SUMMARY).read_text())
        seconds = before["seconds"]
        if before["target"] != target.to_json():
            raise UserError(f"{folder}: a search for the CPU {before['target']['mcpu']}; choose another place with -o")
    tuning = {"folder": str(folder.resolve()), "trials": trials, "threads": chosen_threads()}
    built = relay.ask("build", BUILD_DEADLINE_S + trials * TRIAL_DEADLINE_S, tuning=tuning, **request)
    seconds += built["phases_s"]["search"]
    with atomic_output(folder / SUMMARY) as part:
        part.write_text(json.dumps({"target": target.to_json(), "seconds": seconds}))
    return built, {"trials": built["trials"], "seconds": round(seconds, 1), "database": str(folder)}
