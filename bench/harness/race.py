"""The whole comparison of one model: check every engine, then time those that agree, then say it in rows."""

import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain, product

import numpy as np
from tqdm import tqdm

from bench.backends import Contender
from bench.correctness import reference
from bench.correctness.reference import Truth
from bench.harness.measure import rotated
from bench.harness.plan import ROUNDS, Plan
from bench.harness.results import checks_of, losses_of, rows_of
from bench.harness.runner import Runner, shares_of
from bench.harness.work import Work
from bench.harness.worker import Worker
from bench.models.artifacts import Artifacts
from bench.roofline import probe as probes
from bench.roofline.bounds import Limits, best_of, weight_bytes
from gpt.config import GPTConfig


def compare(
    artifacts: Artifacts,
    config: GPTConfig,
    contenders: list[Contender],
    plan: Plan,
    truth_factory: str = reference.FACTORY,
    windows: np.ndarray | None = None,
) -> dict:
    """Check and time every contender that is present, each alone in its own process.

    truth_factory: what is right, as `bench.correctness.reference.Reference`. windows: of a text, int64 [N, T + 1], for
    the loss. Returns `limits` by precision, `checks`, `rows`, `losses`, `versions` and `seconds`, all plain JSON.
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
        with Worker(probes.FACTORY, plan.threads) as probe:
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
    memory = probe.call("read_bytes_per_s", probes.UNCACHED_BYTES)
    return Limits(plan.threads, peak, bandwidth, size, memory, precision)


def _show(progress: tqdm, text: str) -> None:
    progress.set_description(text, refresh=False)
    progress.update()
