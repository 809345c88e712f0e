import signal
import sys
from contextlib import suppress

import pytest

from gpt.cli import UserError, heed_interrupt, run_command


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
    assert "Traceback" not in capsys.readouterr().err


def test_an_interrupt_that_a_library_swallows_is_heeded():
    def swallow() -> None:
        with heed_interrupt(), suppress(BaseException):
            signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    with pytest.raises(KeyboardInterrupt):
        swallow()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_fault_of_the_project_keeps_its_traceback_also_where_a_library_hides_it(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", lambda *_: None)
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)
    assert sys.excepthook is sys.__excepthook__


@pytest.mark.slow
def test_a_reader_that_goes_early_is_no_error(start):
    with start("gpt.generate", "--help") as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
