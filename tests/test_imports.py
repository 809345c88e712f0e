"""Who may import whom, read from the source of the whole tree."""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("gpt", "export", "tvm_frontend", "bench")
# Prefixes of our own modules that a package may import besides itself.
ALLOWED = {
    "gpt": (),
    "export": ("gpt",),
    "tvm_frontend": (
        "export.artifact",
        "export.foreign",
        "export.graph",
        "export.interface",
        "export.signature",
        "export.storage",
        "gpt.cli",
        "gpt.files",
        "gpt.config",
        "gpt.hardware",
        "gpt.progress",
        "gpt.tokenizer",
        "gpt.version",
    ),
    "bench": OURS,
}
# What runs in Relay's environment, where nothing of ours is known.
RELAY_WORKER = ROOT / "tvm_frontend/relay/worker.py"
# The one file of tvm_frontend that reads what torch.export traced.
TORCH_FRONTEND = ROOT / "tvm_frontend/frontends/torch.py"
TORCH_FREE = (
    "gpt/cli.py",
    "gpt/files.py",
    "gpt/config.py",
    "gpt/costs.py",
    "gpt/hardware.py",
    "gpt/progress.py",
    "gpt/tokenizer.py",
    "gpt/version.py",
    "export/artifact.py",
    "export/foreign.py",
    "export/graph.py",
    "export/interface.py",
    "export/signature.py",
    "export/storage.py",
    "bench/models/artifacts.py",
    "bench/harness/worker.py",
)


def imports_of(path: Path) -> Iterator[str]:
    """The full name of every module that a file imports, anywhere in it; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the module's whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a module is one of the prefixes or below one."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def sources_of(package: str) -> list[Path]:
    """A package's Python files."""
    return sorted((ROOT / package).rglob("*.py"))


def sources_without_torch() -> list[Path]:
    """Of tvm_frontend, all but the one."""
    return [path for path in sources_of("tvm_frontend") if path != TORCH_FRONTEND]


def modules_of(root: Path, packages: tuple[str, ...]) -> dict[str, Path]:
    """The files of some packages in a folder, by the full name of each file's module."""
    files = [path for package in packages for path in sorted((root / package).rglob("*.py"))]
    names = [".".join(path.relative_to(root).with_suffix("").parts) for path in files]
    return dict(zip((name.removesuffix(".__init__") for name in names), files, strict=True))


def circle_among(modules: Mapping[str, Path]) -> list[str]:
    """The modules of one circle of imports, the first one again at the end; an empty list if there is none.

    An import counts wherever it stands in a file, as each is one more file that has to be known to read this one. What
    Python does by itself, to run the __init__.py of the folders above a module, does not.
    """
    imported = {name: set(imports_of(path)) for name, path in modules.items()}
    known = {
        name: {each if each in modules else each.rpartition(".")[0] for each in found} & modules.keys()
        for name, found in imported.items()
    }
    try:
        TopologicalSorter(known).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("package", OURS)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    files = sources_of(package)
    assert files
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imports_of(path)
        if is_within(name, OURS) and not is_within(name, (package, *ALLOWED[package]))
        if path != TORCH_FRONTEND or not is_within(name, ("gpt.checkpoint",))
    ]
    assert wrong == []


@pytest.mark.parametrize("path", [*sources_without_torch(), *(ROOT / name for name in TORCH_FREE)], ids=str)
def test_no_torch_where_there_must_be_none(path: Path) -> None:
    assert [name for name in imports_of(path) if is_within(name, ("torch",))] == []


def test_what_runs_in_relays_environment_imports_nothing_of_ours() -> None:
    found = list(imports_of(RELAY_WORKER))
    assert "tvm" in found
    assert [name for name in found if is_within(name, OURS)] == []


def test_the_rule_sees_imports_inside_functions(tmp_path: Path) -> None:
    path = tmp_path / "late.py"
    path.write_text("def f():\n    import torch.nn\n    from bench.harness.measure import Ratio\n")
    assert list(imports_of(path)) == ["torch.nn", "bench.harness.measure.Ratio"]


def test_no_files_import_each_other_in_a_circle() -> None:
    modules = modules_of(ROOT, OURS)
    assert {"gpt", "bench.backends", "tvm_frontend.frontends.onnx.importer"} <= modules.keys()
    assert circle_among(modules) == []


@pytest.mark.parametrize(
    "back",
    [
        "from pair.first import First",
        "import pair.first",
        "from pair import first",
        "def f():\n    from pair.first import First",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pair.first import First",
    ],
    ids=["from", "module", "from the package", "inside a function", "for types alone"],
)
def test_the_rule_sees_a_circle_of_two_files(tmp_path: Path, back: str) -> None:
    folder = tmp_path / "pair"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "first.py").write_text("from pair.second import Second\n\nFirst = Second\n")
    (folder / "second.py").write_text("import json\n\nSecond = json\n")
    modules = modules_of(tmp_path, ("pair",))
    assert modules.keys() == {"pair", "pair.first", "pair.second"}
    assert circle_among(modules) == []
    (folder / "second.py").write_text(f"{back}\n")
    assert set(circle_among(modules)) == {"pair.first", "pair.second"}


def test_the_rule_sees_a_circle_through_a_third_file_and_a_package(tmp_path: Path) -> None:
    (tmp_path / "ring").mkdir()
    for name, text in {
        "__init__": "from ring.a import x",
        "a": "from ring.b import x",
        "b": "from ring import x",
    }.items():
        (tmp_path / "ring" / f"{name}.py").write_text(text)
    assert set(circle_among(modules_of(tmp_path, ("ring",)))) == {"ring", "ring.a", "ring.b"}
