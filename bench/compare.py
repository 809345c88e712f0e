"""The whole comparison of one model: check every engine, then time those that agree, then say it in rows."""

import os
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

from tqdm import tqdm

from bench import limits, reference
from bench.artifacts import Artifacts
from bench.backends import Contender
from bench.limits import Limits, weight_bytes
from bench.machine import checked_threads
from bench.measure import rotated
from bench.phases import PHASES, Decode, Prefill, Work, phases_of
from bench.reference import Truth
from bench.rows import checks_of, rows_of
from bench.runner import Runner
from bench.worker import Worker
from gpt.cli import UserError
from gpt.config import GPTConfig

ROUNDS = 5


@dataclass(frozen=True)
class Plan:
    """What to compare. works: to time. minutes: for the timing itself; loading and checking come on top.

    seed: of the random ids. Raises UserError for a value that makes no sense.
    """

    works: tuple[Work, ...]
    threads: int
    minutes: float = 1.0
    seed: int = field(default_factory=lambda: int.from_bytes(os.urandom(4)))

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
        Prefill.phase: tuple(Prefill(*parse_shape(text, config)) for text in shapes),
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
) -> dict:
    """Check and time every contender that is present, each alone in its own process.

    truth_factory: what is right, as `bench.reference.Reference`. Returns `limits`, `checks`, `rows`, `versions` and
    `seconds`, all plain JSON.
    """
    started = time.perf_counter()
    with ExitStack() as stack, tqdm(bar_format="{desc:<40.40} {bar} {elapsed}", leave=False) as progress:
        runners = [
            Runner(contender, stack.enter_context(Worker(contender.factory, plan.threads)))
            for contender in contenders
            if not contender.missing
        ]
        works = plan.to_check(config)
        progress.reset(total=_steps(runners, works, plan))
        for runner in runners:
            _show(progress, f"loading {runner.contender.label}")
            runner.load(artifacts, config, plan.threads)
        with Truth(artifacts, config, plan.threads, truth_factory) as truth:
            _check_all(runners, truth, config, plan, works, progress)
        with Worker(limits.FACTORY, plan.threads) as probe:
            before = _measure_limits(probe, config, plan, progress)
            _time_all(runners, config, plan, progress)
            measured = _best(before, _measure_limits(probe, config, plan, progress))
    return {
        "limits": asdict(measured),
        "checks": [check for runner in runners for check in checks_of(runner, works)],
        "rows": [row for work in plan.works for row in rows_of(work, contenders, runners, config, measured)],
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
    turns = sum(runner.can(work) for runner in runners for work in plan.works) * ROUNDS
    return len(runners) + checks + turns + 2


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


def _measure_limits(probe: Worker, config: GPTConfig, plan: Plan, progress: tqdm) -> Limits:
    _show(progress, "measuring the machine's limits")
    probe.call("load", plan.threads)
    size = weight_bytes(config)
    return Limits(
        threads=plan.threads,
        peak_flops_per_s=probe.call("peak_flops_per_s"),
        bandwidth_bytes_per_s=probe.call("read_bytes_per_s", size),
        working_set_bytes=size,
        memory_bytes_per_s=probe.call("read_bytes_per_s", limits.UNCACHED_BYTES),
    )


def _best(one: Limits, other: Limits) -> Limits:
    """A limit is the best that was ever seen, so of two measurements the higher rates."""
    return Limits(**{name: max(value, getattr(other, name)) for name, value in asdict(one).items()})


def _time_all(runners: list[Runner], config: GPTConfig, plan: Plan, progress: tqdm) -> None:
    pairs = sum(runner.can(work) for runner in runners for work in plan.works)
    share_s = plan.minutes * 60 / max(1, pairs)  # of one engine at one piece of work
    for work in plan.works:
        ids = work.ids(config, plan.seed)
        able = [runner for runner in runners if runner.can(work)]
        for number in range(ROUNDS):
            for runner in rotated(able, number):
                _show(progress, f"timing {runner.contender.label}: {work.phase} {work.name}")
                runner.take_turn(work, ids, share_s / ROUNDS, share_s)


def _show(progress: tqdm, text: str) -> None:
    progress.set_description(text, refresh=False)
    progress.update()
