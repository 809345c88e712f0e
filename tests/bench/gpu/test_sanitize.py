"""The kernels' cases under a program with compute-sanitizer's options and exit codes, which needs no GPU."""

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.gpu import sanitize
from gpt.cli import UserError

pytestmark = pytest.mark.slow

CASES = """
from bench.gpu.cases import Case, Executor
import bench.gpu.cases as cases

class Bare(Executor):
    build = None

cases.gpu_arch = lambda: "sm_86"
cases.EXECUTORS["cuda"] = Bare
CASES = [Case("family::product", "1", lambda executor: 0.5 if isinstance(executor, Bare) else 2.0)]
"""
# --tool NAME --target-processes all --error-exitcode CODE COMMAND ...
SANITIZER = """#!/bin/sh
tool=$2; code=$6; shift 6
"$@" || exit
[ $tool = initcheck ] && sleep 60
echo "========= COMPUTE-SANITIZER"
[ $tool = racecheck ] && { echo "========= RACECHECK SUMMARY: 1 hazard displayed"; exit $code; }
echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.fixture
def cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of one case, which pretends that there is a GPU."""
    (tmp_path / "made_cases.py").write_text(CASES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "made_cases"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(SANITIZER)
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))


@pytest.mark.usefixtures("installed")
def test_what_a_tool_finds_and_what_it_does_not(cases: str) -> None:
    clean = sanitize.sanitize("memcheck", 60, cases)
    assert (clean.status, clean.said) == ("clean", "COMPUTE-SANITIZER | ERROR SUMMARY: 0 errors")
    found = sanitize.sanitize("racecheck", 60, cases)
    assert (found.status, found.said) == ("errors", "COMPUTE-SANITIZER | RACECHECK SUMMARY: 1 hazard displayed")


@pytest.mark.usefixtures("installed")
def test_cases_that_fail_or_do_not_end_are_no_finding(cases: str, tmp_path: Path) -> None:
    late = sanitize.sanitize("initcheck", 0.5, cases)
    assert (late.status, late.said) == ("not run", "not done within 0 s")
    (tmp_path / "made_cases.py").write_text(CASES.replace("0.5 if", "2.0 if"))
    failed = sanitize.sanitize("memcheck", 60, cases)
    assert failed.status == "not run"
    assert "1 failed" in failed.said


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict]]:
    """The command, where there is a GPU; the results that it writes."""
    monkeypatch.setattr(sanitize, "gpu_arch", lambda: "sm_86")

    def run_command(tool: str, statuses: dict[str, str]) -> list[dict]:
        monkeypatch.setattr(
            sanitize, "sanitize", lambda tool, deadline_s: sanitize.Finding(tool, statuses[tool], "said", 1.5)
        )
        sanitize.sanitize_command((tool,) if tool else (), output=tmp_path / "out")
        return json.loads((tmp_path / "out" / "sanitizer.json").read_text())

    return run_command


@pytest.mark.usefixtures("installed")
def test_the_command_writes_what_each_tool_found(run: Callable[..., list[dict]], tmp_path: Path) -> None:
    tools = ("memcheck", "racecheck", "initcheck", "synccheck")
    assert [each["tool"] for each in run("", dict.fromkeys(tools, "clean"))] == list(tools)
    assert "- synccheck: clean: said (2 s)" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(SystemExit, match="1"):
        run("racecheck", {"racecheck": "errors"})
    assert "- racecheck: errors: said (2 s)" in (tmp_path / "out" / "README.md").read_text()


def test_without_the_program_or_a_gpu_nothing_is_written(
    run: Callable[..., list[dict]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tvm_frontend.cuda_toolchain._program_candidates", lambda name: [])
    with pytest.raises(UserError, match=r"compute-sanitizer was not found.*install NVIDIA's CUDA toolkit"):
        run("memcheck", {"memcheck": "clean"})
    monkeypatch.setattr(sanitize, "gpu_arch", lambda: None)
    with pytest.raises(UserError, match="no NVIDIA driver with a GPU"):
        run("memcheck", {"memcheck": "clean"})
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("installed")
def test_ctrl_c_ends_the_tool_and_what_it_runs(cases: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def interrupted(process: subprocess.Popen, timeout: float) -> None:
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sanitize.sanitize("initcheck", 60, cases)
    assert [process.returncode for process in started] == [-signal.SIGKILL]
