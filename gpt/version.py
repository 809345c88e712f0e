"""The version of this project and the commit of its source, for every artifact and result. Standard library only."""

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROJECT = "gpt-frontend"
SOURCE = Path(__file__).resolve().parents[1]


@cache
def project_version() -> str:
    """Give the version and, if the source is a git checkout, its commit: `0.1.0+g1a2b3c4d5e6f`, as PEP 440 spells it.

    The version is `0+unknown` where the project is not installed. Changes that are not committed do not show.
    """
    try:
        number = version(PROJECT)
    except PackageNotFoundError:
        number = "0"
    commit = source_commit()
    if commit is not None:
        return f"{number}+g{commit[:12]}"
    return number if number != "0" else "0+unknown"


def source_commit(source: Path = SOURCE) -> str | None:
    """Read the commit that a source tree is checked out at, 40 hexadecimal digits (64 in a repository of SHA-256).

    Reads git's own files, so that the program need not be there. None if the tree itself is no checkout, as in an
    installed package, or if there is no commit to be read.
    """
    try:
        folder = _git_folder(source)
        head = (folder / "HEAD").read_text(encoding="utf-8").strip()
        found = _resolve(folder, head.removeprefix("ref:").strip()) if head.startswith("ref:") else head
    except (OSError, UnicodeDecodeError):
        return None
    return found if found and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", found) else None


def _git_folder(source: Path) -> Path:
    """The folder `.git`, or the one that the file `.git` of a worktree or submodule names."""
    path = source / ".git"
    if path.is_dir():
        return path
    return source / path.read_text(encoding="utf-8").strip().removeprefix("gitdir:").strip()


def _resolve(folder: Path, reference: str) -> str | None:
    """The commit that a reference as `refs/heads/main` names, in a file of its own or packed with others."""
    common = folder
    if (folder / "commondir").is_file():  # of a worktree, whose branches are in the repository that it belongs to
        common = folder / (folder / "commondir").read_text(encoding="utf-8").strip()
    for root in (folder, common):
        if (root / reference).is_file():
            return (root / reference).read_text(encoding="utf-8").strip()
    for line in (common / "packed-refs").read_text(encoding="utf-8").splitlines():
        commit, _, name = line.partition(" ")
        if name == reference:
            return commit
    return None
