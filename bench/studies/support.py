"""Tests which files are accepted: what others export, and by each frontend what this project does."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from tabulate import tabulate

from bench.studies.foreign_recipes import OPTIMUM, REFUSED, TOOLS, TORCH, VERSIONS, recipes
from bench.studies.matrix import cells_to_try, read_results, run_cells
from bench.studies.matrix_page import foreign_part, short
from export.artifact import PRECISIONS
from export.onnx import EXPORTERS, Request, export_onnx
from gpt.checkpoint import Checkpoint, save_checkpoint, seeded_checkpoint
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.files import atomic_output, check_output, hold_output
from gpt.progress import progress_bar
from tvm_frontend.compile import compile_model
from tvm_frontend.frontends.relax_onnx import FIX
from tvm_frontend.options import CompileOptions
from tvm_frontend.runtime import open_session
from tvm_frontend.runtime.session import CachedSession

SMALL = GPTConfig(block_size=17, vocab_size=37, n_layer=2, n_head=2, n_embd=20)
MODELS = {
    "tanh GELU": SMALL,
    "exact GELU, no biases": replace(SMALL, activation="gelu", bias=False),
    "ReLU, untied head": replace(SMALL, activation="relu", tied_head=False),
    "bigram": GPTConfig.bigram(block_size=17, vocab_size=37),
}
FORMS = ("forward", "last", "cached", "past")
SHAPES = ((1, 1), (3, 1), (1, 17), (3, 17))  # (B, T)
FIXED = SHAPES[-1]
COLUMNS: dict[str, dict[str, Any]] = {  # options of `compile_model`
    "onnx": {},
    "relax-onnx": {"frontend": "relax-onnx"},
    "relax-onnx, one shape": {"frontend": "relax-onnx", "fixed_shape": FIXED},
}
ROUNDING = 2e-6  # error over the largest logit; a larger one is not float32 rounding alone and gets its own row
HEAD = """# Files that the compiler accepts

Written by `make matrix`, which makes, compiles and runs each file.

"""
OWN_HEAD = """## This project's exports, by each frontend

A number is the largest error over the files of its row and over B = 1 and 3, T = 1 and 17, divided by the largest
logit; the reference is the model in float64 with the weights that the file holds. `no` is a refusal, with its message
below. The models have {n_layer} layers and random weights.

- `onnx` is this project's importer. `relax-onnx` is TVM's own, with dynamic B and T and with one shape
  (`--batch 3 --tokens 17`).
- `last` is `--last`, `cached` is `--with-cache`, run token by token, and `past` is `--cache past`.
- Rounding the weights moves the logits by {bf16} in bf16 and by {fp16} in fp16; this is not counted.
  Where such files decompose attention, its scale is rounded too, and the errors of their rows include that.
- Versions: {versions}.
"""

RESULTS = "results.jsonl"  # of the files of others, in their folder
ENVIRONMENTS = {TORCH: "torch.onnx's files by", OPTIMUM: "Optimum's by", TOOLS: "changed by"}

Outcome = float | str  # the largest error, or the message of a refusal


@dataclass(frozen=True)
class File:
    """A file to test: its model, form and precision, and the exporter and opset that wrote it."""

    model: str
    form: str = "forward"
    precision: str = "fp32"
    exporter: str = "dynamo"
    opset: int = 23


@dataclass(frozen=True)
class Tried:
    """The outcome of a file in each of COLUMNS."""

    file: File
    outcomes: tuple[Outcome, ...]


def all_files() -> list[File]:
    """List the files to test in the page's order: all exports of the first model, the main forms of the others."""
    possible = [
        File(model, form, precision, exporter, opset)
        for form in FORMS
        for precision in PRECISIONS
        for model in MODELS
        for exporter, opsets in EXPORTERS.items()
        for opset in opsets
    ]
    return [file for file in possible if _is_asked(file) and _is_written(file)]


def _is_asked(file: File) -> bool:
    if file.model == next(iter(MODELS)):
        return file.form in ("forward", "cached") or file.precision == "fp32"
    forms = ("forward",) if MODELS[file.model].model == "bigram" else ("forward", "cached")
    return file.form in forms and file.precision == "fp32"


def _is_written(file: File) -> bool:
    """Return True if the exporter can write the file; `export.onnx` refuses what it cannot."""
    try:
        Request(file.form.replace("last", "forward"), file.opset, file.exporter, file.precision)
    except UserError:
        return False
    return True


