"""How a command ends: after a mistake, a signal at any moment, and where its output goes nowhere."""

import ast
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from gpt.cli import THREAD_VARIABLES, UserError, check_threads, defer_interrupt, heed_interrupt, run_command
from gpt.commands import COMMANDS, source_of

ROOT = Path(__file__).parents[2]
INTERRUPTED = "interrupted: nothing half-written was left behind\n"
TERMINATED = "ended by SIGTERM: nothing half-written was left behind\n"


def outcome(error: BaseException) -> int:
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as exit_:
        run_command(command)
    return exit_.value.code


def test_success_returns(capsys):
    run_command(lambda: print("done"))
    assert capsys.readouterr().out == "done\n"


def test_a_users_mistake_is_one_line_and_exit_2(capsys):
    assert outcome(UserError("x=3: must be 4")) == 2
    assert capsys.readouterr().err == "error: x=3: must be 4\n"


def test_interrupt_is_exit_130(capsys):
    assert outcome(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == INTERRUPTED
    assert outcome(KeyboardInterrupt("step 3 is saved")) == 130
    assert capsys.readouterr().err == "interrupted: step 3 is saved\n"


@pytest.fixture
def default_signals():
    """Signals as a shell's job in the foreground has them; one in the background ignores Ctrl-C."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "ended by SIGTERM"), (signal.SIGHUP, "ended by SIGHUP")],
)
def test_each_signal_that_ends_a_process_runs_what_cleans_up(default_signals, capsys, number, words):
    cleaned = []

    def command() -> None:
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(signal.SIGTERM)  # again, while the first is heeded, as torchrun does
            cleaned.append(True)

    with pytest.raises(SystemExit) as exit_:
        run_command(command)
    assert (exit_.value.code, cleaned) == (128 + number, [True])
    assert capsys.readouterr().err == f"{words}: nothing half-written was left behind\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_library_that_turns_a_signal_into_its_own_error_does_not_hide_it(default_signals, capsys):
    def command() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise RuntimeError("a callback failed") from error

    with pytest.raises(SystemExit) as exit_:
        run_command(command)
    assert exit_.value.code == 143
    assert capsys.readouterr().err == TERMINATED


def test_a_signal_that_is_ignored_stays_so(default_signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    run_command(lambda: signal.raise_signal(signal.SIGHUP))


@pytest.mark.parametrize("within", [lambda work: work(), run_command])
def test_an_interrupt_that_a_library_swallows_is_heeded(default_signals, within):
    def swallow() -> None:
        with heed_interrupt(), suppress(BaseException):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises((KeyboardInterrupt, SystemExit)) as ended:
        within(swallow)
    assert ended.type is KeyboardInterrupt or ended.value.code == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_work_that_ends_itself_is_told_of_a_signal_and_a_second_ctrl_c_ends_it_at_once(default_signals, capsys):
    said = []

    def command() -> None:
        with defer_interrupt() as interrupted:
            said.append(interrupted())
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            with heed_interrupt():
                said.append(interrupted())
            signal.raise_signal(signal.SIGINT)
        said.append("not reached")

    with pytest.raises(SystemExit) as exit_:
        run_command(command)
    assert (exit_.value.code, said) == (143, [False, True])
    assert capsys.readouterr().err == TERMINATED


def test_a_fault_of_the_project_keeps_its_traceback_also_where_a_library_hides_it(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", lambda *_: None)
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)
    assert sys.excepthook is sys.__excepthook__


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/x"), "No space left on device: /tmp/x"),
        (RuntimeError("writing /tmp/ccXYZ.s failed: No space left on device\nmore"), "No space left on device"),
    ],
)
def test_a_full_disk_is_one_line_wherever_it_is_met(capsys, error, line):
    assert outcome(error) == 2
    assert capsys.readouterr().err == f"error: {line}; free some space, or take another disk\n"


def test_threads_are_as_many_as_cpus_at_most():
    for threads in (None, 1, os.cpu_count()):
        check_threads(threads)
    for threads in (0, -1, 100_000):
        with pytest.raises(UserError, match=f"threads={threads}: must be in 1 … {os.cpu_count()}"):
            check_threads(threads)


# A process of its own: what is printed goes through the descriptors that the shell gave it.


def python(code: str, *, shell: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code as a command's work, with redirections by a shell."""
    source = (
        f"import os, sys\nfrom gpt.cli import run_command\ndef work():\n    {code}\n"
        f"run_command(work, prints={variables.get('PRINTS', 'False')})"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]} | variables
    line = f'set -o pipefail; "{sys.executable}" -c "$CODE" {shell}'
    return subprocess.run(
        ["bash", "-c", line],
        env=environment | {"CODE": source},
        capture_output=True,
        text=True,
    )


MUCH = "for n in range(9999): print(n, flush=True)"
DONE = "open(os.environ['DONE'], 'w').write('whole')"


