"""`python -m bench` and `pytest bench/` from end to end, on the tiny seeded model."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from bench.models.artifacts import Artifacts
from bench.models.build import SEEDED
from bench.report import cliffs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
Run = Callable[..., CompletedProcess]
ROW_FIELDS = """engine variant phase work unit dtype B T context samples_ms median_ms moved_bytes max_abs_err
max_rel_err top1_match agrees spread threads limit_ms percent_of_limit speedup status reason""".split()  # noqa: SIM905


def test_the_whole_comparison(python: Run, tmp_path: Path, tiny: Artifacts) -> None:
    folder = tmp_path / "artifacts" / "seeded-tiny"
    folder.mkdir(parents=True)
    for path in (tiny.checkpoint, tiny.exported, tiny.cached):
        os.link(path, folder / path.name)
    engines = ["--engine", "eager", "--engine", "onnxruntime"]
    done = python("bench", "--seeded", "tiny", *engines, "--minutes", "0.02", "--shapes", "1x5", "2x16", "--seed", "4")
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "results.json").read_text())
    works = [
        ("prefill", "1×5"),
        ("prefill", "2×16"),
        ("decode", "context 32"),
        ("decode", "context 69"),
        ("generate", "62 tokens after 8"),
    ]
    assert [(row["phase"], row["work"], row["engine"]) for row in results["rows"]] == [
        (*work, engine) for work in works for engine in ("eager", "onnxruntime")
    ]
    for row in results["rows"]:
        assert set(ROW_FIELDS) <= row.keys()
        assert row["agrees"], row
        assert row["median_ms"] > row["limit_ms"] > 0
    assert results["seed"] == 4
    assert {"gpt-frontend", "torch", "onnxruntime"} <= results["versions"].keys()
    last = done.stdout.splitlines()
    assert last[-1] == "report: artifacts/seeded-tiny/report.html"
    assert [line.split()[0] for line in last[-5:-2]] == ["engine", "onnxruntime", "eager"]


def test_each_precision_is_a_race_of_its_own(python: Run, tmp_path: Path) -> None:
    arguments = ["--precision", "fp32", "bf16", "--engine", "eager", "--shapes", "1x1", "1x2", "--minutes", "0.02"]
    arguments += ["--phases", "prefill"]
    done = python("bench", "--seeded", "tiny", "--threads", "1", *arguments)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "artifacts" / "seeded-tiny" / "results.json").read_text())
    assert (results["precisions"], results["baselines"]) == (["fp32", "bf16"], {"fp32": "eager", "bf16": "tvm O3"})
    assert {(row["group"], row["label"], row["work"]) for row in results["rows"]} == {
        (precision, label, work)
        for precision, label in (("fp32", "eager"), ("bf16", "eager bf16"))
        for work in ("1×1", "1×2")
    }
    assert [row["agrees"] for row in results["rows"]] == [True] * 4
    wide, narrow = (results["limits"][precision] for precision in ("fp32", "bf16"))
    assert narrow["working_set_bytes"] * 2 == wide["working_set_bytes"]
    assert results["text"] == "no trained model: no loss"


@pytest.mark.long
def test_odd_lengths_are_held_to_their_neighbours(python: Run, tmp_path: Path) -> None:
    done = python("bench", "--seeded", "bigram", "--threads", "1", "--engine", "eager", "--odd", "--minutes", "0.02")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "artifacts" / "seeded-bigram" / "results.json").read_text())
    assert {row["T"] for row in results["rows"]} == set(cliffs.sizes(SEEDED["bigram"]))
    assert "odd lengths" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--engine", "nonesuch"], "engine 'nonesuch': not known; known are ctranslate2, eager"),
        (["--seeded", "tiny", "--engine", "eager", "--shapes", "1x99"], "shape '1x99': must be BxT"),
        (["--seeded", "tiny", "--engine", "eager", "--threads", "0"], "threads=0: must be in 1"),
        (["--seeded", "tiny", "--engine", "eager", "--contexts", "70"], "context 70: must be in 1 … 69"),
        (["--seeded", "tiny", "--engine", "eager", "--text", "x.txt"], "--text x.txt: would not be read: no trained"),
        (
            ["--seeded", "tiny", "--phases", "decode", "--odd"],
            "shape 1x1: is of prefill, which is not among the phases compared",
        ),
        (["--seeded", "tiny", "--phases", "train"], "phase 'train': must be one of prefill, decode, generate"),
        (["--engine", "eager", "--precision", "int8"], "engine 'eager' has no int8, only fp32, bf16"),
        (["--seeded", "bigram", "--phases", "decode"], "phase 'decode': must be one of prefill with this model"),
    ],
)
def test_a_users_mistake_is_one_line(python: Run, arguments: list[str], says: str) -> None:
    done = python("bench", *arguments)
    assert done.returncode == 2
    assert f"error: {says}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_pytest_checks_and_times(python: Run, tmp_path: Path) -> None:
    options = ["--seeded", "tiny", "--engine", "eager", "--shape", "2x5", "--context", "6", "--benchmark-only"]
    files = [ROOT / "bench" / f"test_{phase}.py" for phase in ("prefill", "decode", "generate")]
    settings = ["-c", ROOT / "pyproject.toml", "-p", "no:cacheprovider", "-k", "not cache"]
    done = python("pytest", *files, *settings, *options, "--benchmark-json", "out.json")
    assert done.returncode == 0, done.stdout
    assert "engines run on the seeded model 'tiny' (random weights)" in done.stdout
    assert (tmp_path / "artifacts" / "seeded-tiny" / "ckpt.pt").exists()
    found = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    infos = [each["extra_info"] for each in found]
    assert [(info["phase"], info["work"]) for info in infos] == [
        ("prefill", "2×5"),
        ("decode", "context 6"),
        ("generate", "62 tokens after 8"),
    ]
    assert all(info["agreement"]["agrees"] for info in infos)
    assert infos[0]["checked_at"] == ["prefill 1×1", "prefill 2×3", "prefill 3×17", "prefill 1×70", "prefill 2×5"]
    assert all(each["stats"]["min"] > 0 for each in found)
    assert found[2]["group"] == "generate 62 tokens after 8, time of a token"


def test_pytest_refuses_an_unknown_engine(python: Run) -> None:
    done = python("pytest", ROOT / "bench", "-c", ROOT / "pyproject.toml", "--engine", "nonesuch", "--benchmark-only")
    assert done.returncode != 0
    assert "engine 'nonesuch': not known" in done.stdout + done.stderr
