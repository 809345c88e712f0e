import errno
import hashlib
import os
import resource
from pathlib import Path

import pytest
import torch

from gpt.cli import UserError
from gpt.files import atomic_output, beside, check_not_an_input, check_output, find_input, other_kind, sha256_file


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


def test_a_failure_takes_the_folders_that_were_made_for_it_along(tmp_path):
    (tmp_path / "old").mkdir()
    with pytest.raises(RuntimeError):
        fail_half_way(tmp_path / "old" / "new" / "newer" / "out.txt", RuntimeError())
    check_output(tmp_path / "artifacts" / "out.txt")
    assert entries(tmp_path) == ["old"]
    assert entries(tmp_path / "old") == []


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


def test_an_input_that_is_only_in_artifacts_is_taken_from_there_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("artifacts").mkdir()
    Path("artifacts", "ckpt.pt").touch()
    assert find_input(Path("ckpt.pt")) == Path("artifacts/ckpt.pt")
    assert capsys.readouterr().err == "ckpt.pt is not here: artifacts/ckpt.pt is taken\n"
    Path("ckpt.pt").touch()
    assert find_input(Path("ckpt.pt")) == Path("ckpt.pt")
    for absent in (Path("none.pt"), tmp_path / "none.pt", Path("artifacts/none.pt")):
        assert find_input(absent) == absent
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("ckpt.pt", "artifacts/model.onnx"),
        ("./ckpt.pt", "artifacts/model.onnx"),
        ("artifacts/ckpt.pt", "artifacts/model.onnx"),
        ("runs/a/ckpt.pt", "runs/a/model.onnx"),
        ("/data/ckpt.pt", "/data/model.onnx"),
    ],
)
def test_what_is_made_of_a_file_here_goes_to_artifacts_and_of_another_beside_it(source, expected):
    assert beside(Path(source), "model.onnx") == Path(expected)


def test_a_file_of_another_kind_is_named_with_the_command_that_takes_it(tmp_path):
    checkpoint, onnx, compiled, huggingface = (tmp_path / name for name in ("a.onnx", "b.onnx", "compiled", "hf"))
    torch.save({"kind": "any"}, checkpoint)
    onnx.write_bytes(b"\x08\x0a")
    for folder, name in ((compiled, "model.json"), (huggingface, "config.json")):
        folder.mkdir()
        (folder / name).write_text("{}")
    assert other_kind(checkpoint, "ONNX file") == (
        f"a checkpoint; export it first with: python -m export.onnx {checkpoint}"
    )
    assert other_kind(checkpoint, "checkpoint") is None
    assert other_kind(onnx, "checkpoint") == f"an ONNX file; compile it with: python -m tvm_frontend.compile {onnx}"
    assert other_kind(onnx, "ONNX file") is None
    assert other_kind(compiled, "ONNX file") == "a compiled model; compare it with: python -m bench"
    assert other_kind(compiled, "compiled model") is None
    assert other_kind(huggingface, "checkpoint").endswith(f"python -m gpt.pretrained {huggingface}")
    (tmp_path / "text").write_text("PK or not")
    for unknown in (tmp_path, tmp_path / "text", tmp_path / "none"):
        assert other_kind(unknown, "checkpoint") is None


@pytest.mark.parametrize("directory", [False, True])
def test_an_output_that_is_a_link_is_written_through_to_its_target(tmp_path, directory):
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "out", tmp_path / "link"
    link.symlink_to(target)  # to nothing yet, and then to what the first round wrote
    for content in ("old", "new"):
        with atomic_output(link, directory=directory) as part:
            (part / "file" if directory else part).write_text(content)
        assert link.is_symlink()
        assert (target / "file" if directory else target).read_text() == content
    assert entries(tmp_path) == ["disk", "link"]
    assert entries(tmp_path / "disk") == ["out"]


@pytest.mark.parametrize("directory", [False, True])
def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch, directory):
    """The file, the folders in a folder and what they hold are flushed, then renamed, then the folder above is."""
    calls = []
    fsync, replace = os.fsync, os.replace
    name = lambda descriptor: Path(os.readlink(f"/proc/self/fd/{descriptor}")).name  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append(name(descriptor)), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("rename"), replace(old, new)))
    with atomic_output(tmp_path / "out", directory=directory) as part:
        if directory:
            (part / "inner").mkdir()
            (part / "inner" / "weights").write_text("all")
        else:
            part.write_text("all")
    before, after = calls[: calls.index("rename")], calls[calls.index("rename") + 1 :]
    assert set(before) == ({"out", "inner", "weights"} if directory else {"out"})
    assert before[-1] == "out"
    assert after == [tmp_path.name]


def test_an_output_is_none_of_the_inputs_by_any_name_or_link(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    source = tmp_path / "folder" / "in.pt"
    source.write_text("years of training")
    (tmp_path / "symbolic").symlink_to(source)
    os.link(source, tmp_path / "hard")
    for output in ("folder/in.pt", "folder/../folder/in.pt", "symbolic", "hard", "folder", "."):
        with pytest.raises(UserError, match=r"in\.pt is read from there; choose another place with -o"):
            check_not_an_input(output, source)
    with pytest.raises(UserError, match="is read from there"):
        check_output("folder/in.pt", "symbolic")
    check_not_an_input("folder/out.pt", source)
    check_not_an_input("none", source, "none.onnx")
    assert source.read_text() == "years of training"