def try_file(file: File, folder: Path) -> Tried:
    """Export a file into a folder, compile it by each frontend, run and compare."""
    path = folder / "model.onnx"
    checkpoint = random_checkpoint(MODELS[file.model], folder / "ckpt.pt")
    last = file.form == "last"
    form = "forward" if last else file.form
    export_onnx(
        folder / "ckpt.pt", path, file.opset, form=form, exporter=file.exporter, precision=file.precision, last=last
    )
    model = rounded(checkpoint, file.precision).build().double()
    return Tried(file, tuple(outcome_of(path, folder / name, model, last, **how) for name, how in COLUMNS.items()))


def random_checkpoint(config: GPTConfig, path: Path) -> Checkpoint:
    """Save random weights, large enough that every part of the model changes the logits."""
    random = seeded_checkpoint(config)
    state = {name: 6 * tensor if tensor.dim() == 2 else tensor for name, tensor in random.state.items()}
    checkpoint = replace(random, state=state)
    save_checkpoint(path, checkpoint)
    return checkpoint


def rounded(checkpoint: Checkpoint, precision: str) -> Checkpoint:
    """Round the weights as a file of a precision holds them, and return them in float32."""
    dtype = getattr(torch, PRECISIONS[precision])
    return replace(checkpoint, state={name: tensor.to(dtype).float() for name, tensor in checkpoint.state.items()})


def outcome_of(path: Path, output: Path, model: torch.nn.Module, last: bool = False, **how: Any) -> Outcome:
    """Compile a file with the options `how`, run it at SHAPES and return its largest error against a float64 model.

    Raises RuntimeError for logits of another shape, and for infinite or NaN logits.
    """
    try:
        session = open_session(compile_model(path, output, CompileOptions(**how)))
    except UserError as error:
        return words_of(error)
    errors = []
    for B, T in [FIXED] if "fixed_shape" in how else SHAPES:
        ids = np.random.default_rng([B, T]).integers(0, SMALL.vocab_size, (B, T))
        with torch.inference_mode():
            expected = model(torch.from_numpy(ids)).numpy()  # [B, T, V]
        if isinstance(session, CachedSession):
            session.begin(B)
            steps = [session.step(ids[:, t : t + 1], np.full(B, t)) for t in range(T)]  # T × [B, 1, V]
            found = np.concatenate(steps, axis=1)
        else:
            found = session.prefill(ids)
        if last:
            expected = expected[:, -1:]
        if found.shape != expected.shape or not np.isfinite(found).all():
            raise RuntimeError(f"{path} {how}: logits of shape {found.shape}, must be finite of {expected.shape}")
        errors.append(float(np.abs(found - expected).max() / np.abs(expected).max()))
    return max(errors)


def words_of(error: UserError) -> str:
    """Strip a refusal of all that differs from file to file: the path, names of nodes, the opset, the advice."""
    said = re.sub(r"^\S+\.(onnx|pt): ", "", str(error)).removesuffix(FIX)
    return re.sub(r"node '[^']*' \((.+?)(, ai\.onnx opset \d+)?\)", r"a node (\1)", said)


def own_part(tried: Iterable[Tried], checkpoints: dict[str, Outcome], head: str) -> str:
    """Format a part: a row for all files of one form and precision with the same outcome, the refusals below."""
    words: dict[str, int] = {}

    def cell(outcome: Outcome) -> str:
        if isinstance(outcome, str):
            return f"no ({words.setdefault(outcome, len(words) + 1)})"
        return short(outcome)

    files = []
    for (form, precision, written, _), rows in _rows(tried).items():
        models, outcomes = zip(*rows, strict=True)
        files.append([form, precision, written, " · ".join(models), *map(cell, _worst(outcomes))])
    lines = [head, _table(files, "form", "precision", "written by", "model", *COLUMNS)]
    lines += ["", "### Checkpoints", "", "`torch` is TVM's importer of torch.export programs, with dynamic B and T."]
    lines += ["", _table([[model, cell(outcome)] for model, outcome in checkpoints.items()], "model", "torch")]
    lines += ["", "### The refusals of exports", "", *(f"{number}. {said}" for said, number in words.items())]
    return "\n".join(lines) + "\n"


def _table(rows: list[list[str]], *heads: str) -> str:
    return tabulate(rows, heads, "pipe", disable_numparse=True)


def _rows(tried: Iterable[Tried]) -> dict[tuple, list[tuple[str, tuple[Outcome, ...]]]]:
    """Group models by (form, precision, exporters with opsets, kind of outcome), each with its worst outcomes."""
    alike: dict[tuple, list[Tried]] = {}
    for each in tried:
        kind = tuple(outcome if isinstance(outcome, str) else outcome > ROUNDING for outcome in each.outcomes)
        alike.setdefault((each.file.form, each.file.precision, each.file.model, kind), []).append(each)
    rows: dict[tuple, list[tuple[str, tuple[Outcome, ...]]]] = {}
    for (form, precision, model, kind), same in alike.items():
        row = rows.setdefault((form, precision, _written([each.file for each in same]), kind), [])
        row.append((model, _worst([each.outcomes for each in same])))
    return rows


