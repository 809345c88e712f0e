"""The kernels' cases as pytest runs and reports them."""

from pathlib import Path

import pytest

from bench.gpu.kernels import check_kernels

pytestmark = pytest.mark.slow

CASES = """
import pytest

@pytest.mark.parametrize("place", ["emulated", "on_gpu"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_product(record_property, place, size):
    assert place == "emulated"
    if size == 3:
        pytest.skip("no GPU")
    for error in (0.25, size / 2 if size < 2 else float("nan")):
        record_property("error_of_tolerance", error)
        assert error <= 1, "too large"
"""


def test_each_case_is_reported_with_its_largest_error(tmp_path: Path) -> None:
    (tmp_path / "test_cases.py").write_text(CASES)
    found = check_kernels("cpu", 60, tmp_path)
    assert found["reason"] is None
    assert [(case["name"].split("::")[1], case["status"], case["error_of_tolerance"]) for case in found["cases"]] == [
        ("test_product[1-emulated]", "agrees", 0.5),
        ("test_product[2-emulated]", "disagrees", None),
        ("test_product[3-emulated]", "not run", None),
    ]
    assert "too large" in found["cases"][1]["reason"]
    assert "no GPU" in found["cases"][2]["reason"]


def test_cases_that_are_not_there_or_do_not_end_have_a_reason(tmp_path: Path) -> None:
    assert "run it in a checkout" in check_kernels("cpu", 60, tmp_path / "nowhere")["reason"]
    (tmp_path / "test_none.py").write_text("")
    assert "pytest ended with 5" in check_kernels("cpu", 60, tmp_path)["reason"]
    assert check_kernels("cpu", 0.01, tmp_path)["reason"] == "not done within 0 s"