def test_the_work_goes_on_when_its_reader_has_gone(tmp_path):
    done = python(f"{MUCH}\n    {DONE}", shell="| head -1", DONE=str(tmp_path / "done"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
    assert (tmp_path / "done").read_text() == "whole"
    both = python(
        f"{MUCH.replace('flush', 'file=sys.stderr, flush')}\n    {DONE}",
        shell="2>&1 | head -1",
        DONE=str(tmp_path / "2"),
    )
    assert (both.returncode, both.stdout, (tmp_path / "2").read_text()) == (0, "0\n", "whole")


def test_a_command_that_only_prints_ends_with_its_reader_and_quietly(tmp_path):
    done = python(f"{MUCH}\n    {DONE}", shell="| head -1", DONE=str(tmp_path / "done"), PRINTS="True")
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("prints", ["True", "False"])
@pytest.mark.parametrize("flush", ["True", "False"])
def test_a_full_disk_behind_the_output_is_one_line_and_exit_2(tmp_path, prints, flush):
    code = f"print('x', flush={flush})\n    {DONE}"
    done = python(code, shell="> /dev/full", DONE=str(tmp_path / "done"), PRINTS=prints)
    assert (done.returncode, done.stderr) == (2, "error: cannot write the output: No space left on device\n")
    assert (tmp_path / "done").exists() == (prints == "False" or flush == "False")
    done = python(f"print('x', file=sys.stderr)\n    {DONE}", shell="2> /dev/full", DONE=str(tmp_path / "2"))
    assert (done.returncode, (tmp_path / "2").read_text()) == (0, "whole")


def test_help_into_a_full_disk_is_one_line():
    done = python("print('help'); sys.exit(0)", shell="> /dev/full")
    assert (done.returncode, done.stderr) == (2, "error: cannot write the output: No space left on device\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_error_and_no_file_gets_its_number(tmp_path, closed):
    code = "file = open(os.environ['DONE'], 'w'); print('words'); print('words', file=sys.stderr)"
    code += "; os.write(1, b'library'); os.write(2, b'library'); file.write(str(file.fileno() > 2))"
    done = python(code, shell=closed, DONE=str(tmp_path / "done"))
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert (tmp_path / "done").read_text() == "True"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_the_encoding_lacks_is_escaped(encoding):
    done = python(r"print('ä…\udc80')", PYTHONIOENCODING=encoding, shell="| cat -v")
    written = {"ascii": r"\xe4\u2026\udc80", "latin-1": r"M-d\u2026\udc80", "utf-8": r"M-CM-$M-bM-^@M-&\udc80"}
    assert (done.returncode, done.stdout, done.stderr) == (0, written[encoding] + "\n", "")


def test_a_broken_pipe_of_something_else_is_not_taken_for_a_lost_reader():
    done = python("raise BrokenPipeError('of a worker')")
    assert done.returncode == 1
    assert "BrokenPipeError: of a worker" in done.stderr


# The imports of a command, which take seconds.

HOOK = """
import os, signal, sys

class Signal:
    left = int(os.environ["SIGNAL_AT"])

    def find_spec(self, name, path=None, target=None):
        if hasattr(sys.modules.get("gpt.cli"), "run_main"):  # the handler is there before the next import
            Signal.left -= 1
            if Signal.left == 0:
                signal.raise_signal(int(os.environ["SIGNAL"]))

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Signal())
"""


@pytest.fixture
def interrupted_at(tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Run a command that gets a signal at its n-th import, counted from 1: exit code, output, errors."""
    (tmp_path / "sitecustomize.py").write_text(HOOK)

    def run(module: str, at: int, number: int, *arguments: str) -> tuple[int, str, str]:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
            "SIGNAL_AT": str(at),
            "SIGNAL": str(int(number)),
        }
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.slow
@pytest.mark.parametrize("module", COMMANDS.values())
def test_a_signal_at_the_first_of_a_commands_imports_is_one_line(interrupted_at, module):
    assert interrupted_at(module, 1, signal.SIGINT) == (130, "", INTERRUPTED)


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 50, 300, 900])
@pytest.mark.parametrize("module", ["gpt.train", "tvm_frontend.compile"])
def test_a_signal_in_the_midst_of_a_commands_imports_is_one_line(interrupted_at, module, at):
    assert interrupted_at(module, at, signal.SIGTERM, "--help") == (143, "", TERMINATED)


@pytest.mark.slow
def test_a_signal_in_imports_that_gpt_frontend_began_is_one_line(interrupted_at):
    assert interrupted_at("gpt.commands", 300, signal.SIGINT, "train", "--help") == (130, "", INTERRUPTED)


@pytest.mark.parametrize("module", COMMANDS.values())
def test_a_command_imports_nothing_before_the_handler_is_there(module):
    """Neither in its own file, nor in the __init__.py of the packages that Python imports before it."""
    path = source_of(module)
    _, first, *rest = ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(first, ast.ImportFrom):  # a file that only names another one's main
        assert ast.unparse(first) == "from gpt.cli import run_main"
        first = rest[0]
    assert isinstance(first, ast.If)
    assert ast.unparse(first.test) == "__name__ == '__main__'"
    call = ast.unparse(first.body[-1])
    assert call.startswith(f"run_main('{module}") or len(rest) == 1, call
    for package in {*path.relative_to(ROOT).parents} - {Path()}:
        inside = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")).body
        assert all(isinstance(each, ast.Expr) for each in inside), package


@pytest.mark.parametrize("value", ["abc", "0", "-1", "100000", "4,x", "1.5", " "])
def test_a_variable_for_threads_that_is_no_number_is_one_line_before_any_import(value):
    for variable in THREAD_VARIABLES[:1] if value != "abc" else THREAD_VARIABLES:
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "gpt.inspect"],
            env=os.environ | {"PYTHONPATH": str(ROOT), variable: value},
            capture_output=True,
            text=True,
        )
        lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
        assert done.returncode == 2
        assert lines == [f"error: {variable}={value}: must be a whole number from 1 to 1024; set it so, or unset it"]
        assert "| torch" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("module", ["gpt.generate", "gpt.inspect"])
def test_a_reader_that_goes_early_is_no_error(start, module):
    with start(module, "--help") as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


@pytest.mark.slow
def test_too_many_threads_are_one_line(run, text_file):
    done = run("gpt.train", "tiny", "--corpus", text_file, "--threads", 100_000)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: threads=100000: must be in 1 … {os.cpu_count()}, the CPUs of this machine\n"
