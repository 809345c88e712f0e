"""What each step of the compiler adds on one model: it is compiled again and again, each time with one phase more, then
with everything in fewer bits, and all of these take turns. The table is that of docs/cpu-lowering.md.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import tyro
from tabulate import tabulate
from tqdm import tqdm

from bench.harness.plan import parse_shape
from bench.harness.turns import Contestant, times_of
from export.artifact import load_exported
from gpt.files import find_input
from tvm_frontend.compile import compile_model

PHASES = ("fuse_linear", "promise_no_alias", "fuse_attention", "fuse_layer_norm", "fuse_embedding")  # from rung to rung
LOW = ("bf16", "int8", "int4")
COLUMNS, ALIGNMENT = ("", "ms", "× the step before", "× the first"), ("left", "right", "right", "right")


@dataclass(frozen=True)
class Rung:
    """A way to compile the model. last: only the logits behind the prompt are asked for."""

    name: str
    opt_level: int = 3
    without: tuple[str, ...] = ()
    precision: str = "fp32"
    last: bool = False


def rungs() -> list[Rung]:
    """From TVM's own pipeline to what `tvm_frontend.compile` does, and from there to fewer bits."""
    climbing = [Rung(f"+ `{name}`", without=PHASES[number + 1 :]) for number, name in enumerate(PHASES)]
    low = [Rung(f"all of it, `--precision {precision}`", precision=precision) for precision in LOW]
    alone = Rung("all of it, logits of the last position alone (`split_head`)", last=True)
    return [Rung("TVM's own pipeline (`--opt-level 0`)", opt_level=0), *climbing, alone, *low]


def contestant_of(rung: Rung, model: Path, folder: Path, ids: np.ndarray, threads: int | None) -> Contestant:
    """A rung, compiled and ready to be called."""
    compiled = compile_model(model, folder, opt_level=rung.opt_level, precision=rung.precision, without=rung.without)
    session = compiled.start(threads)
    run = session.last if rung.last else session.prefill
    return Contestant(rung.name, sum(compiled.phases_s.values()), lambda: run(ids))


def ladder(
    model: tyro.conf.Positional[Path] = Path("artifacts/model.onnx"),
    shape: Annotated[str, tyro.conf.arg(metavar="BxT")] = "1x64",
    threads: int | None = None,
) -> None:
    """Print what each step of the compiler adds on a model, as a table in Markdown.

    Args:
        model: a file written by python -m export.onnx
        shape: of the prompts
        threads: that kernels run on; by default one a physical core
    """
    model = find_input(model)
    config = load_exported(model).config
    ids = np.random.default_rng(0).integers(0, config.vocab_size, parse_shape(shape, config))
    with TemporaryDirectory() as scratch:
        found = [
            contestant_of(rung, model, Path(scratch, str(number)), ids, threads)
            for number, rung in enumerate(tqdm(rungs(), desc="compile", unit="rung", leave=False))
        ]
        times = times_of(found)
    rows = []
    for number, (each, seconds) in enumerate(zip(found, times, strict=True)):
        before = f"{times[number - 1] / seconds:.2f}" if 1 <= number <= len(PHASES) else ""
        rows.append((each.name, f"{seconds * 1e3:.2f}", before, f"{times[0] / seconds:.1f}"))
    print(tabulate(rows, COLUMNS, "pipe", colalign=ALIGNMENT, disable_numparse=True))


def main() -> None:
    """Parse the command line and print the table."""
    tyro.cli(ladder, prog="python -m bench.ladder")
