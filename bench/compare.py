"""The whole comparison of one model: check every engine, then time those that agree, then say it in rows."""

import os
import time
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain, product

import numpy as np
from tqdm import tqdm

from bench import limits, reference
from bench.artifacts import Artifacts
from bench.backends import Contender
from bench.limits import Limits, best_of, weight_bytes
from bench.machine import checked_threads
from bench.measure import rotated
from bench.phases import PHASES, Decode, Prefill, Work, phases_of
from bench.reference import Truth
from bench.rows import checks_of, losses_of, rows_of
from bench.runner import Runner, shares_of
from bench.worker import Worker
from gpt.cli import UserError
from gpt.config import GPTConfig

ROUNDS = 5


@dataclass(frozen=True)
class Plan:
    """What to compare. works: to time. minutes: for the timing itself; loading and checking come on top.

    together: a round is of all works, so that their times may be compared with each other; otherwise a work has all of
    its rounds before the next one begins. seed: of the random ids. precision: that is compared. baseline: the label of
    the engine that speed-ups are taken to. Raises UserError for a value that makes no sense.
    """

    works: tuple[Work, ...]
    threads: int
    minutes: float = 0.75
    together: bool = False
    seed: int = field(default_factory=lambda: int.from_bytes(os.urandom(4)))
    precision: str = "fp32"
    baseline: str = "eager"

    def __post_init__(self) -> None:
        checked_threads(self.threads)
        if not self.minutes > 0:
            raise UserError(f"minutes={self.minutes}: must be more than 0")
        if self.seed < 0:
            raise UserError(f"seed={self.seed}: must be at least 0")

    @property
    def phases(self) -> tuple[str, ...]:
        """Of the works, each once."""
        return tuple(dict.fromkeys(work.phase for work in self.works))

    @property
    def prompts(self) -> tuple[tuple[int, int], ...]:
        """The shapes [B, T] of prefill, for which static engines need files."""
        return tuple((work.B, work.T) for work in self.works if work.phase == Prefill.phase)

    def to_check(self, config: GPTConfig) -> list[Work]:
        """What is checked of the phases whatever is timed, then what is timed."""
        return list(
            dict.fromkeys([*(work for name in self.phases for work in PHASES[name].checked(config)), *self.works])
        )


def works_of(
    config: GPTConfig, phases: Collection[str] = (), shapes: Collection[str] = (), contexts: Collection[int] = ()
) -> tuple[Work, ...]:
    """What to time of a model: the phases asked for (by default all it has), prefill at shapes and decode at contexts.

    Raises UserError for a phase that the model has not, a shape or a context that it cannot take.
    """
    has = phases_of(config)
    if unknown := [name for name in phases if name not in has]:
        raise UserError(f"phase {unknown[0]!r}: must be one of {', '.join(has)} with this model")
    asked = {
        # the small before the large, so that what is slow is known when the large comes
        Prefill.phase: tuple(Prefill(*shape) for shape in sorted({parse_shape(text, config) for text in shapes})),
        Decode.phase: tuple(Decode(1, 1, _checked_context(context, config)) for context in contexts),
    }
    names = [name for name in has if name in (phases or has)]
    return tuple(work for name in names for work in asked.get(name) or PHASES[name].timed(config))


def parse_shape(text: str, config: GPTConfig) -> tuple[int, int]:
    """`BxT` as two numbers. Raises UserError unless B is at least 1 and T in 1 … block_size."""
    B, separator, T = text.partition("x")
    if not (separator and B.isdecimal() and T.isdecimal() and int(B) >= 1 and 1 <= int(T) <= config.block_size):
        raise UserError(f"shape {text!r}: must be BxT, as 1x64, with B at least 1 and T in 1 … {config.block_size}")
    return int(B), int(T)


