"""Compiles one foreign file, runs it, and compares it with ONNX Runtime on the same file: one cell of the matrix."""

import re
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from bench.studies.foreign_feeds import LONGEST, feed, padded
from gpt.cli import UserError
from tvm_frontend.check import TOLERANCES
from tvm_frontend.compile import compile_model
from tvm_frontend.frontends import read_source
from tvm_frontend.options import CompileOptions
from tvm_frontend.runtime import open_session

# What a cell came to: the same numbers; other numbers; a clear refusal; any other error; a file that cannot be judged.
RIGHT, WRONG, REFUSED, CRASHED, UNJUDGED = "right", "wrong", "refused", "crashed", "unjudged"
# Of a file that rounds activations to 8 bits: a sum that differs in its last bit may round to the next step, which
# changes what follows by up to 1/127 of the largest number of a row. Its rms error stays far below.
ROUNDED_TO_8_BITS = 0.05


@dataclass(frozen=True)
class Outcome:
    """Says what a cell came to.

    words: of a refusal or an error, or which case is wrong. errors: of each case, the largest difference of any output
    as a share of its largest number. left_out: cases that ONNX Runtime itself refuses. coverage: the share of the
    FLOPs that this project's kernels do, as `tvm_frontend.coverage` counts it; None if it was not compiled.
    """

    kind: str
    words: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    coverage: float | None = None

    @property
    def error(self) -> float:
        """The largest error of all cases."""
        return max(self.errors.values(), default=0.0)


@dataclass(frozen=True)
class Case:
    """Inputs to run a file on. seen: which positions [B, T] of the logits count, None for all outputs whole."""

    name: str
    given: dict[str, np.ndarray]
    seen: np.ndarray | None = None


