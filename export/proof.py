"""Prove that an exported file computes what eager PyTorch does, before the file gets its name."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from export.artifact import load_exported
from export.session import Session
from export.weights import model_of
from gpt.checkpoint import Checkpoint
from gpt.progress import progress_bar

# Shares of the largest logit. float32: eager does the same operations in another order; logits are sums of n_embd
# products, 1e-4 is some hundred roundings, and a wrong mask, weight or epsilon is off by far more. The others: 20
# roundings of what a layer hands on; the worst seen, of a trained model, is 6.
TOLERANCES = {"float32": 1e-4, "float16": 20 * 2.0**-11, "bfloat16": 20 * 2.0**-8}
CHUNKS = (20, 1, 1, 7, 1)  # lengths that a sequence is cut into, with the rest of it last
GREEDY_TOKENS = 200
SHORTEST_OF_TWO_LENGTHS = 16  # block_size for which two prompts of different length and five tokens more make sense
SEED = 0


@dataclass(frozen=True)
class Run:
    """Holds what a file gave: `logits` float32 [B, S, V] where `seen` [B, S], of the sequences ids int64 [B, S].

    chosen: how many tokens at the end of each sequence the file itself chose, one after the other.
    """

    what: str
    ids: np.ndarray
    logits: np.ndarray
    seen: np.ndarray
    chosen: int = 0


@dataclass(frozen=True)
class Proof:
    """One run against eager. Errors are the largest of any logit, scale is the largest |logit| of eager in float64.

    err_fp64: against eager in float64 with the checkpoint's weights. err_fp32: in float32 with the file's weights, that
    is, as rounded to its precision. top1_match: share of positions with equal argmax. tokens, tokens_equal: chosen
    greedily, and how many of them eager in float32 chooses too. near_ties: those where the two likeliest are so close
    that the tolerance explains another choice.
    """

    what: str
    B: int
    T: int
    err_fp64: float
    err_fp32: float
    scale: float
    top1_match: float
    tolerance: float
    tokens: int = 0
    tokens_equal: int = 0
    near_ties: int = 0

    @property
    def agrees(self) -> bool:
        """True if errors are within the tolerance, which NaN is not, and every token is eager's or a near tie."""
        limit = self.tolerance * self.scale
        return self.err_fp64 <= limit and self.err_fp32 <= limit and self.tokens == self.tokens_equal + self.near_ties


def prove(checkpoint: Checkpoint, path: Path) -> list[Proof]:
    """Check an exported file by ONNX's checker with shape inference, and run it against eager.

    Prompts at T = 1, an odd T and block_size, B = 1 and 3; of a form with a cache also chunks, sequences of different
    length where it can, and 200 greedy tokens. Raises RuntimeError if anything is off by more than the tolerance.
    """
    onnx.checker.check_model(str(path), full_check=True)
    session = Session(load_exported(path))
    exported, plan = session.exported, plan_runs(session)
    runs = [run() for run in progress_bar(plan, desc="run", unit="run", leave=False)]
    del session, plan  # they are as large as the references to come
    wide = _in_float64(model_of(checkpoint, "explicit"))
    rounded = model_of(checkpoint, "explicit", getattr(torch, exported.dtype)).float()
    proofs = []
    for run in progress_bar(runs, desc="compare with eager", unit="run", leave=False):
        proofs.append(compare(run, wide, rounded, TOLERANCES[exported.dtype]))
        if not proofs[-1].agrees:
            raise RuntimeError(f"{path}: ONNX Runtime and eager disagree: {proofs[-1]}")
    return proofs


def plan_runs(session: Session) -> list[Callable[[], Run]]:
    """Return every run that the file's form allows, on random ids."""
    config, form = session.exported.config, session.exported.form
    random = np.random.default_rng(SEED)

    def draw(B: int, T: int) -> np.ndarray:
        return random.integers(0, config.vocab_size, (B, T))

    shapes = [(B, T) for T in dict.fromkeys((1, min(17, config.block_size), config.block_size)) for B in (1, 3)]
    plan: list[Callable[[], Run]] = [partial(_run_steps, session, "prompt", draw(B, T), [T]) for B, T in shapes]
    if form != "forward":
        chunks = chunks_of(config.block_size)
        plan += [partial(_run_steps, session, "chunks", draw(B, config.block_size), chunks) for B in (1, 3)]
        if form == "cached" and config.block_size >= SHORTEST_OF_TWO_LENGTHS:
            plan.append(partial(_run_lengths, session, draw(2, config.block_size)))
        plan.append(partial(_run_greedy, session, random))
    return plan


def chunks_of(length: int) -> list[int]:
    """Return CHUNKS as far as they fit and the rest: they sum to `length`."""
    chunks: list[int] = []
    for T in CHUNKS:
        if sum(chunks) + T < length:
            chunks.append(T)
    return [*chunks, length - sum(chunks)]


class _Record:
    """Collects a run's logits at their positions."""

    def __init__(self, ids: np.ndarray, V: int) -> None:
        self.ids, self.logits, self.seen = ids, np.zeros((*ids.shape, V), np.float32), np.zeros(ids.shape, bool)

    def add(self, end: np.ndarray, logits: np.ndarray, upto: np.ndarray) -> None:
        """Add logits [B, T, V] of positions up to `end` [B]; those from `upto` [B] on are of padding."""
        for b, rows in enumerate(logits):
            positions = np.arange(end[b] - len(rows), end[b])
            real = positions < upto[b]
            self.logits[b, positions[real]], self.seen[b, positions[real]] = rows[real], True

    def run(self, what: str, chosen: int = 0) -> Run:
        return Run(what, self.ids, self.logits, self.seen, chosen)


