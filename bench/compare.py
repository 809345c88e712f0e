"""The whole comparison of one model: check every engine, then time those that agree, then say it in rows."""

import os
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

from tqdm import tqdm

from bench import limits, reference
from bench.agreement import odd_shapes, random_ids
from bench.artifacts import Artifacts
from bench.backends import Contender
from bench.limits import Limits, bound_of, weight_bytes
from bench.measure import rotated
from bench.rows import checks_of, rows_of
from bench.runner import CALL_DEADLINE_S, LOAD_DEADLINE_S, PHASE, Runner, Shape
from bench.units import shape_name
from bench.worker import Worker
from gpt.cli import UserError
from gpt.config import GPTConfig

ROUNDS = 5


@dataclass(frozen=True)
class Plan:
    """What to compare. shapes: (B, T) to time. minutes: for the timing itself; loading and checking come on top.

    seed: of the random ids. Raises UserError for a value that makes no sense.
    """

    shapes: tuple[Shape, ...]
    threads: int
    minutes: float = 0.75
    seed: int = field(default_factory=lambda: int.from_bytes(os.urandom(4)))

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= (os.cpu_count() or 1):
            raise UserError(f"threads={self.threads}: must be in 1 … {os.cpu_count()}, the CPUs of this machine")
        if not self.minutes > 0:
            raise UserError(f"minutes={self.minutes}: must be more than 0")
        if self.seed < 0:
            raise UserError(f"seed={self.seed}: must be at least 0")


def default_shapes(config: GPTConfig) -> tuple[Shape, ...]:
    """A short prompt, a longer one and a batch; for large models, which untuned code runs in minutes, no batch."""
    if config.block_size >= 512:
        return (1, 16), (1, 64), (1, 128)
    return (1, max(1, config.block_size // 4)), (1, config.block_size), (8, config.block_size)


def parse_shape(text: str, config: GPTConfig) -> Shape:
    """`BxT` as two numbers. Raises UserError unless B is at least 1 and T in 1 … block_size."""
    B, separator, T = text.partition("x")
    if not (separator and B.isdecimal() and T.isdecimal() and int(B) >= 1 and 1 <= int(T) <= config.block_size):
        raise UserError(f"shape {text!r}: must be BxT, as 1x64, with B at least 1 and T in 1 … {config.block_size}")
    return int(B), int(T)


def compare(artifacts: Artifacts, config: GPTConfig, contenders: list[Contender], plan: Plan) -> dict:
    """Check and time every contender that is present, each alone in its own process.

    Returns `limits`, `checks`, `rows`, `versions` and `seconds`, all plain JSON.
    """
    started = time.perf_counter()
    with ExitStack() as stack, tqdm(bar_format="{desc:<40.40} {bar} {elapsed}", leave=False) as progress:
        runners = [
            Runner(contender, stack.enter_context(Worker(contender.factory, plan.threads)))
            for contender in contenders
            if not contender.missing
        ]
        shapes = list(dict.fromkeys([*odd_shapes(config), *plan.shapes]))
        progress.reset(total=len(runners) * (1 + len(shapes) + ROUNDS * len(plan.shapes)) + 2)
        for runner in runners:
            _show(progress, f"loading {runner.contender.label}")
            runner.load(artifacts, plan.threads)
        _check_all(runners, artifacts, config, plan, shapes, progress)
        with Worker(limits.FACTORY, plan.threads) as probe:
            before = _measure_limits(probe, config, plan, progress)
            _time_all(runners, config, plan, progress)
            measured = _best(before, _measure_limits(probe, config, plan, progress))
    rows = [
        row
        for shape in plan.shapes
        for row in rows_of(shape, contenders, runners, config, plan.threads, bound_of(measured, config, *shape))
    ]
    return {
        "limits": asdict(measured),
        "checks": [check for runner in runners for check in checks_of(runner, shapes)],
        "rows": rows,
        "versions": {name: version for runner in runners for name, version in sorted(runner.versions.items())},
        "seconds": time.perf_counter() - started,
    }


def _check_all(
    runners: list[Runner], artifacts: Artifacts, config: GPTConfig, plan: Plan, shapes: list[Shape], progress: tqdm
) -> None:
    with Worker(reference.FACTORY, plan.threads) as truth:
        truth.call("load", artifacts, plan.threads, "", deadline_s=LOAD_DEADLINE_S)
        for shape in shapes:
            ids = random_ids(config, *shape, plan.seed)
            expected = truth.call(PHASE, ids, deadline_s=CALL_DEADLINE_S)
            for runner in runners:
                _show(progress, f"checking {runner.contender.label} at {shape_name(shape)}")
                if runner.may_run(shape):
                    runner.check(config, ids, expected, timed=shape in plan.shapes)


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
    share_s = plan.minutes * 60 / len(plan.shapes) / max(1, len(runners))  # of one engine at one shape
    for shape in plan.shapes:
        ids = random_ids(config, *shape, plan.seed)
        for number in range(ROUNDS):
            for runner in rotated(runners, number):
                _show(progress, f"timing {runner.contender.label} at {shape_name(shape)}")
                runner.take_turn(ids, share_s / ROUNDS, share_s)


def _show(progress: tqdm, text: str) -> None:
    progress.set_description(text, refresh=False)
    progress.update()
