"""`python -m bench` and `pytest bench/` from end to end, on the tiny seeded model."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

ROOT = Path(__file__).parents[2]
Run = Callable[..., CompletedProcess]
ROW_FIELDS = """engine variant phase dtype B T samples_ms median_ms max_abs_err max_rel_err top1_match agrees spread
threads limit_ms percent_of_limit speedup status reason""".split()  # noqa: SIM905


def test_the_whole_comparison(python: Run, tmp_path: Path) -> None:
    engines = ["--engine", "eager", "--engine", "onnxruntime"]
    done = python("bench", "--seeded", "tiny", *engines, "--minutes", "0.02", "--shapes", "1x5", "2x16", "--seed", "4")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "artifacts" / "seeded-tiny"
    results = json.loads((folder / "results.json").read_text())
    assert [(row["engine"], row["B"], row["T"]) for row in results["rows"]] == [
        ("eager", 1, 5),
        ("onnxruntime", 1, 5),
        ("eager", 2, 16),
        ("onnxruntime", 2, 16),
    ]
    for row in results["rows"]:
        assert set(ROW_FIELDS) <= row.keys()
        assert row["agrees"], row
        assert row["median_ms"] > row["limit_ms"] > 0
    assert results["seed"] == 4
    assert {"torch", "onnxruntime"} <= results["versions"].keys()
    last = done.stdout.splitlines()
    assert last[-1] == "report: artifacts/seeded-tiny/report.html"
    assert [line.split()[0] for line in last[-5:-2]] == ["engine", "onnxruntime", "eager"]
    assert "making a model with random weights (seed 0)" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--engine", "nonesuch"], "engine 'nonesuch': not known; known are eager"),
        (["--seeded", "tiny", "--engine", "eager", "--shapes", "1x99"], "shape '1x99': must be BxT"),
        (["--seeded", "tiny", "--engine", "eager", "--threads", "0"], "threads=0: must be in 1"),
    ],
)
def test_a_users_mistake_is_one_line(python: Run, arguments: list[str], says: str) -> None:
    done = python("bench", *arguments)
    assert done.returncode == 2
    assert f"error: {says}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_pytest_checks_and_times(python: Run, tmp_path: Path) -> None:
    options = ["--seeded", "tiny", "--engine", "eager", "--shape", "2x5", "--benchmark-only", "-p", "no:cacheprovider"]
    done = python(
        "pytest",
        ROOT / "bench/test_prefill.py",
        "-c",
        ROOT / "pyproject.toml",
        *options,
        "--benchmark-json",
        "out.json",
    )
    assert done.returncode == 0, done.stdout
    assert "engines run on the seeded model 'tiny' (random weights)" in done.stdout
    [found] = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    info = found["extra_info"]
    assert (info["engine"], info["B"], info["T"]) == ("eager", 2, 5)
    assert info["agreement"]["agrees"]
    assert info["checked_at"] == ["1×1", "3×16", "1×16", "2×5"]
    assert found["stats"]["min"] > 0


def test_pytest_refuses_an_unknown_engine(python: Run) -> None:
    done = python("pytest", ROOT / "bench", "-c", ROOT / "pyproject.toml", "--engine", "nonesuch", "--benchmark-only")
    assert done.returncode != 0
    assert "engine 'nonesuch': not known" in done.stdout + done.stderr
