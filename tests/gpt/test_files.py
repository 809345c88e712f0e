import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from gpt import files
from gpt.cli import UserError
from gpt.files import (
    atomic_output,
    atomic_outputs,
    beside,
    check_not_an_input,
    check_output,
    cut_half_line,
    find_input,
    hold_output,
    other_kind,
    sha256_file,
)

ROOT = Path(__file__).parents[2]


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


@pytest.fixture(params=[True, False], ids=["exchange", "in turn"])
def exchange(request, monkeypatch):
    """Whether the file system lets two folders change names at one instant."""
    if not request.param:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    return request.param


def test_a_folder_is_replaced_also_where_two_cannot_change_names(tmp_path, exchange):
    for content in ("old", "new"):
        with atomic_output(tmp_path / "out", directory=True) as part:
            (part / content).touch()
    assert entries(tmp_path / "out") == ["new"]
    assert entries(tmp_path) == ["out"]


def test_two_folders_change_names(tmp_path):
    """Where this machine's file system cannot, the test above says that it does not matter."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not files._exchange(tmp_path / "first", tmp_path / "second"):
        pytest.skip("the file system cannot exchange two names")
    assert entries(tmp_path / "first") == ["second"]
    with pytest.raises(OSError, match="No such file"):
        files._exchange(tmp_path / "first", tmp_path / "none")


@pytest.fixture
def failing(monkeypatch):
    """Let the n-th rename of new output fail, counted from 0, or be the moment of a kill, which no handler sees."""

    def fail(number: int, error: BaseException) -> None:
        replace, seen = os.replace, []

        def one_fails(source: Path, target: Path) -> None:
            if Path(source).parent.name == "new":
                seen.append(source)
                if len(seen) == number + 1:
                    raise error
            replace(source, target)

        monkeypatch.setattr(os, "replace", one_fails)

    return fail


def test_a_failed_rename_puts_the_old_directory_back(tmp_path, monkeypatch, failing):
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    failing(0, OSError(errno.EIO, os.strerror(errno.EIO)))
    with pytest.raises(UserError, match="Input/output error"), atomic_output(tmp_path / "out", directory=True):
        pass
    assert entries(tmp_path / "out") == ["old"]
    assert entries(tmp_path) == ["out"]


NAMES = ("a.json", "b.md", "c.html")


def write_three(folder: Path, content: str) -> None:
    with atomic_outputs([folder / name for name in NAMES]) as parts:
        for part in parts:
            part.write_text(content)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_several_files_are_replaced_together(tmp_path):
    for content in ("old", "new"):
        write_three(tmp_path, content)
        assert contents(tmp_path) == dict.fromkeys(NAMES, content)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("before", [{}, {"b.md": "old"}, dict.fromkeys(NAMES, "old")], ids=["none", "one", "all"])
def test_several_files_stay_as_they_were_if_one_of_them_fails(tmp_path, failing, number, before):
    for name, content in before.items():
        (tmp_path / name).write_text(content)
    failing(number, OSError(errno.EIO, os.strerror(errno.EIO)))
    with pytest.raises(UserError, match=r"cannot write .*a\.json: Input/output error"):
        write_three(tmp_path, "new")
    assert contents(tmp_path) == before


def killed_at(number: int, work: Callable[[], None]) -> None:
    """Do work in a process that is killed at its n-th rename, counted from 0, of whichever kind."""
    child = os.fork()
    if child == 0:
        left = [number]

        def counted(rename: Callable) -> Callable:
            def one(source: Path, target: Path) -> None:
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                rename(source, target)

            return one

        os.replace, os.rename = counted(os.replace), counted(os.rename)
        try:
            work()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("number", range(6))  # three of the old ones, three of the new ones
def test_of_several_files_a_new_one_is_never_beside_an_old_one_and_the_next_run_completes_them(tmp_path, number):
    write_three(tmp_path, "old")
    killed_at(number, lambda: write_three(tmp_path, "new"))
    seen = {(tmp_path / name).read_text() for name in NAMES if (tmp_path / name).exists()}
    assert len(seen) <= 1
    with hold_output(tmp_path / NAMES[0]):
        pass
    assert contents(tmp_path) == dict.fromkeys(NAMES, "new")


@pytest.mark.parametrize("number", range(2))
def test_a_folder_killed_between_its_two_names_is_completed(tmp_path, monkeypatch, number):
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()

    def write() -> None:
        with atomic_output(tmp_path / "out", directory=True) as part:
            (part / "new").touch()

    killed_at(number, write)
    with hold_output(tmp_path / "out"):
        assert entries(tmp_path / "out") == ["new"]
    assert entries(tmp_path) == ["out"]


def test_what_killed_processes_left_is_removed_by_the_next_and_nothing_else(tmp_path):
    (tmp_path / "out").mkdir()
    mine = [".out.abcdefg1.part", "out/.manifest.json.abcdefg1.part"]
    others = [".out.txt.abcdefg1.part", ".out.settings", ".out.abcdefg1", ".output.abcdefg1.part", ".out.a.part"]
    for name in (*mine, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    (tmp_path / ".out.lock").write_text("process 1 on a machine that lost its power")
    with hold_output(tmp_path / "out"):
        assert entries(tmp_path) == sorted([".out.lock", "out", *others])
    assert entries(tmp_path) == sorted(["out", *others])
    assert entries(tmp_path / "out") == []


def test_a_second_process_is_told_who_writes_an_output_and_two_outputs_do_not_meet(tmp_path):
    holder = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from gpt.files import hold_output
        with hold_output(Path(sys.argv[1])):
            print("held", flush=True)
            sys.stdin.read()
        """
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    (tmp_path / "link").symlink_to(tmp_path / "ckpt.pt")
    with subprocess.Popen([sys.executable, "-c", holder, tmp_path / "ckpt.pt"], **pipes) as process:
        assert process.stdout.readline() == "held\n"
        said = rf"ckpt.pt: process {process.pid} on .*python.* -c .*; since 20.*\) is writing it; wait for its end"
        for path in (tmp_path / "ckpt.pt", tmp_path / "none" / ".." / "ckpt.pt"):
            with pytest.raises(UserError, match=said), atomic_output(path):
                pytest.fail("it was not held")
        with pytest.raises(UserError, match="link: process"):
            check_output(tmp_path / "link")
        for other in (tmp_path / "ckpt", tmp_path / "ckpt.pt2", tmp_path / "ckpt.pt" / ".." / "other.pt"):
            with atomic_output(other) as part:
                part.touch()
        process.kill()
    check_output(tmp_path / "ckpt.pt")  # the lock died with its process
    assert entries(tmp_path) == ["ckpt", "ckpt.pt2", "link", "other.pt"]


