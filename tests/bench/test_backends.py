"""The registry: which engines there are, and what an absent package does."""

import importlib.util
from pathlib import Path

import pytest

import bench.backends
from bench.backends import engine_names, find_contenders
from gpt.cli import UserError


@pytest.fixture
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which the package openvino is not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(bench.backends, "find_spec", lambda name: None if name == "openvino" else real(name))


def test_the_folder_is_the_registry() -> None:
    files = {path.stem for path in Path(bench.backends.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(engine_names()) == files
    assert {contender.engine for contender in find_contenders()} == files


def test_each_variant_is_a_contender_of_its_own() -> None:
    assert [contender.label for contender in find_contenders(["tvm"])] == ["tvm O0", "tvm O3"]


def test_an_unknown_engine_names_the_known() -> None:
    with pytest.raises(UserError, match=r"'nonesuch'.*eager.*tvm"):
        find_contenders(["nonesuch"])


@pytest.mark.usefixtures("without_openvino")
def test_an_absent_engine_is_found_with_its_reason() -> None:
    reasons = {contender.engine: contender.reason_missing for contender in find_contenders()}
    assert reasons["openvino"] == "not installed: pip install openvino"
    assert reasons["eager"] is None


@pytest.mark.usefixtures("without_openvino")
def test_an_absent_engine_asked_for_is_an_error() -> None:
    with pytest.raises(UserError, match="'openvino' was asked for and is not installed"):
        find_contenders(["eager", "openvino"])


def test_an_engines_file_can_be_read_without_its_package() -> None:
    for path in Path(bench.backends.__file__).parent.glob("*.py"):
        top = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert not [line for line in top if line.split()[1] in ("torch", "onnxruntime", "openvino", "tvm")], path
