"""Runs a compiled model on one short batch and compares it with the file that it was compiled from.

The file is run by ONNX Runtime, or by ONNX's own reference evaluator where that is not installed; a checkpoint by
PyTorch. This finds code that computes something else, as a miscompiled kernel does. Whether fewer bits
cost more than they should is for `python -m bench` to say, which compares every engine with float64 at many shapes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.signature import SEEN, Signature, dtype_named, tokens_to_try
from gpt.cli import UserError
from tvm_frontend.artifact import RELAY, REMAKE, CompiledModel, load_compiled
from tvm_frontend.frontends import CannotRun, read_source
from tvm_frontend.runtime import open_session
from tvm_frontend.target import check_runs_here

if TYPE_CHECKING:
    from tvm_frontend.runtime.session import CachedSession

# Shares of the largest logit. A wrong mask, weight or activation is off by more than each, or all of it: logits of
# another model differ by 1 or 2. fp32: some hundred roundings, as sums of n_embd products have. tf32 to bf16: 20
# roundings of what a layer hands on. int8 rounds to 1/254 of the largest of a row, and what a layer hands on and its
# weights too; int4 to 1/14 of the largest of a group of 32.
TOLERANCES = {
    "fp32": 1e-4,
    "tf32": 20 * 2.0**-11,
    "fp16": 20 * 2.0**-11,
    "bf16": 20 * 2.0**-8,
    "int8": 0.2,
    "int4": 0.6,
}
PRECISIONS_OF = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # of what the file itself computes in
B, T = 2, 11  # of the batch: T is no multiple of a register tile or a vector
STEPS = 3  # of one token each, at the end of a sequence over a cache
SEED = 0

Reference = Callable[[Any], Any]


@dataclass(frozen=True)
class Check:
    """Holds the largest difference of any logit, and what it may be, as shares of the largest logit."""

    shape: tuple[int, int]
    error: float
    tolerance: float

    def __str__(self) -> str:
        return (
            f"checked at {self.shape[0]}x{self.shape[1]}: differs from the file it was compiled from by at most "
            f"{self.error:.1e} of the largest logit (tolerance {self.tolerance:.1e})"
        )


def check_compiled(model: CompiledModel, reference: Reference, dtype: str) -> Check:
    """Run a model on random ids [2, 11], or fewer if it takes fewer, and compare it with a reference.

    A model with a cache runs them as a prompt in two chunks and then token by token. A file that was compiled as it
    is runs them with a mask of ones, with one that hides a token, and after a past, where it takes these.
    reference: gives the logits float32 [B, T, V], or [B, 1, V] of the last position alone, of ids int64 [B, T]; for
    such a file all outputs of all inputs, by name. dtype: the type that it computes in. Raises RuntimeError if they
    differ by more than the tolerance, and UserError if this machine cannot run it.
    """
    if model.form == "graph":
        return _check_graph(model, reference, dtype)
    config = model.gpt
    shape = _fixed_shape(model) or (B, min(T, config.block_size))
    ids = np.random.default_rng(SEED).integers(0, config.vocab_size, shape)
    expected = reference(ids)
    session: Any = open_session(model)
    pairs = (_over_a_cache if model.form == "cached" else _whole)(session, ids, expected)
    # NaN is no maximum in a comparison: it is an error of its own.
    worst = np.max([np.max(np.abs(found - wanted)) for found, wanted in pairs]) / np.max(np.abs(expected))
    error = float(worst) if np.isfinite(worst) else float("inf")
    check = Check(shape, error, max(TOLERANCES[model.precision], TOLERANCES[PRECISIONS_OF[dtype]]))
    if not error <= check.tolerance:
        raise RuntimeError(f"the compiled model is wrong, and was not kept: {check}")
    return check


def _check_graph(model: CompiledModel, reference: Reference, dtype: str) -> Check:
    """Do `check_compiled` for a model of the form `graph`: all its outputs, on inputs as its signature says."""
    signature = model.signature
    assert signature is not None
    session: Any = open_session(model)
    tolerance = max(TOLERANCES[model.precision], TOLERANCES[PRECISIONS_OF[dtype]])
    error = 0.0
    shape = (0, 0)
    for given in _calls(signature, reference):
        shape = shape if any(shape) or signature.ids is None else given[signature.ids].shape
        expected, found = reference(given), session.run(given)
        for port in signature.outputs:
            error = max(error, _difference(found[port.name], expected[port.name]))
    if signature.past and signature.logits and not signature.unknown:
        for found_logits, wanted in _over_a_past(session, signature, reference):
            error = max(error, _difference(found_logits, wanted))
    check = Check((shape[0], shape[-1]), error, tolerance)
    if not error <= tolerance:
        raise RuntimeError(f"the compiled model is wrong, and was not kept: {check}")
    return check


def _calls(signature: Signature, reference: Reference) -> Iterator[dict[str, np.ndarray]]:
    """Yield inputs to try: without and with a hidden token, and with the past that the file itself gives."""
    rng = np.random.default_rng(SEED)
    if signature.ids is None or signature.unknown:
        yield _anything(signature, rng)
        return
    dims = signature.input(signature.ids).dims
    length = tokens_to_try(signature, T)
    rows = dims[0] if isinstance(dims[0], int) else B
    ids = rng.integers(0, signature.vocab_size or 1, (rows, length) if len(dims) == 2 else (length,))
    given = signature.feed(ids)
    yield given
    masks = [name for name, role in signature.roles.items() if role == SEEN]
    if masks and length > 1:
        hidden = {name: given[name].copy() for name in masks}
        for mask in hidden.values():
            mask[-1, -1] = 0  # of one sequence, as the padding behind a shorter prompt is
        yield given | hidden
    if signature.past:
        results = reference(given)
        past = {name: results[present] for name, present in signature.presents.items()}
        yield signature.feed(rng.integers(0, signature.vocab_size or 1, (rows, 1)), past)


def _over_a_past(session: Any, signature: Signature, reference: Reference) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pair what a session gives for a prompt and the tokens behind it with what the file gives, over its own past."""
    length = tokens_to_try(signature, T)
    ids = np.random.default_rng(SEED + 1).integers(0, signature.vocab_size or 1, (B, length))
    prompt = max(1, length - STEPS)
    expected = reference(signature.feed(ids[:, :prompt]))
    yield session.fill(ids[:, :prompt]), expected[signature.logits][:, -1]
    for at in range(prompt, length):
        past = {name: expected[present] for name, present in signature.presents.items()}
        expected = reference(signature.feed(ids[:, at : at + 1], past))
        yield session.decode(ids[:, at : at + 1], at), expected[signature.logits][:, -1]


