"""README's map of files: every file stands in it or in a folder that does, and nothing else stands in it."""

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("gpt", "export", "tvm_frontend", "bench")


def map_of(text: str) -> list[str]:
    """The paths that the map names, a line each below the folder that it is indented under; folders end with `/`."""
    section = re.search(r"^## What is where\n\n((?:    .*\n)+)", text, re.MULTILINE)[1]
    paths: list[str] = []
    folders: list[str] = []
    for line in section.splitlines():
        name = line.split()[0]
        depth, odd = divmod(len(line) - len(line.lstrip()) - 4, 2)
        assert not odd, f"{name}: not indented by twos"
        assert depth <= len(folders), f"{name}: indented under no folder"
        del folders[depth:]
        paths.append("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    return paths


def ignored(path: PurePosixPath, patterns: list[str]) -> bool:
    """Whether .gitignore's patterns, each a name anywhere in the tree, leave a file out."""
    return any(fnmatch(part, pattern.rstrip("/")) for part in path.parts for pattern in patterns)


def files_of(root: Path) -> Iterator[PurePosixPath]:
    """Every file of a checkout or a source archive that .gitignore does not leave out, found without git."""
    lines = (root / ".gitignore").read_text(encoding="utf-8").splitlines()
    patterns = [".git", *(line for line in lines if line and not line.startswith("#"))]
    for folder, folders, names in os.walk(root):
        here = PurePosixPath(Path(folder).relative_to(root).as_posix())
        folders[:] = [name for name in folders if not ignored(PurePosixPath(name), patterns)]
        yield from (here / name for name in names if not ignored(PurePosixPath(name), patterns))


def uncharted(files: list[PurePosixPath], paths: list[str]) -> list[str]:
    """The files that neither stand in the map nor in a folder that does."""
    known = set(paths)
    return [
        str(file)
        for file in files
        if str(file) not in known and not any(f"{folder}/" in known for folder in file.parents)
    ]


@pytest.fixture(scope="module")
def paths() -> list[str]:
    return map_of((ROOT / "README.md").read_text(encoding="utf-8"))


def test_every_file_stands_in_the_map_or_in_a_folder_that_does(paths: list[str]) -> None:
    assert uncharted(sorted(files_of(ROOT)), paths) == []


def test_nothing_stands_in_the_map_that_is_not_there(paths: list[str]) -> None:
    assert len(set(paths)) == len(paths)
    is_there = {True: Path.is_dir, False: Path.is_file}
    assert [path for path in paths if not is_there[path.endswith("/")](ROOT / path)] == []


def test_every_folder_of_the_packages_stands_in_the_map(paths: list[str]) -> None:
    folders = {f"{file.parent}/" for file in files_of(ROOT) if file.parts[0] in PACKAGES}
    assert folders - set(paths) == set()


def test_the_map_is_read_by_its_indentation() -> None:
    text = "## What is where\n\n    a/     folder\n      b/   in it\n        c.py  x.py in words\n    d.py\n\nEnd\n"
    assert map_of(text) == ["a/", "a/b/", "a/b/c.py", "d.py"]
    with pytest.raises(AssertionError, match=r"c.py: indented under no folder"):
        map_of("## What is where\n\n    a.py\n      c.py\n")


def test_what_is_missing_is_found_and_what_is_ignored_is_not(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("# generated\n*.egg-info/\n.venv\n")
    for name in ("a/b.py", "c/d.py", "c/e.py", ".venv/x.py", "y.egg-info/z", ".git/config", "f.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert uncharted(sorted(files_of(tmp_path)), ["a/", "c/e.py", ".gitignore"]) == ["c/d.py", "f.py"]
