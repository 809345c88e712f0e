"""The kernels' cases as they are run and reported."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.gpu import cases
from bench.gpu.cases import CASES, NO_GPU, GpuExecutor
from bench.gpu.kernels import check_kernels
from gpt.cli import UserError

pytestmark = pytest.mark.slow

Module = Callable[[str], str]
AGREE_AND_NOT = """
from bench.gpu.cases import Case

def wrong(executor):
    raise AssertionError("too large")

CASES = [
    Case("family::product", "1", lambda executor: 0.5),
    Case("family::product", "2", lambda executor: float("nan")),
    Case("family::product", "3", lambda executor: 1.5),
    Case("family::product", "4", lambda executor: None),
    Case("family::product", "5", wrong),
]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Module:
    """Write a module of cases that the processes find; its name."""

    def write(text: str) -> str:
        (tmp_path / "made_cases.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return "made_cases"

    return write


def test_each_case_is_reported_with_its_largest_error(module: Module) -> None:
    found = check_kernels("cpu", 60, module(AGREE_AND_NOT))
    assert found["reason"] is None
    assert [(case["name"], case["status"], case["error_of_tolerance"]) for case in found["cases"]] == [
        ("test_family::test_product[emulated-1]", "agrees", 0.5),
        ("test_family::test_product[emulated-2]", "disagrees", None),
        ("test_family::test_product[emulated-3]", "disagrees", 1.5),
        ("test_family::test_product[emulated-4]", "agrees", None),
        ("test_family::test_product[emulated-5]", "disagrees", None),
    ]
    assert "1.5 times the tolerance" in found["cases"][2]["reason"]
    assert "too large" in found["cases"][4]["reason"]


def test_without_a_gpu_no_case_is_run_on_one(module: Module) -> None:
    name = module("import bench.gpu.cases\n" + AGREE_AND_NOT)
    found = check_kernels("cuda", 60, name)
    assert len(found["cases"]) == 5
    if all(case["status"] == "not run" for case in found["cases"]):  # no GPU here
        assert {case["reason"] for case in found["cases"]} == {"no NVIDIA driver with a GPU on this machine"}


def test_without_a_gpu_nothing_is_compiled_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "gpu_arch", lambda: None)
    with pytest.raises(UserError, match=NO_GPU):
        GpuExecutor(tmp_path).build(None)


def test_cases_that_are_not_there_or_do_not_end_have_a_reason(module: Module) -> None:
    assert "No module named 'nowhere'" in check_kernels("cpu", 60, "nowhere")["reason"]
    assert check_kernels("cpu", 60, module("CASES = []")) == {"cases": [], "reason": "made_cases has no cases"}
    ended = check_kernels("cpu", 60, module("import os\nos.abort()"))
    assert ended["reason"].startswith("the cases ended with -6")
    assert check_kernels("cpu", 0.01, module(AGREE_AND_NOT))["reason"] == "not done within 0 s"


def test_every_case_has_a_name_of_its_own() -> None:
    names = [case.name_on("cuda") for case in CASES]
    assert len(set(names)) == len(names) > 80
    assert "test_linear::test_any_number_of_rows[on_gpu-17-bf16]" in names
