"""`python -m bench.gpu` from end to end, with a CPU in a GPU's place."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from bench.harness.worker import ROOT
from tvm_frontend.cuda_toolchain import gpu_arch

pytestmark = pytest.mark.slow

Run = Callable[..., CompletedProcess]
TRY = ["--device", "cpu", "--models", "tiny", "--threads", "1", "--no-kernels", "--output", "out"]


def test_the_whole_command(python: Run, tmp_path: Path) -> None:
    engines = [word for name in ("sdpa", "tvm") for word in ("--engine", name)]
    settings = ["--phases", "decode", "generate", "--minutes", "5", "--seconds", "0.02", "--seed", "4"]
    done = python("bench.gpu", *TRY, *engines, *settings)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "tiny.json").read_text())
    works = [("decode", "context 69"), ("generate", "35 tokens after 35")]
    works += [("decode", "context 69, 8 sequences"), ("generate", "35 tokens after 35, 8 sequences")]
    labels = ["sdpa", "tvm O0", "tvm O3"]
    assert [(row["phase"], row["work"], row["label"]) for row in found["rows"]] == [
        (*work, label) for work in works for label in labels
    ]
    for row in found["rows"]:
        assert (row["status"], row["agrees"]) == ("timed", True), row
        assert row["median_ms"] > 0 < row["limit_ms"]
    assert "flash" in found["notes"]["sdpa"]["attention"]
    assert found["notes"]["tvm O3"] == {"compiled for": "llvm", "calls": "ids and logits by way of the host"}
    assert found["seed"] == 4
    table = re.sub(" +", " ", (tmp_path / "out" / "README.md").read_text())
    assert all(f"| {label} |" in table for label in labels)
    assert done.stdout.splitlines()[-1] == "wrote out/README.md"


@pytest.mark.relay
def test_relay_is_timed_beside_the_others_and_has_prompts_alone(python: Run, tmp_path: Path) -> None:
    engines = [word for name in ("relay", "eager") for word in ("--engine", name)]
    settings = ["--phases", "first-token", "decode", "--minutes", "5", "--seconds", "0.02"]
    done = python("bench.gpu", *TRY, *engines, *settings)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "tiny.json").read_text())
    rows = [row for row in found["rows"] if row["label"] == "relay O3"]
    assert [(row["phase"], row["work"]) for row in rows] == [("first-token", "1×70"), ("first-token", "8×70")]
    for row in rows:
        assert (row["status"], row["precision"], row["agrees"]) == ("timed", "fp32", True), row
        assert 0 < row["max_rel_err"] < 1e-5
        assert min(row["samples_ms"]) > 0
    checked = {each["work"] for each in found["checks"] if each["label"] == "relay O3"}
    assert checked == {"1×70", "8×70"}  # no module was built for others
    modules = tmp_path / "artifacts" / "seeded-tiny" / "tvm-llvm-O3-unproven-relay"
    assert {path.name for path in modules.iterdir()} == {"1x70", "8x70"}
    assert "none" in found["notes"]["relay O3"]["KV cache"]
    assert found["versions"]["Relay"].startswith("TVM 0.17")


def test_a_run_that_is_killed_leaves_what_it_had_done(tmp_path: Path) -> None:
    arguments = ["bench.gpu", *TRY, "--engine", "eager", "--phases", "decode", "--seconds", "8"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = subprocess.Popen([sys.executable, "-m", *arguments], cwd=tmp_path, env=environment)
    path, table_path = tmp_path / "out" / "tiny.json", tmp_path / "out" / "README.md"
    until = time.monotonic() + 300
    while time.monotonic() < until:  # the table is written after the JSON file
        if table_path.exists() and "| eager " in table_path.read_text():
            break
        time.sleep(0.2)
    running.send_signal(signal.SIGKILL)
    running.wait()
    done, waiting = json.loads(path.read_text())["rows"]
    assert (done["status"], waiting["status"]) == ("timed", "left out")
    assert "the run ended" in waiting["reason"]
    table = re.sub(" +", " ", table_path.read_text())
    assert "| eager | bf16 |" in table
    assert "- eager: left out: the time was up, or the run ended" in table


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "cpu", "--models", "gpt3"], "models 'gpt3': must be of bigram, char"),
        (["--device", "cpu", "--models", "bigram"], "models 'bigram': it has no cache"),
        (["--device", "cpu", "--phases", "prefill"], "phases 'prefill': must be of first-token, decode, generate"),
        (["--device", "tpu"], "device 'tpu': must be one of cuda, cpu"),
        (["--device", "cpu", "--engine", "nonesuch"], "engine 'nonesuch': not known; known are eager"),
        (["--minutes", "0"], "minutes=0.0: must be more than 0"),
    ],
)
def test_a_users_mistake_is_one_line(python: Run, tmp_path: Path, arguments: list[str], says: str) -> None:
    done = python("bench.gpu", *arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {says}")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "docs").exists()


@pytest.mark.skipif(gpu_arch() is not None, reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(python: Run, tmp_path: Path) -> None:
    done = python("bench.gpu", "--models", "tiny")
    assert done.returncode == 2
    assert "error: no NVIDIA driver with a GPU on this machine" in done.stderr
    assert list(tmp_path.iterdir()) == []
