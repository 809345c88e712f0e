"""The whole comparison, on engines made to fail in different ways and on real ones."""

import json
from pathlib import Path

import pytest

from bench.backends import Candidate
from bench.harness.plan import Plan, parse_shape, works_of
from bench.harness.race import compare
from bench.harness.work import Decode, Generate, Prefill
from bench.models.build import SEEDED, choose_artifacts, prepare
from bench.roofline import probe
from bench.roofline.bounds import decode_bytes
from gpt.cli import UserError
from gpt.config import GPTConfig

pytestmark = pytest.mark.slow

FAKES = """
import os, signal
from bench.backends import eager

class Probe:  # of a machine that gets faster with each round
    def load(self, threads): self.round = 0
    def peak_flops_per_s(self, precision):
        self.round += 1
        return self.round * 1e12
    def read_bytes_per_s(self, size): return self.round * 1e10

class eager_fake(eager.Engine): pass

class wrong(eager.Engine):
    def _prefill(self, ids): return super()._prefill(ids) + 1

class forgets(eager.Engine):
    def _decode(self, ids, context): return self._fill(ids)  # as if nothing had come before

class dies:
    def load(self, *_): os.kill(os.getpid(), signal.SIGKILL)
"""


def candidate(engine: str, absent: str | None = None) -> Candidate:
    files = tuple((phase, "ckpt.pt") for phase in ("prefill", "decode", "generate"))
    return Candidate(engine, "", "fp32", files, "a fake", absent)


def compare_fakes(folder: Path, candidates: list[Candidate], plan: Plan) -> dict:
    (folder / "fakes_of_compare.py").write_text(FAKES)
    artifacts, _ = choose_artifacts(folder, "tiny")
    prepare(artifacts, candidates)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.setattr(Candidate, "factory", property(lambda self: f"fakes_of_compare:{self.engine}"))
        patch.setattr(probe, "FACTORY", "fakes_of_compare:Probe")
        return compare(artifacts, candidates, plan)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """One engine that is right, and four that are not there in the end, by engine and phase."""
    candidates = [candidate("eager_fake"), *map(candidate, ("wrong", "forgets", "dies"))]
    candidates.append(candidate("gone", "not installed: pip install gone-package"))
    plan = Plan(SEEDED["tiny"], (Prefill(1, 4), Decode(1, 1, 5), Generate(1, 6, 4)), threads=1, minutes=0.01, seed=3)
    found = compare_fakes(tmp_path_factory.mktemp("compared"), candidates, plan)
    by_engine = {row["engine"]: row for row in reversed(found["rows"])}
    return found | {
        "by_engine": by_engine,
        "decode": {row["engine"]: row for row in found["rows"] if row["context"] == 5},
    }


def test_an_engine_that_is_right_is_timed(compared: dict) -> None:
    row = compared["by_engine"]["eager_fake"]
    assert (row["status"], row["agrees"], row["B"], row["T"]) == ("timed", True, 1, 4)
    assert 0 < row["max_rel_err"] < row["tolerance"]
    assert len(row["samples_ms"]) == sum(row["samples_by_round"])
    assert min(row["samples_ms"]) <= row["median_ms"] <= max(row["samples_ms"])
    assert row["percent_of_limit"] == pytest.approx(100 * row["limit_ms"] / row["median_ms"])


def test_an_engine_that_is_wrong_has_its_error_and_no_time(compared: dict) -> None:
    row = compared["by_engine"]["wrong"]
    assert (row["status"], row["agrees"], row["median_ms"]) == ("disagrees", False, None)
    assert "disagrees in prefill at 1×1: error" in row["reason"]


def test_an_engine_that_dies_has_its_reason(compared: dict) -> None:
    row = compared["by_engine"]["dies"]
    assert (row["status"], row["agrees"], row["samples_ms"]) == ("failed", None, [])
    assert row["reason"] == "the process died of SIGKILL"


def test_an_absent_engine_has_its_reason(compared: dict) -> None:
    row = compared["by_engine"]["gone"]
    assert (row["status"], row["reason"]) == ("absent", "not installed: pip install gone-package")


def test_it_is_plain_json(compared: dict) -> None:
    json.dumps(compared, allow_nan=False)


def test_a_decode_has_the_bytes_that_must_be_read(compared: dict) -> None:
    row = compared["decode"]["eager_fake"]
    assert (row["phase"], row["work"], row["B"], row["T"]) == ("decode", "context 5", 1, 1)
    assert row["moved_bytes"] == decode_bytes(SEEDED["tiny"], 1, 5)
    assert row["agrees"]


def test_the_limit_is_that_of_the_rounds_of_the_work(compared: dict) -> None:
    """Prefill has the first five rounds, decode the next, generation the last."""
    row = compared["decode"]["eager_fake"]
    assert row["limit_ms"] == pytest.approx(1e3 * row["moved_bytes"] / 10e10)
    of_the_run = compared["limits"]["fp32"]
    assert (of_the_run["peak_flops_per_s"], of_the_run["bandwidth_bytes_per_s"]) == (15e12, 15e10)


