"""A race of engines that do as they are told, in processes of their own."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.backends import Candidate, find_candidates
from bench.gpu.device import DeviceArtifacts
from bench.gpu.phases import DEVICE_PHASES, FirstToken, Step, Tokens
from bench.gpu.race import run_race
from bench.harness.plan import ROUNDS, Plan
from bench.harness.race import NOT_REACHED
from bench.models.build import SEEDED
from bench.roofline.bounds import Roofline, decode_bytes, prefill_flops

pytestmark = pytest.mark.slow

CONFIG = SEEDED["tiny"]
FAKES = {
    "eager": "",
    "doubled": "    def _first(self, ids):\n        return 2 * super()._first(ids)\n",
    "fallen": "    def notes(self):\n        raise RuntimeError('flash was forced, and torch ran math')\n",
    "hungry": "    def _next(self, ids, context):\n        if ids.shape[1] == 1:\n"
    "            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')\n"
    "        return super()._next(ids, context)\n",
}
Run = Callable[..., list[dict[str, Any]]]  # of the seconds that are left, and the engines
WORKS = (FirstToken(1, 70), Step(1, 1, 69))


@pytest.fixture
def candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Candidate]:
    """Make variants of eager: one is wrong, one ran something else, one has too little memory, one is absent."""
    package = tmp_path / "fakes"
    package.mkdir()
    head = "import torch\nfrom bench.gpu.engines import eager\n\n\nclass Engine(eager.Engine):\n    pass\n"
    for name, body in FAKES.items():
        (package / f"{name}.py").write_text(head + body)
    (package / "gone.py").write_text(head + "    requires = {'nonesuch': 'nonesuch'}\n")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return find_candidates([], ["bf16"], "fakes")


@pytest.fixture
def race(artifacts: DeviceArtifacts, candidates: list[Candidate]) -> Run:
    """Run a race, and return the results that it kept on the way."""

    def run(left_s: float, engines: tuple[str, ...] = (*FAKES, "gone")) -> list[dict[str, Any]]:
        kept: list[dict[str, Any]] = []
        plan = Plan(CONFIG, WORKS, threads=1, seed=3, precision="bf16")
        until = time.monotonic() + left_s
        asked = [each for each in candidates if each.engine in engines]
        found = run_race(artifacts, asked, plan, row_s=0.01, until=until, keep=kept.append)
        assert found == kept[-1]
        return kept

    return run


def test_each_row_is_timed_or_says_why_not(race: Run) -> None:
    kept = race(left_s=300)
    status = {(row["engine"], row["phase"]): (row["status"], row["reason"]) for row in kept[-1]["rows"]}
    both = ("first-token", "decode")
    assert [status["eager", phase] for phase in both] == [("timed", None)] * 2
    for phase in both:
        assert status["gone", phase] == ("absent", "not installed: pip install nonesuch")
        assert status["fallen", phase] == ("failed", "RuntimeError: flash was forced, and torch ran math")
        assert status["doubled", phase][0] == "disagrees"
    assert status["hungry", "first-token"] == ("timed", None)
    assert status["hungry", "decode"] == (
        "failed",
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
    )
    _check_numbers(kept[-1])
    _check_what_was_kept_on_the_way(kept)


def _check_numbers(found: dict[str, Any]) -> None:
    """Floors follow from the limits and the model's size, fractions from the floors and medians."""
    limits = Roofline(**found["limits"]["bf16"])
    rows = {(row["engine"], row["phase"]): row for row in found["rows"]}
    first, step = rows["eager", "first-token"], rows["eager", "decode"]
    flops = prefill_flops(CONFIG, 1, 70) - 69 * 2 * CONFIG.n_embd * CONFIG.vocab_size
    weights = 2 * (12 * CONFIG.n_layer * CONFIG.n_embd**2 + CONFIG.n_embd * CONFIG.vocab_size)
    assert first["limit_ms"] == pytest.approx(
        1e3 * max(flops / limits.peak_flops_per_s, weights / limits.bandwidth_bytes_per_s)
    )
    assert step["moved_bytes"] == decode_bytes(CONFIG, 1, 69, "bf16") == weights + 4 * CONFIG.n_layer * 69 * 32
    for row in (first, step):
        assert row["percent_of_limit"] == pytest.approx(100 * row["limit_ms"] / row["median_ms"])
        assert len(row["samples_by_round"]) == ROUNDS
        assert row["agrees"]
    checked = {(each["label"], each["phase"], each["work"]) for each in found["checks"] if each["agrees"]}
    assert {("eager", "first-token", name) for name in ("1×1", "3×1", "1×17", "3×17", "1×70", "3×70")} <= checked
    assert {("eager", "decode", name) for name in ("context 1", "context 1, 3 sequences", "context 69")} <= checked


def _check_what_was_kept_on_the_way(kept: list[dict[str, Any]]) -> None:
    timed = [sum(row["status"] == "timed" and bool(row["samples_ms"]) for row in each["rows"]) for each in kept]
    assert timed[0] == 0
    assert timed[1] > 0  # after the first piece of work
    waiting = [row for row in kept[0]["rows"] if row["engine"] == "eager"]
    assert [(row["status"], row["reason"]) for row in waiting] == [("left out", NOT_REACHED)] * 2


def test_what_there_is_no_time_for_is_left_out_and_named(race: Run) -> None:
    rows = race(left_s=0, engines=("eager", "gone"))[-1]["rows"]
    assert {(row["status"], row["reason"]) for row in rows if row["engine"] != "gone"} == {("left out", NOT_REACHED)}
    assert {row["limit_ms"] > 0 for row in rows} == {True}


def test_what_is_asked_suits_the_model() -> None:
    large, tiny = SEEDED["gpt2"], CONFIG
    assert [(work.B, work.T) for work in FirstToken.timed(large)] == [(1, 128), (1, 1024), (8, 128), (8, 1024)]
    assert [(work.B, work.context) for work in Step.timed(large)] == [(1, 128), (1, 1000), (8, 128), (8, 1000)]
    assert [(work.B, work.T, work.context) for work in Tokens.timed(large)] == [(1, 64, 128), (8, 64, 128)]
    assert {(work.B, work.T) for work in FirstToken.checked(large)} == {
        (B, T) for B in (1, 3) for T in (1, 17, large.block_size)
    }
    for kind in DEVICE_PHASES.values():
        for work in (*kind.timed(tiny), *kind.checked(tiny)):
            assert 1 <= work.context + work.T <= tiny.block_size
