"""Turns what the runners found into plain rows of JSON; `bench.report.page` describes a row's fields."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from bench.backends import Candidate
from bench.correctness.agreement import PRECISIONS
from bench.harness.measure import Measurement, median_of, speedup_of, spread_of
from bench.harness.plan import Plan
from bench.harness.runner import Runner
from bench.harness.work import Work
from bench.roofline.bounds import Roofline


def rows_of(
    work: Work,
    candidates: list[Candidate],
    runners: Sequence[Runner],
    limits: dict[str, Roofline],
    plan: Plan,
) -> Iterator[dict]:
    """Make a row for each candidate that has the work's phase, absent and failed ones too. limits: by precision."""
    by_candidate = {runner.candidate: runner for runner in runners}
    base = next((runner.measurement_at(work) for runner in runners if runner.candidate.label == plan.baseline), None)
    for candidate in candidates:
        if work.phase not in candidate.phases:
            continue
        runner = by_candidate.get(candidate)
        status, reason = _status_of(candidate, runner, work)
        agreement = runner.checks.get(work) if runner else None
        bound = work.bound(limits[candidate.precision], plan.config)
        yield {
            "group": plan.precision,
            "engine": candidate.engine,
            "variant": candidate.variant,
            "label": candidate.label,
            "summary": candidate.summary,
            **_names_of(work),
            "unit": work.unit,
            "precision": candidate.precision,
            "dtype": PRECISIONS[candidate.precision].dtype,
            "threads": limits[candidate.precision].threads,
            "status": status,
            "reason": reason,
            **_times_of(runner.measurement_at(work) if runner else None, base, bound.seconds),
            "limit_ms": bound.seconds * 1e3,
            "limit_binds": bound.binds,
            "moved_bytes": work.moved_bytes(plan.config, candidate.precision),
            **_errors_of(runner, work),
            "tolerance": agreement.tolerance if agreement else None,
        }


def checks_of(runner: Runner, plan: Plan) -> Iterator[dict]:
    """Make a row for each check of an engine, of the works that are timed and of those that are not."""
    for work in plan.to_check:
        if not runner.can(work):
            continue
        agreement = runner.checks.get(work)
        if agreement:
            found = asdict(agreement)
        else:
            reason = runner.failed or runner.errors.get(work) or runner.left_out.get(work) or runner.disagreed
            found = {"agrees": None, "reason": reason}
        yield {"group": plan.precision, "label": runner.candidate.label, **_names_of(work)} | found


def losses_of(reference_loss: float, runners: Sequence[Runner], plan: Plan) -> list[dict]:
    """Make a row for each engine: its loss on the text in nats per token against the reference's, or why it has none.

    reference_loss: in nats per token.
    """
    return [
        {
            "group": plan.precision,
            "label": runner.candidate.label,
            "precision": runner.candidate.precision,
            "loss": runner.loss,
            "percent_above": None if runner.loss is None else 100 * (runner.loss / reference_loss - 1),
            "reference": reference_loss,
            "reason": runner.no_loss,
        }
        for runner in runners
        if "prefill" in runner.candidate.phases
    ]


def _names_of(work: Work) -> dict:
    return {"phase": work.phase, "work": work.name, "B": work.B, "T": work.T, "context": work.context}


def _status_of(candidate: Candidate, runner: Runner | None, work: Work) -> tuple[str, str | None]:
    """Return the status of a row and its reason.

    The status is `timed`, `absent`, `failed` (it raised, died or hung), `disagrees` or `left out` (it is too slow, or
    the time was up); only `timed` has no reason.
    """
    if runner is None:
        return "absent", candidate.absent
    if runner.disagreed:
        return "disagrees", runner.disagreed
    if reason := runner.failed or runner.errors.get(work):
        return "failed", reason
    if reason := runner.left_out.get(work):
        return "left out", reason
    return "timed", None


def _times_of(measurement: Measurement | None, baseline: Measurement | None, bound_s: float) -> dict:
    if measurement is None:
        names = ("median_ms", "spread", "speedup", "percent_of_limit")
        return {"samples_ms": [], "samples_by_round": []} | dict.fromkeys(names)
    median_s = median_of(measurement)
    speedup = speedup_of(measurement, baseline) if baseline else None
    return {
        "samples_ms": [sample * 1e3 for samples in measurement.samples_s for sample in samples],
        "samples_by_round": [len(samples) for samples in measurement.samples_s],
        "median_ms": median_s * 1e3,
        "spread": spread_of(measurement),
        "speedup": asdict(speedup) if speedup else None,
        "percent_of_limit": 100 * bound_s / median_s,
    }


def _errors_of(runner: Runner | None, work: Work) -> dict:
    agreement = runner.checks.get(work) if runner else None
    names = ("max_abs_err", "max_rel_err", "top1_match", "share_of_allowed", "agrees")
    errors = {name: getattr(agreement, name) if agreement else None for name in names}
    # An engine that is wrong at one work is not to be trusted at the others.
    return errors | ({"agrees": False} if runner and runner.disagreed else {})