def test_a_decode_that_forgets_its_context_disagrees(compared: dict) -> None:
    row = compared["decode"]["forgets"]
    assert (row["status"], row["agrees"]) == ("disagrees", False)
    assert "disagrees in decode at context 1: error" in row["reason"]


def test_a_generation_is_timed_by_the_token(compared: dict) -> None:
    row = next(row for row in compared["rows"] if (row["phase"], row["engine"]) == ("generate", "eager_fake"))
    assert (row["work"], row["unit"], row["top1_match"]) == ("6 tokens after 4", "token", 1.0)
    assert row["median_ms"] > row["limit_ms"]


def test_works_that_are_together_share_their_rounds(tmp_path: Path) -> None:
    """In five rounds of two works, one has the limits of the first, third, … ninth moment, the other the rest."""
    plan = Plan(SEEDED["tiny"], (Prefill(1, 1), Prefill(1, 2)), threads=1, minutes=0.01, together=True)
    rows = compare_fakes(tmp_path, [candidate("eager_fake")], plan)["rows"]
    assert [(row["work"], row["limit_binds"], len(row["samples_by_round"])) for row in rows] == [
        ("1×1", "reading", 5),
        ("1×2", "reading", 5),
    ]
    rates = [row["moved_bytes"] / row["limit_ms"] * 1e3 for row in rows]
    assert rates == pytest.approx([9e10, 10e10])


def test_odd_sizes_are_checked_too(compared: dict) -> None:
    checks = [check for check in compared["checks"] if check["label"] == "eager_fake"]
    shapes = [(check["B"], check["T"]) for check in checks if check["phase"] == "prefill"]
    assert shapes == [(1, 1), (2, 3), (3, 17), (1, 70), (1, 4)]
    contexts = [(check["B"], check["context"]) for check in checks if check["phase"] == "decode"]
    assert contexts == [(1, 1), (3, 13), (1, 5)]
    assert all(check["agrees"] for check in compared["checks"] if check["label"] == "eager_fake")


@pytest.mark.parametrize("field", [{"threads": 0}, {"threads": 100_000}, {"minutes": 0}, {"seed": -1}])
def test_a_plan_that_makes_no_sense_is_an_error(field: dict) -> None:
    with pytest.raises(UserError, match=next(iter(field))):
        Plan(**{"config": SEEDED["tiny"], "works": (Prefill(1, 1),), "threads": 1} | field)


@pytest.mark.parametrize("text", ["64", "0x4", "1x0", "1x71", "1x-1", "axb", "1x2x3", ""])
def test_a_shape_that_the_model_cannot_take_is_an_error(text: str, config: GPTConfig) -> None:
    with pytest.raises(UserError, match=r"must be BxT, .* T in 1 … 70"):
        parse_shape(text, config)


def test_a_shape_is_two_numbers(config: GPTConfig) -> None:
    assert parse_shape("3x16", config) == (3, 16)


def test_what_is_asked_for_is_timed(config: GPTConfig) -> None:
    assert works_of(config, ["decode"]) == (Decode(1, 1, 32), Decode(1, 1, 69))
    assert works_of(config, ["decode", "prefill"], ["2x3"], [1, 7]) == (
        Prefill(2, 3),
        Decode(1, 1, 1),
        Decode(1, 1, 7),
    )
    assert works_of(config) == (
        *(Prefill(*shape) for shape in ((1, 17), (1, 70), (8, 70))),
        Decode(1, 1, 32),
        Decode(1, 1, 69),
        Generate(1, 62, 8),
    )


def test_a_bigram_has_no_cache_to_decode_with() -> None:
    bigram = SEEDED["bigram"]
    assert {work.phase for work in works_of(bigram)} == {"prefill"}
    with pytest.raises(UserError, match="phase 'decode': must be one of prefill with this model"):
        works_of(bigram, ["decode"])


@pytest.mark.parametrize("context", [0, 70, -1])
def test_a_context_that_leaves_no_room_is_an_error(context: int, config: GPTConfig) -> None:
    with pytest.raises(UserError, match=rf"context {context}: must be in 1 … 69"):
        works_of(config, ["decode"], [], [context])


def test_an_unknown_phase_is_an_error(config: GPTConfig) -> None:
    with pytest.raises(UserError, match="phase 'train': must be one of prefill, decode, generate"):
        works_of(config, ["train"])


@pytest.mark.parametrize(
    ("phases", "shapes", "contexts", "says"),
    [
        (["decode"], ["1x4"], [], "shape 1x4: is of prefill, which is not among the phases compared"),
        (["prefill", "generate"], [], [5], "context 5: is of decode, which is not among"),
    ],
)
def test_a_size_of_a_phase_that_is_left_out_is_an_error(
    phases: list[str], shapes: list[str], contexts: list[int], says: str, config: GPTConfig
) -> None:
    with pytest.raises(UserError, match=says):
        works_of(config, phases, shapes, contexts)
