"""Ablation study of the compiler on one model, the table of docs/cpu-lowering.md.

The model is compiled with one more phase at each step, then with all phases at lower precisions, and all builds are
timed in turns.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import tyro
from tabulate import tabulate

from bench.harness.plan import parse_shape
from bench.harness.turns import Build, times_of
from bench.models.sessions import open_as
from export.artifact import load_exported
from gpt.cli import check_threads
from gpt.files import find_input
from gpt.progress import progress_bar
from tvm_frontend.compile import compile_model
from tvm_frontend.options import CompileOptions
from tvm_frontend.runtime.session import Session

ADDED_PHASES = ("fuse_linear", "promise_no_alias", "fuse_attention", "fuse_layer_norm", "fuse_embedding")  # in order
LOW_PRECISIONS = ("bf16", "int8", "int4")
COLUMNS, ALIGNMENT = ("", "ms", "× the step before", "× the first"), ("left", "right", "right", "right")


@dataclass(frozen=True)
class AblationStep:
    """One configuration of the compiler. last: compute the logits of the last position alone."""

    name: str
    opt_level: int = 3
    without: tuple[str, ...] = ()
    precision: str = "fp32"
    last: bool = False


def ablation_steps() -> list[AblationStep]:
    """List the steps from TVM's own pipeline to all of `tvm_frontend.compile`, then the lower precisions."""
    cumulative = [
        AblationStep(f"+ `{name}`", without=ADDED_PHASES[number + 1 :]) for number, name in enumerate(ADDED_PHASES)
    ]
    low = [AblationStep(f"all of it, `--precision {precision}`", precision=precision) for precision in LOW_PRECISIONS]
    alone = AblationStep("all of it, logits of the last position alone (`split_head`)", last=True)
    return [AblationStep("TVM's own pipeline (`--opt-level 0`)", opt_level=0), *cumulative, alone, *low]


def build_of(step: AblationStep, model: Path, folder: Path, ids: np.ndarray, threads: int | None) -> Build:
    """Compile one step and bind its call. Raises UserError for a model with a cache, which has no forward pass."""
    options = CompileOptions(opt_level=step.opt_level, precision=step.precision, without=step.without)
    compiled = compile_model(model, folder, options)
    session = open_as(Session, compiled, threads)
    run = session.last if step.last else session.prefill
    return Build(step.name, sum(compiled.phases_s.values()), lambda: run(ids))


def run_ablation(
    model: tyro.conf.Positional[Path] = Path("artifacts/model.onnx"),
    shape: Annotated[str, tyro.conf.arg(metavar="BxT")] = "1x64",
    threads: int | None = None,
) -> None:
    """Print the time of a model at each step of the compiler, as a table in Markdown.

    Args:
        model: a file written by python -m export.onnx
        shape: batch size and length of the prompts
        threads: the kernels' threads; by default one per physical core
    """
    check_threads(threads)
    model = find_input(model)
    config = load_exported(model).config
    ids = np.random.default_rng(0).integers(0, config.vocab_size, parse_shape(shape, config))
    with TemporaryDirectory() as scratch:
        found = [
            build_of(step, model, Path(scratch, str(number)), ids, threads)
            for number, step in enumerate(progress_bar(ablation_steps(), desc="compile", unit="step", leave=False))
        ]
        times = times_of(found)
    rows = []
    for number, (each, seconds) in enumerate(zip(found, times, strict=True)):
        before = f"{times[number - 1] / seconds:.2f}" if 1 <= number <= len(ADDED_PHASES) else ""
        rows.append((each.name, f"{seconds * 1e3:.2f}", before, f"{times[0] / seconds:.1f}"))
    print(tabulate(rows, COLUMNS, "pipe", colalign=ALIGNMENT, disable_numparse=True))


def main() -> None:
    """Parse the command line and print the table."""
    tyro.cli(run_ablation, prog="python -m bench.ladder")