def compare(
    artifacts: Artifacts,
    config: GPTConfig,
    contenders: list[Contender],
    plan: Plan,
    truth_factory: str = reference.FACTORY,
    windows: np.ndarray | None = None,
) -> dict:
    """Check and time every contender that is present, each alone in its own process.

    truth_factory: what is right, as `bench.reference.Reference`. windows: of a text, int64 [N, T + 1], for the loss.
    Returns `limits` by precision, `checks`, `rows`, `losses`, `versions` and `seconds`, all plain JSON.
    """
    started = time.perf_counter()
    with ExitStack() as stack, tqdm(bar_format="{desc:<40.40} {bar} {elapsed}", leave=False) as progress:
        runners = [
            Runner(
                contender,
                stack.enter_context(Worker(contender.factory, plan.threads, contender.interpreter)),
                plan.works,
            )
            for contender in contenders
            if not contender.absent
        ]
        works = plan.to_check(config)
        progress.reset(total=_steps(runners, works, plan))
        for runner in runners:
            _show(progress, f"loading {runner.contender.label}")
            runner.load(artifacts, config, plan.threads)
        with Truth(artifacts, config, plan.threads, truth_factory) as truth:
            _check_all(runners, truth, config, plan, works, progress)
            right = _measure_losses(runners, truth, windows, progress)
        with Worker(limits.FACTORY, plan.threads) as probe:
            probe.call("load", plan.threads)
            precisions = dict.fromkeys(contender.precision for contender in contenders)
            measured = _time_all(runners, probe, precisions, config, plan, progress)
    rows = (rows_of(work, contenders, runners, config, measured[work], plan) for work in plan.works)
    return {
        "limits": {name: asdict(best_of(*(each[name] for each in measured.values()))) for name in precisions},
        "checks": [check for runner in runners for check in checks_of(runner, works, plan)],
        "rows": list(chain.from_iterable(rows)),
        "losses": [] if windows is None else losses_of(right, runners, plan),
        "versions": {name: version for runner in runners for name, version in sorted(runner.versions.items())},
        "seconds": time.perf_counter() - started,
    }


def _checked_context(context: int, config: GPTConfig) -> int:
    if not 1 <= context < config.block_size:
        raise UserError(f"context {context}: must be in 1 … {config.block_size - 1}, so that a token fits behind it")
    return context


def _steps(runners: list[Runner], works: list[Work], plan: Plan) -> int:
    """How often the progress bar moves."""
    checks = sum(runner.can(work) for runner in runners for work in works)
    turns = sum(1 + sum(runner.can(work) for runner in runners) for work in plan.works) * ROUNDS
    return 2 * len(runners) + checks + turns + 1


def _check_all(
    runners: list[Runner], truth: Truth, config: GPTConfig, plan: Plan, works: list[Work], progress: tqdm
) -> None:
    for work in works:
        ids = work.ids(config, plan.seed)
        for runner in runners:
            if runner.can(work):
                _show(progress, f"checking {runner.contender.label}: {work.phase} {work.name}")
            if runner.may_run(work):
                runner.check(work, ids, truth, config, timed=work in plan.works)


def _measure_losses(runners: list[Runner], truth: Truth, windows: np.ndarray | None, progress: tqdm) -> float | None:
    """Each engine's loss, noted in its runner, and the reference's."""
    if windows is None:
        return None
    for runner in runners:
        _show(progress, f"loss of {runner.contender.label}")
        runner.measure_loss(windows)
    _show(progress, "loss of the reference")
    return truth.loss(windows)


def _time_all(
    runners: list[Runner],
    probe: Worker,
    precisions: Iterable[str],
    config: GPTConfig,
    plan: Plan,
    progress: tqdm,
) -> dict[Work, dict[str, Limits]]:
    """Time all that can be timed. Returns the machine's limits in the rounds of each work, by precision."""
    shares_s = shares_of(runners, plan.works, plan.minutes * 60)
    rounds: dict[Work, list[dict[str, Limits]]] = {work: [] for work in plan.works}
    groups = [plan.works] if plan.together else [(work,) for work in plan.works]
    for group in groups:
        for number, work in product(range(ROUNDS), group):
            _show(progress, f"the machine's limits: {work.phase} {work.name}")
            rounds[work].append({name: _limits_now(probe, name, config, plan) for name in precisions})
            ids = work.ids(config, plan.seed)
            for runner in rotated([runner for runner in runners if runner.can(work)], number):
                _show(progress, f"timing {runner.contender.label}: {work.phase} {work.name}")
                runner.take_turn(work, ids, shares_s[work] / ROUNDS, shares_s[work])
    return {
        work: {name: best_of(*(each[name] for each in limits)) for name in precisions}
        for work, limits in rounds.items()
    }


def _limits_now(probe: Worker, precision: str, config: GPTConfig, plan: Plan) -> Limits:
    size = weight_bytes(config, precision)
    peak, bandwidth = probe.call("peak_flops_per_s", precision), probe.call("read_bytes_per_s", size)
    memory = probe.call("read_bytes_per_s", limits.UNCACHED_BYTES)
    return Limits(plan.threads, peak, bandwidth, size, memory, precision)


def _show(progress: tqdm, text: str) -> None:
    progress.set_description(text, refresh=False)
    progress.update()
