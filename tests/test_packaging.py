"""What pip installs: dependencies by use, and what a wheel holds."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PACKAGES = ("gpt", "export", "tvm_frontend", "bench")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def is_test(path: Path) -> bool:
    """Whether a Python file of a package is pytest's."""
    return path.name == "conftest.py" or path.name.startswith("test_")


def imports_on_loading(nodes: list[ast.stmt]) -> Iterator[str]:
    """The top-level names that a module imports when it is imported itself: not those inside functions."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.ClassDef | ast.With):
            yield from imports_on_loading(node.body)
        elif isinstance(node, ast.Try):
            yield from imports_on_loading([*node.body, *node.orelse, *node.finalbody])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from imports_on_loading([*node.body, *node.orelse])


@pytest.mark.parametrize(
    "line", [*PROJECT["dependencies"], *dict.fromkeys(line for e in EXTRAS.values() for line in e)]
)
def test_each_dependency_has_a_lower_bound_that_the_pinned_version_meets(line: str) -> None:
    requirement = Requirement(line)
    assert any(specifier.operator == ">=" for specifier in requirement.specifier)
    pinned = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pinned)
    [least] = [Version(each.version) for each in requirement.specifier if each.operator == ">="]
    assert least.release[:2] == pinned.release[:2], f"the tests run with {pinned}, not with {least}"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_module_imports_only_packages_of_the_base_install_on_loading(package: str) -> None:
    base = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    distributions = packages_distributions()
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        if not is_test(path)
        for name in imports_on_loading(ast.parse(path.read_text(encoding="utf-8")).body)
        if name not in sys.stdlib_module_names and name not in PACKAGES
        if not base & {canonicalize_name(each) for each in distributions.get(name, ())}
    ]
    assert wrong == []


def test_make_installs_every_extra() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    installed = text.partition('-e ".[')[2].partition("]")[0].split(",")
    assert sorted(installed) == sorted(EXTRAS)


@pytest.mark.slow
def test_a_wheel_holds_the_packages_with_their_data_and_no_tests(tmp_path: Path) -> None:
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path / "source")
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."]
    subprocess.run(wheel, cwd=tmp_path / "source", check=True)
    [path] = tmp_path.glob("*.whl")
    found = {name for name in zipfile.ZipFile(path).namelist() if ".dist-info/" not in name}
    files = {
        path.relative_to(ROOT)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc" and not is_test(path)
    }
    assert found == set(map(str, files))
    assert {f"{package}/py.typed" for package in PACKAGES} <= found
