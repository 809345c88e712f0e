import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from gpt import version as version_module
from gpt.version import project_version, source_commit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A source tree with git's files on a branch that has no commit yet."""
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_branch_is_followed_to_its_commit(checkout: Path) -> None:
    assert source_commit(checkout) is None
    write(checkout / ".git/refs/heads/main", f"{COMMIT}\n")
    assert source_commit(checkout) == COMMIT


def test_a_packed_branch_is_found_by_its_whole_name(checkout: Path) -> None:
    other = COMMIT.replace("0", "f")
    lines = ["# pack-refs with: peeled", f"{other} refs/heads/main-old", f"{COMMIT} refs/heads/main", f"^{other}"]
    write(checkout / ".git/packed-refs", "\n".join(lines))
    assert source_commit(checkout) == COMMIT


def test_a_detached_head_is_the_commit_itself(checkout: Path) -> None:
    write(checkout / ".git/HEAD", f"{COMMIT}\n")
    assert source_commit(checkout) == COMMIT


def test_a_worktree_reads_the_branches_of_its_repository(checkout: Path, tmp_path: Path) -> None:
    own = checkout / ".git/worktrees/side"
    write(own / "HEAD", "ref: refs/heads/side\n")
    write(own / "commondir", "../..\n")
    write(checkout / ".git/refs/heads/side", COMMIT)
    write(tmp_path / "side/.git", f"gitdir: {own}\n")
    assert source_commit(tmp_path / "side") == COMMIT


@pytest.mark.parametrize("head", ["", "ref: refs/heads/none", "no commit", f"{COMMIT}0", "\udcff"])
def test_where_no_commit_can_be_read_there_is_none(checkout: Path, head: str) -> None:
    (checkout / ".git/HEAD").write_text(head, errors="surrogateescape")
    assert source_commit(checkout) is None
    assert source_commit(checkout / "installed") is None


@pytest.mark.skipif(shutil.which("git") is None, reason="no git to compare with")
def test_git_says_the_same_of_this_tree() -> None:
    done = subprocess.run(["git", "-C", version_module.SOURCE, "rev-parse", "HEAD"], capture_output=True, text=True)
    if done.returncode or not (version_module.SOURCE / ".git").exists():
        pytest.skip("this tree is no checkout")
    assert source_commit() == done.stdout.strip()


@pytest.mark.parametrize(
    ("commit", "name", "expected"),
    [
        (COMMIT, "gpt-frontend", f"{version('gpt-frontend')}+g0123456789ab"),
        (None, "gpt-frontend", version("gpt-frontend")),
        (COMMIT, "not-installed", "0+g0123456789ab"),
        (None, "not-installed", "0+unknown"),
    ],
)
def test_the_version_names_the_commit_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch, commit: str | None, name: str, expected: str
) -> None:
    monkeypatch.setattr(version_module, "source_commit", lambda: commit)
    monkeypatch.setattr(version_module, "PROJECT", name)
    assert project_version.__wrapped__() == expected
    assert re.fullmatch(r"[0-9.]+(\+[a-z0-9]+)?", expected)