def _anything(signature: Signature, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Make inputs of which nobody knows the meaning: random numbers, and ones where they are whole."""
    sizes: dict[str, int] = {}
    given = {}
    for port in signature.inputs:
        shape = [dim if isinstance(dim, int) else sizes.setdefault(dim, B + len(sizes)) for dim in port.dims]
        dtype = dtype_named(port.dtype)
        floats = np.dtype(dtype).kind not in "biu"
        given[port.name] = np.asarray(rng.standard_normal(shape) if floats else np.ones(shape)).astype(dtype)
    return given


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Give the largest difference as a share of the largest number; infinity where one alone is no number."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if expected.dtype.kind in "biu":
        return 0.0 if np.array_equal(found, expected) else float("inf")
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    numbers = np.isfinite(expected)
    if not np.array_equal(found[~numbers], expected[~numbers], equal_nan=True):
        return float("inf")
    if not numbers.any():
        return 0.0
    worst = np.max(np.abs(found[numbers] - expected[numbers])) / (np.max(np.abs(expected[numbers])) or 1.0)
    return float(worst) if np.isfinite(worst) else float("inf")


def check_or_why_not(model: CompiledModel, reference: Reference, dtype: str, file: Path, output: Path) -> str:
    """Do `check_compiled` and say what came of it, or why this machine cannot, and how to do it on one that can.

    file: what the model was compiled from. output: where it will lie.
    """
    try:
        check_runs_here(model.target)
    except UserError as error:
        there = f"python -m tvm_frontend.compile {file} -o {output} --only-check"
        return f"not checked: {str(error).partition(': ')[0]}; on a machine that can run it, say: {there}"
    try:
        return str(check_compiled(model, reference, dtype))
    except CannotRun as error:
        return f"not checked: {error}"


def check_only(folder: Path, file: Path) -> str:
    """Check an artifact that was compiled from a file before, and say what came of it.

    Raises UserError if it was compiled from another file or cannot run here, and RuntimeError if it is wrong.
    """
    model = load_compiled(folder)
    # Relay reads the same files as TVM's importer of ONNX.
    frontend = "relax-onnx" if model.frontend == RELAY else model.frontend
    source = read_source(frontend, file, _fixed_shape(model) if frontend == "relax-onnx" else None)
    if source.sha256 != model.exported_sha256:
        raise UserError(f"{folder}: was compiled from another file than {file}; {REMAKE}")
    return str(check_compiled(model, source.run, source.run_dtype))


def _fixed_shape(model: CompiledModel) -> tuple[int, int] | None:
    return (model.fixed_shape[0], model.fixed_shape[1]) if model.fixed_shape else None


def _whole(session: Any, ids: np.ndarray, expected: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pair what a session gives for whole sequences with what it should: all positions, and the last alone."""
    pairs = [(session.prefill(ids), expected)]
    if hasattr(session, "last"):
        pairs.append((session.last(ids), expected[:, -1]))
    return pairs


def _over_a_cache(
    session: "CachedSession", ids: np.ndarray, expected: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pair what a session gives for a prompt in two chunks and the tokens behind it with what it should."""
    B, length = ids.shape
    prompt = max(1, length - STEPS)
    half = (prompt + 1) // 2
    found = [(half, session.fill(ids[:, :half])[:, None])]  # where a step ends, and logits [B, T, V] up to there
    if half < prompt:
        found.append((prompt, session.step(ids[:, half:prompt], np.full(B, half))))
    for at in range(prompt, length):
        found.append((at + 1, session.decode(ids[:, at : at + 1], at)[:, None]))
    pairs = []
    for end, logits in found:
        last = expected.shape[1] - length + end  # expected may have the last position alone
        rows = min(logits.shape[1], last)
        if rows > 0:
            pairs.append((logits[:, -rows:], expected[:, last - rows : last]))
    return pairs
