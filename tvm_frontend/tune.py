"""Searches for the schedules of kernels that have no hand schedule, and compiles a model with the best.

python -m tvm_frontend.tune artifacts/model.onnx --batch 1 --tokens 64 --opt-level 0 --trials 200
python -m tvm_frontend.tune other.onnx --batch 1 --tokens 64              # only the kernels that no rewrite took

A search is for one [B, T], as MetaSchedule needs shapes that are numbers. At opt level 3 it begins after this project's
rewrites, and the hand-written kernels stay as they are. At opt level 0 there are none, and it schedules everything:
docs/hand-and-search.md compares the two. The mechanism is in `tvm_frontend.search`.
"""

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is one line too
    from gpt.cli import run_main

    run_main("tvm_frontend.tune")

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gpt.cli import UserError
from gpt.files import find_input
from tvm_frontend.arguments import CpuArgument, FolderArgument, FrontendArgument, ModelArgument, default_model
from tvm_frontend.artifact import RELAY, CompiledModel
from tvm_frontend.compile import compile_model
from tvm_frontend.frontends import DEFAULT
from tvm_frontend.options import DEFAULT_OPTIONS, CompileOptions
from tvm_frontend.relay.compile import compile_relay
from tvm_frontend.search import Search


def tune_model(
    model: Path,
    output: Path | None = None,
    options: CompileOptions = DEFAULT_OPTIONS,
    *,
    shape: tuple[int, int],
    trials: int,
    ops: tuple[str, ...] = (),
    say: Callable[[str], object] = lambda line: None,
) -> CompiledModel:
    """Search for schedules at one [B, T] and compile with the best, as `compile_model` does.

    `shape` takes the place of the options' `fixed_shape`. What is found is kept in the folder `<output>-search`, also
    if the search is stopped, and the next run continues it. Raises UserError as `compile_model` and `Search` do, and if
    there is nothing to search for. With the frontend `relay`, Relay's MetaSchedule searches, for all kernels.
    """
    if options.frontend == RELAY:
        if ops:
            raise UserError("--op: not with --frontend relay, which searches for all kernels; leave it out")
        return compile_relay(model, output, replace(options, fixed_shape=shape), trials=trials, say=say)
    options = replace(options, fixed_shape=shape if options.frontend == "relax-onnx" else None)
    return compile_model(model, output, options, search=Search(shape, trials, ops), say=say)


def tune_command(
    model: ModelArgument = None,
    output: Annotated[
        Path | None,
        tyro.conf.arg(
            aliases=["-o"],
            metavar="DIR",
            help_behavior_hint="(default: tvm-llvm-O3-tuned-1x64, … beside the model)",
        ),
    ] = None,
    *,
    batch: Annotated[int, tyro.conf.arg(metavar="B")] = 1,
    tokens: Annotated[int, tyro.conf.arg(metavar="T")],
    trials: int = 200,
    op: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    opt_level: Literal[0, 3] = 3,
    mcpu: CpuArgument = None,
    frontend: FrontendArgument = DEFAULT,
    dump_ir: FolderArgument = None,
    no_check: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> None:
    """Search for the schedules of an exported model's kernels at one shape, on this machine, and compile with them.

    Args:
        model: a file written by python -m export.onnx; for torch a checkpoint
        output: the folder to write; what the search finds is kept beside it, in DIR-search, and continued
        batch: the B to search for
        tokens: the T to search for
        trials: candidates to time in all, with those of earlier runs; a few more complete the last batch
        op: only kernels with this in their names; may be given again
        opt_level: 3 searches for what this project's rewrites leave, 0 for everything
        mcpu: the CPU to compile for, by LLVM's name; this machine must be able to run it
        frontend: who reads the model, as in python -m tvm_frontend.compile
        dump_ir: write the IR after each phase into this folder
        no_check: do not compare what was compiled with the file by ONNX Runtime
    """
    model = find_input(model or default_model(frontend))
    options = CompileOptions(mcpu=mcpu, opt_level=opt_level, frontend=frontend, dump_ir=dump_ir, check=not no_check)
    compiled = tune_model(model, output, options, shape=(batch, tokens), trials=trials, ops=op, say=print)
    search = compiled.search
    assert search is not None  # there was one
    print(f"wrote {compiled.path} ({search['trials']} trials in {search['seconds']} s, kept in {search['database']})")


def main() -> None:
    """Parse the command line and search."""
    tyro.cli(tune_command, prog="python -m tvm_frontend.tune")