class Reference:
    """Runs a file in ONNX Runtime, each node as the file has it.

    Its optimisations are off, as they change the numbers of QDQ files by up to a third of the largest: they merge
    nodes, and round where the file does not.
    """

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [(value.name, value.type, value.shape) for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]
        self.past = [name for name, _, _ in self.inputs if name.startswith("past")]

    def __call__(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self.outputs, self._session.run(None, dict(given)), strict=True))

    def after(self, results: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Give the past for the next step from the results of one."""
        return {
            name: results[f"present{name.removeprefix('past_key_values').removeprefix('past')}"] for name in self.past
        }


def cases_of(reference: Reference) -> Iterator[Case]:
    """Yield cases: one token, odd sizes and the longest; with padding on either side; and after a past."""
    rng = np.random.default_rng(0)
    for B, T in ((1, 1), (2, 7), (1, LONGEST)):
        yield Case(f"{B}x{T}", feed(reference.inputs, rng, B, 0, T))
    masked = any("mask" in name for name, _, _ in reference.inputs)
    if masked:
        given = feed(reference.inputs, rng, 2, 0, 7)
        yield Case("2x7, padded behind", padded(given, [0, -3]))
        left = padded(given, [0, 3])
        yield Case("2x7, padded before", left, _mask_of(left) == 1)
    if not reference.past:
        return
    given = feed(reference.inputs, rng, 2, 0, 7)
    past = reference.after(reference(given))
    for T in (1, 4):
        yield Case(f"2x{T} after 7", feed(reference.inputs, rng, 2, 7, T) | past)
    if masked:
        left = padded(given, [0, 3])
        past = reference.after(reference(left))
        step = padded(feed(reference.inputs, rng, 2, 7, 1), [0, 3])
        yield Case("2x1 after 7, padded before", step | past)


def _mask_of(given: Mapping[str, np.ndarray]) -> np.ndarray:
    return next(array for name, array in given.items() if "mask" in name)


def variant_of(path: Path) -> str:
    """Give the variant that a file's name ends with: `int8` of gpt2-dynamo-18-int8.onnx."""
    return re.sub(r"^.*-\d+-", "", path.stem)


def tolerance_of(variant: str) -> float:
    """Give what the cell of a variant may be off by."""
    if variant in ("fp16", "fp16-inside"):
        return TOLERANCES["fp16"]
    return ROUNDED_TO_8_BITS if variant in ("int8", "qdq") else TOLERANCES["fp32"]


def try_import(path: Path) -> Outcome:
    """Read a file into a graph, and no more."""
    try:
        source = read_source("onnx", path)
        source.import_graph()
        if source.import_plain:
            source.import_plain()
    except UserError as error:
        return Outcome(REFUSED, _words(error, path))
    except Exception as error:
        return Outcome(CRASHED, _trace(error))
    return Outcome(RIGHT)


def try_file(path: Path) -> Outcome:
    """Compile a file, run it on all cases and compare."""
    expected: list[tuple[Case, dict[str, np.ndarray]]] = []
    left_out: list[str] = []
    refusal = ""
    try:
        reference = Reference(path)
        for case in cases_of(reference):
            try:
                expected.append((case, reference(case.given)))
            except Exception as error:
                left_out.append(case.name)
                refusal = _said(error)
    except Exception as error:
        refusal = _said(error)
    if not expected:
        return Outcome(UNJUDGED, f"ONNX Runtime: {refusal}")
    errors: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled = compile_model(path, Path(folder) / "tvm", CompileOptions(opt_level=3))
            session: Any = open_session(compiled)
            for case, wanted in expected:
                errors[case.name] = difference(session.run(case.given), wanted, case.seen)
            if reference.past and "2x7" in errors:
                errors["generated"] = _generated(session, reference)
        except UserError as error:
            return Outcome(REFUSED, _words(error, path), errors, left_out)
        except Exception as error:
            return Outcome(CRASHED, _trace(error), errors, left_out)
    wrong = [name for name, error in errors.items() if not error <= tolerance_of(variant_of(path))]
    coverage = compiled.coverage["flops_share"] if compiled.coverage else None
    return Outcome(WRONG if wrong else RIGHT, ", ".join(wrong), errors, left_out, coverage)


def _generated(session: Any, reference: Reference) -> float:
    """Fill a cache with a prompt and decode some tokens; give the largest error of the logits."""
    rng = np.random.default_rng(1)
    errors = []
    past: dict[str, np.ndarray] = {}
    P = 0
    for T in (5, 1, 1, 1):
        given = feed(reference.inputs, rng, 2, P, T) | past
        ids = next(array for name, array in given.items() if "ids" in name and "position" not in name)
        wanted = reference(given)
        past = reference.after(wanted)
        found = session.fill(ids) if P == 0 else session.decode(ids, P)
        errors.append(difference({"logits": found}, {"logits": wanted["logits"][:, -1]}, None))
        P += T
    return max(errors)


def difference(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], seen: np.ndarray | None) -> float:
    """Give the largest difference of any output as a share of its largest number, infinity for another shape or dtype.

    Where one is infinite or no number, the other must be so too. seen: which positions [B, T] count; then of the
    logits [B, T, V] alone, as keys and values of padding may be anything too.
    """
    worst = 0.0
    for name, right in wanted.items():
        if seen is not None and not (right.ndim == 3 and right.shape[:2] == seen.shape):
            continue
        left = found[name]
        if left.shape != right.shape or left.dtype != right.dtype:
            return float("inf")
        if seen is not None:
            left, right = left[seen], right[seen]
        left, right = left.astype(np.float64), right.astype(np.float64)
        numbers = np.isfinite(right)
        if not np.array_equal(left[~numbers], right[~numbers], equal_nan=True):
            return float("inf")
        if numbers.any():
            error = np.abs(left[numbers] - right[numbers]).max() / (np.abs(right[numbers]).max() or 1.0)
            worst = max(worst, float(error) if np.isfinite(error) else float("inf"))
    return worst


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _words(error: Exception, path: Path) -> str:
    return _said(error).replace(f"{path}: ", "")


def _trace(error: Exception) -> str:
    """Say an error that nobody foresaw with the place that raised it."""
    places = [each for each in traceback.extract_tb(error.__traceback__) if "site-packages" not in each.filename]
    where = f" at {Path(places[-1].filename).name}:{places[-1].lineno}" if places else ""
    return f"{type(error).__name__}{where}: {_said(error)}"


class Cell:
    """Tries files in a worker (`bench.harness.worker`), whose pipe takes plain values."""

    def import_only(self, path: str) -> dict[str, Any]:
        """Do `try_import`."""
        return asdict(try_import(Path(path)))

    def whole(self, path: str) -> dict[str, Any]:
        """Do `try_file`."""
        return asdict(try_file(Path(path)))