def _worst(outcomes: Iterable[tuple[Outcome, ...]]) -> tuple[Outcome, ...]:
    """Return the largest error of each column over outcomes of one kind, or its refusal."""
    return tuple(max(column) for column in zip(*outcomes, strict=True))


def _written(files: list[File]) -> str:
    """List exporters with their opsets: "dynamo 18–22, torchscript 18–20"."""
    opsets: dict[str, list[int]] = {}
    for file in files:
        opsets.setdefault(file.exporter, []).append(file.opset)
    return ", ".join(f"{exporter} {_ranges(numbers)}" for exporter, numbers in opsets.items())


def _ranges(numbers: list[int]) -> str:
    """Abbreviate ascending numbers: 18, 19, 20, 23 is 18–20, 23."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if run[1:] else str(run[0]) for run in runs)


def head_of(folder: Path) -> str:
    """Fill in the part's head: versions, and the effect of rounding the weights."""
    checkpoint = random_checkpoint(SMALL, folder / "ckpt.pt")
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, SMALL.vocab_size, FIXED))
    with torch.inference_mode():
        logits = {precision: rounded(checkpoint, precision).build().double()(ids) for precision in PRECISIONS}
    largest = float(logits["fp32"].abs().max())
    moved = {name: short(float((each - logits["fp32"]).abs().max()) / largest) for name, each in logits.items()}
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxscript", "apache-tvm"))
    return OWN_HEAD.format(versions=versions, n_layer=SMALL.n_layer, **moved)


def write_support(output: Path, folder: Path, workers: int = 1) -> None:
    """Try the files of a folder and this project's exports, and write the page.

    What was tried before, with the same code and the same file, is not tried again. Raises UserError for a folder
    without files.
    """
    check_output(output)
    cells = [recipe for recipe in recipes() if (folder / recipe.name).exists()]
    if not cells:
        raise UserError(f"{folder}: no files of the matrix are in it; make matrix makes them")
    kept = folder / RESULTS
    with hold_output(output):
        run_cells(folder, cells_to_try(folder, cells, read_results(kept)), kept, workers=workers)
        results = read_results(kept)
        tried = [_in_a_folder(try_file, file) for file in progress_bar(all_files(), desc="support", unit="file")]
        checkpoints = {name: _in_a_folder(try_checkpoint, name) for name in MODELS}
        theirs = foreign_part([(cell, results[cell.name]) for cell in cells], *_beside(folder))
        ours = own_part(tried, checkpoints, _in_a_folder(head_of))
        with atomic_output(output) as part:
            part.write_text(f"{HEAD}{theirs}\n{ours}", encoding="utf-8")


def _beside(folder: Path) -> tuple[dict[str, str], str]:
    """Read what stands beside the files: the words of exporters and tools that refused, and all versions."""
    refused: dict[str, str] = {}
    versions = []
    for which in (TORCH, OPTIMUM, TOOLS):
        refused |= json.loads((folder / f"{which}-{REFUSED}").read_text(encoding="utf-8"))
        found = json.loads((folder / f"{which}-{VERSIONS}").read_text(encoding="utf-8"))
        versions.append(f"{ENVIRONMENTS[which]} {', '.join(f'{name} {number}' for name, number in found.items())}")
    here = ", ".join(f"{name} {version(name)}" for name in ("apache-tvm", "onnxruntime-gpu"))
    return refused, "; ".join([*versions, f"compiled and run with {here}"])


def try_checkpoint(name: str, folder: Path) -> Outcome:
    """Test a model's checkpoint with the frontend that reads checkpoints."""
    checkpoint = random_checkpoint(MODELS[name], folder / "ckpt.pt")
    return outcome_of(folder / "ckpt.pt", folder / "tvm", checkpoint.build().double(), frontend="torch")


def _in_a_folder(work: Callable[..., Any], *arguments: object) -> Any:
    with TemporaryDirectory() as folder:
        return work(*arguments, Path(folder))


def support_command(
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = Path("artifacts/matrix"),
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="PAGE")] = Path("docs/support-matrix.md"),
    workers: int = 1,
) -> None:
    """Compile and run every kind of file, others' and our own, and write what each came to as a page.

    Args:
        folder: where make matrix puts the files of others; results are kept there too, so that a run goes on
        output: the page to write
        workers: how many of those files are tried at once, each on one core
    """
    write_support(output, folder, workers)
    print(f"wrote {output}")


def main() -> None:
    """Parse the command line and write the page."""
    tyro.cli(support_command, prog="python -m bench.support")
