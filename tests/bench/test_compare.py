"""The whole comparison, on engines made to fail in different ways and on real ones."""

import json

import pytest

from bench import limits
from bench.backends import Contender
from bench.compare import Plan, compare, default_shapes, parse_shape
from bench.prepare import SEEDED, choose_artifacts, prepare
from gpt.cli import UserError
from gpt.config import GPTConfig

FAKES = """
import os, signal
from bench.backends import eager

class Probe:
    def load(self, threads): pass
    def peak_flops_per_s(self): return 1e11
    def read_bytes_per_s(self, size): return 1e11

class eager_fake(eager.Engine): pass

class wrong(eager.Engine):
    def prefill(self, ids): return super().prefill(ids) + 1

class dies:
    def load(self, *_): os.kill(os.getpid(), signal.SIGKILL)
"""


def contender(engine: str, missing: tuple[str, ...] = ()) -> Contender:
    return Contender(engine, "", "float32", "checkpoint", "a fake", missing)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """One engine that is right, and three that are not there in the end, by engine."""
    folder = tmp_path_factory.mktemp("compared")
    (folder / "fakes_of_compare.py").write_text(FAKES)
    contenders = [contender("eager_fake"), contender("wrong"), contender("dies"), contender("gone", ("gone-package",))]
    artifacts, _ = choose_artifacts(folder, "tiny")
    prepare(artifacts, contenders)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.setattr(Contender, "factory", property(lambda self: f"fakes_of_compare:{self.engine}"))
        patch.setattr(limits, "FACTORY", "fakes_of_compare:Probe")
        plan = Plan(((1, 4),), threads=1, minutes=0.01, seed=3)
        found = compare(artifacts, SEEDED["tiny"], contenders, plan)
    return found | {"by_engine": {row["engine"]: row for row in found["rows"]}}


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
    assert "disagrees at 1×1: error" in row["reason"]


def test_an_engine_that_dies_has_its_reason(compared: dict) -> None:
    row = compared["by_engine"]["dies"]
    assert (row["status"], row["agrees"], row["samples_ms"]) == ("failed", None, [])
    assert row["reason"] == "the process died of SIGKILL"


def test_an_absent_engine_has_its_reason(compared: dict) -> None:
    row = compared["by_engine"]["gone"]
    assert (row["status"], row["reason"]) == ("absent", "not installed: pip install gone-package")


def test_it_is_plain_json(compared: dict) -> None:
    json.dumps(compared, allow_nan=False)


def test_odd_shapes_are_checked_too(compared: dict) -> None:
    shapes = [(check["B"], check["T"]) for check in compared["checks"] if check["label"] == "eager_fake"]
    assert shapes == [(1, 1), (3, 16), (1, 16), (1, 4)]
    assert all(check["agrees"] for check in compared["checks"] if check["label"] == "eager_fake")


@pytest.mark.parametrize("field", [{"threads": 0}, {"threads": 100_000}, {"minutes": 0}, {"seed": -1}])
def test_a_plan_that_makes_no_sense_is_an_error(field: dict) -> None:
    with pytest.raises(UserError, match=next(iter(field))):
        Plan(**{"shapes": ((1, 1),), "threads": 1} | field)


@pytest.mark.parametrize("text", ["64", "0x4", "1x0", "1x17", "1x-1", "axb", "1x2x3", ""])
def test_a_shape_that_the_model_cannot_take_is_an_error(text: str, config: GPTConfig) -> None:
    with pytest.raises(UserError, match=r"must be BxT, .* T in 1 … 16"):
        parse_shape(text, config)


def test_shapes_suit_the_model(config: GPTConfig) -> None:
    assert parse_shape("3x16", config) == (3, 16)
    for each in (config, GPTConfig(block_size=1), GPTConfig()):
        assert all(B >= 1 and 1 <= T <= each.block_size for B, T in default_shapes(each))
