import errno
import hashlib
import os
import resource
from pathlib import Path

import pytest

from gpt.cli import UserError
from gpt.files import atomic_output, check_output, sha256_file


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_nothing_else_left(tmp_path):
    with atomic_output(tmp_path / "new" / "out.txt") as part:
        part.write_text("whole")
    assert (tmp_path / "new" / "out.txt").read_text() == "whole"
    assert entries(tmp_path / "new") == ["out.txt"]


def fail_half_way(path: Path, error: BaseException, directory: bool = False) -> None:
    with atomic_output(path, directory=directory) as part:
        (part / "half" if directory else part).write_text("half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        fail_half_way(tmp_path / "out.txt", error())
    assert entries(tmp_path) == []


def test_a_failure_keeps_the_old_file(tmp_path):
    (tmp_path / "out.txt").write_text("old")
    with pytest.raises(RuntimeError):
        fail_half_way(tmp_path / "out.txt", RuntimeError())
    assert (tmp_path / "out.txt").read_text() == "old"
    assert entries(tmp_path) == ["out.txt"]


def test_a_directory_replaces_the_old_one(tmp_path):
    for content in ("old", "new"):
        with atomic_output(tmp_path / "out", directory=True) as part:
            (part / content).touch()
    assert entries(tmp_path / "out") == ["new"]
    assert entries(tmp_path) == ["out"]


def test_a_failure_keeps_the_old_directory(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(RuntimeError):
        fail_half_way(tmp_path / "out", RuntimeError(), directory=True)
    assert entries(tmp_path / "out") == ["old"]
    assert entries(tmp_path) == ["out"]


def test_a_failed_rename_puts_the_old_directory_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()

    def no_replace(source: Path, target: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", no_replace)
    with pytest.raises(UserError, match="Input/output error"), atomic_output(tmp_path / "out", directory=True):
        pass
    assert entries(tmp_path / "out") == ["old"]


def test_a_full_disk_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*out.txt: No space left"):
        fail_half_way(tmp_path / "out.txt", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert entries(tmp_path) == []


def test_a_file_over_the_limit_of_its_system_is_a_users_error(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match="File too large"), atomic_output(tmp_path / "out.txt") as part:
            part.write_bytes(bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert entries(tmp_path) == []


def test_a_parent_that_is_a_file_is_a_users_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"), atomic_output(tmp_path / "file" / "out.txt"):
        pass


def test_another_files_trouble_stays_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_output(tmp_path / "out" / "out.txt"):
        (tmp_path / "elsewhere").read_text()
    with pytest.raises(BrokenPipeError):
        fail_half_way(tmp_path / "out" / "out.txt", BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)))


def test_check_output_leaves_no_trace(tmp_path):
    (tmp_path / "old.txt").write_text("old")
    check_output(tmp_path / "old.txt")
    check_output(tmp_path / "new.txt")
    assert entries(tmp_path) == ["old.txt"]
    assert (tmp_path / "old.txt").read_text() == "old"


def test_check_output_finds_a_bad_place(tmp_path):
    with pytest.raises(UserError, match="it is a directory"):
        check_output(tmp_path)
    with pytest.raises(UserError, match="cannot write"):
        check_output("/dev/null/out.txt")


def test_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_file(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()
