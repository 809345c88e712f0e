"""Tests Relay as an engine: it is absent without its environment, and with it is timed beside Relax as any other."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from bench.__main__ import BenchConfig, unless_many_shapes
from bench.backends import Candidate, find_candidates
from gpt.cli import UserError

pytestmark = pytest.mark.slow


def test_without_its_environment_it_is_absent_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvm_frontend.relay.environment.FOLDER", tmp_path / ".venv-relay")
    reasons = {each.label: each.absent for each in find_candidates() if each.engine == "relay"}
    assert reasons == dict.fromkeys(("relay O0", "relay O3"), "no .venv-relay, in which Relay runs: make relay")
    with pytest.raises(UserError, match=r"'relay' was asked for and is absent: no \.venv-relay"):
        find_candidates(["relay"])


def test_a_sweep_takes_it_only_if_asked() -> None:
    relay = Candidate("relay", "O3", "fp32", (("prefill", "tvm-llvm-O3-relay"),), "Relay", static=True)
    assert "a module for each; --engine relay asks" in unless_many_shapes(relay, BenchConfig(sweep=True)).absent
    assert unless_many_shapes(relay, BenchConfig(sweep=True, engine=("relay",))) == relay
    assert unless_many_shapes(relay, BenchConfig(shapes=("1x5",))) == relay


@pytest.mark.relay
def test_it_is_checked_and_timed_in_its_own_environment_beside_relax(
    python: Callable[..., CompletedProcess], tmp_path: Path
) -> None:
    engines = ["--engine", "relay", "--engine", "tvm"]
    done = python("bench", "--seeded", "bigram", *engines, "--shapes", "1x5", "2x16", "--minutes", "0.02")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "artifacts" / "seeded-bigram"
    results = json.loads((folder / "results.json").read_text())
    labels = ["relay O0", "relay O3", "tvm O0", "tvm O3"]
    assert [(row["work"], row["label"]) for row in results["rows"]] == [
        (work, label) for work in ("1×5", "2×16") for label in labels
    ]
    for row in results["rows"]:
        assert (row["status"], row["max_abs_err"]) == ("timed", 0.0), row
    checked = {(each["label"], each["work"]) for each in results["checks"] if each["label"] == "relay O3"}
    assert checked == {("relay O3", "1×5"), ("relay O3", "2×16")}  # no module is built for other shapes
    assert {path.name for path in (folder / "tvm-llvm-O3-relay").iterdir()} == {"1x5", "2x16"}
    assert [path.name for path in tmp_path.iterdir()] == ["artifacts"]  # no cache of TVM's
    assert results["versions"]["Relay"].startswith("TVM 0.17")
    compiled = [each for each in results["compiled"] if each["work"] == "2×16"]
    assert [each["label"] for each in compiled] == labels
    for each in compiled:
        assert min(each["import_s"], each["build_s"], each["library_bytes"], each["kernels"]) > 0
        assert each["calls"] >= each["kernels"]
    table = (folder / "report.md").read_text().split("### Compilers on the same file: prefill 2×16")[1]
    assert all(f"| {label} |" in table.split("###")[0] for label in labels)