def test_of_many_processes_only_one_at_a_time_holds_an_output(tmp_path):
    """Each adds to a number when it gets hold of it; no addition is lost, whoever removes the lock's file."""
    number, processes, times = tmp_path / "number", 4, 25
    number.write_text("0")
    children = []
    for _ in range(processes):
        child = os.fork()
        if child == 0:
            done = 0
            while done < times:
                with suppress(UserError), hold_output(number):
                    number.write_text(str(int(number.read_text()) + 1))
                    done += 1
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * processes
    assert int(number.read_text()) == processes * times
    assert entries(tmp_path) == ["number"]


def test_what_is_in_a_folder_that_is_held_can_be_written_by_its_holder(tmp_path):
    with hold_output(tmp_path / "corpus"), hold_output(tmp_path / "corpus"):
        with atomic_output(tmp_path / "corpus" / "manifest.json") as part:
            part.touch()
        assert entries(tmp_path / "corpus") == ["manifest.json"]
        assert entries(tmp_path) == [".corpus.lock", "corpus"]
    assert entries(tmp_path) == ["corpus"]


def test_an_interrupt_that_a_library_swallows_is_heeded_before_the_output_gets_its_name(tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it

    def swallow() -> None:
        with atomic_output(tmp_path / "out") as part:
            part.touch()
            with suppress(BaseException):
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        swallow()
    assert entries(tmp_path) == []


@pytest.mark.parametrize("words", ["ld: final link failed: No space left on device", "I/O error: Input/output error"])
def test_a_full_disk_that_a_library_tells_in_its_own_words_is_a_users_error(tmp_path, words):
    with pytest.raises(UserError, match=r"cannot write .*out: (No space left on device|Input/output error); free some"):
        fail_half_way(tmp_path / "out", RuntimeError(words), directory=True)
    assert entries(tmp_path) == []


def test_half_a_line_at_the_end_is_cut(tmp_path):
    path = tmp_path / "records.json"
    for text, kept in (("one\ntwo\nthr", "one\ntwo\n"), ("one\n", "one\n"), ("on", ""), ("", "")):
        path.write_text(text)
        cut_half_line(path)
        assert path.read_text() == kept
    cut_half_line(tmp_path / "none")


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
    assert other_kind(huggingface, "checkpoint").endswith(f"python -m export.onnx {huggingface}")
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


def test_a_place_that_cannot_even_be_looked_at_is_a_users_error(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for place in (tmp_path / "loop" / "out", tmp_path / ("x" * 300), Path("/dev/null/x/out")):
        with pytest.raises(UserError, match="cannot write"), atomic_output(place) as part:
            part.touch()


def test_a_folder_in_a_files_place_stays_and_the_other_way_round(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").touch()
    (tmp_path / "file").write_text("years of work")
    with pytest.raises(UserError, match="it is a directory; name a file"), atomic_output(tmp_path / "folder"):
        pytest.fail("nothing may be done before")
    with (
        pytest.raises(UserError, match="it is a file; name a folder"),
        atomic_output(tmp_path / "file", directory=True),
    ):
        pytest.fail("nothing may be done before")
    assert entries(tmp_path) == ["file", "folder"]