def _run_steps(session: Session, what: str, ids: np.ndarray, steps: list[int]) -> Run:
    record, at = _Record(ids, session.exported.config.vocab_size), 0
    session.start(len(ids))
    for T in steps:
        logits = session.step(ids[:, at : at + T])
        at += T
        ends = np.full(len(ids), at)
        record.add(ends, logits, ends)
    return record.run(what if len(steps) == 1 else f"{what} {','.join(map(str, steps))}")


def _run_lengths(session: Session, ids: np.ndarray) -> Run:
    """Run two prompts, one of half the other's length, padded at the right; each then goes on from its own length."""
    S = ids.shape[1]
    lengths = np.array([S // 4, S // 2])
    ids = ids[:, : S // 2 + 5]
    record = _Record(ids, session.exported.config.vocab_size)
    session.start(2)
    record.add(np.full(2, lengths[1]), session.step(ids[:, : lengths[1]]), lengths)
    for T in (1, 3, 1):
        session.lengths = lengths
        new = np.stack([row[length : length + T] for row, length in zip(ids, lengths, strict=True)])
        lengths = lengths + T
        record.add(lengths, session.step(new), lengths)
    return record.run(f"lengths {S // 4},{S // 2} then 1,3,1")


def _run_greedy(session: Session, random: np.random.Generator) -> Run:
    """Choose at least GREEDY_TOKENS, in as many sequences as block_size makes necessary."""
    config = session.exported.config
    prompt = min(8, (config.block_size + 1) // 2)
    tokens = min(GREEDY_TOKENS, config.block_size + 1 - prompt)
    B = -(-GREEDY_TOKENS // tokens)
    ids = np.zeros((B, prompt + tokens), np.int64)
    ids[:, :prompt] = random.integers(0, config.vocab_size, (B, prompt))
    record = _Record(ids, config.vocab_size)
    session.start(B)
    start = 0
    for end in range(prompt, prompt + tokens):
        logits = session.step(ids[:, start:end])  # [B, T, V]
        record.add(np.full(B, end), logits, np.full(B, end))
        ids[:, end] = logits[:, -1].argmax(-1)
        start = end
    return record.run("greedy", chosen=tokens)


def compare(run: Run, wide: nn.Module, rounded: nn.Module, tolerance: float) -> Proof:
    """Compare a run with eager's plain forward pass, by `wide` in float64 and by `rounded` in float32."""
    read = run.ids[:, : run.ids.shape[1] - (run.chosen > 0)]  # the last token that was chosen was never given back
    in_fp64, in_fp32 = (_plain(model, read) for model in (wide, rounded))  # [B, S, V] each
    found = [_compare_sequence(run, b, in_fp64[b], in_fp32[b], tolerance) for b in range(len(read))]
    return Proof(
        what=run.what,
        B=len(found),
        T=read.shape[1],
        err_fp64=float(np.max([each.err_fp64 for each in found])),
        err_fp32=float(np.max([each.err_fp32 for each in found])),
        scale=max(each.scale for each in found),
        top1_match=float(np.mean([each.top1_match for each in found])),
        tolerance=tolerance,
        tokens=sum(each.tokens for each in found),
        tokens_equal=sum(each.tokens_equal for each in found),
        near_ties=sum(each.near_ties for each in found),
    )


def _compare_sequence(run: Run, b: int, in_fp64: np.ndarray, in_fp32: np.ndarray, tolerance: float) -> Proof:
    """Compare one of a run's sequences with eager's logits, [S, V] each."""
    seen = run.seen[b, : len(in_fp64)]
    logits, in_fp64, in_fp32 = (each[: len(seen)][seen] for each in (run.logits[b], in_fp64, in_fp32))  # [n, V]
    scale = float(np.abs(in_fp64).max())
    chosen = run.ids[b, run.ids.shape[1] - run.chosen :]
    first = len(logits) - len(chosen)  # the first position whose logits chose
    equal = chosen == in_fp32[first:].argmax(-1)
    behind = in_fp64[first:].max(-1) - np.take_along_axis(in_fp64[first:], chosen[:, None], -1)[:, 0]
    return Proof(
        what=run.what,
        B=1,
        T=len(seen),
        err_fp64=float(np.abs(logits - in_fp64).max()),
        err_fp32=float(np.abs(logits - in_fp32).max()),
        scale=scale,
        top1_match=float((logits.argmax(-1) == in_fp64.argmax(-1)).mean()),
        tolerance=tolerance,
        tokens=run.chosen,
        tokens_equal=int(equal.sum()),
        near_ties=int((~equal & (behind <= 2 * tolerance * scale)).sum()),
    )


def _plain(model: nn.Module, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(ids)).numpy()  # [B, S, V]


def _in_float64(model: nn.Module) -> nn.Module:
    """Have each layer widen its weights while it runs: all at once would be twice the model's memory."""
    narrow: dict[nn.Parameter, torch.Tensor] = {}

    def widen(module: nn.Module, _inputs: object) -> None:
        for parameter in module.parameters(recurse=False):
            narrow[parameter] = parameter.data
            parameter.data = parameter.data.double()

    def restore(module: nn.Module, _inputs: object, _output: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = narrow.pop(parameter)

    for module in model.modules():
        module.register_forward_pre_hook(widen)
        module.register_forward_hook(restore)
    return model
