"""Run a command as a process's whole work, and end it in one line: after a mistake, a signal, or a full disk.

Exit codes: 0 when the work is done, also if nobody read what was printed; 1 where a check found something wrong; 2
after a user's mistake, and where a disk or the output could not be written; 128 + n after signal n, which is 130 after
Ctrl-C and 143 after SIGTERM. Standard library only.
"""

import errno
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import Any, NoReturn, TextIO

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C; docker stop, Slurm; a terminal that was closed
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)  # errors of a disk that is full or broken
# Environment variables that size thread pools; most libraries read theirs once, when they are imported.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "TVM_NUM_THREADS",
)
MOST_THREADS = max(1024, os.cpu_count() or 1)  # by a variable; with some more a library ends the process

_came: list[int] = []  # the signals that came in this command so far
_raised = 0  # how often one of them raised KeyboardInterrupt, in this process
_output: "_Descriptor | None" = None  # this process's own standard output, once it is guarded


class UserError(ValueError):
    """A mistake that the user can mend. The message is one line: what is wrong, where, and what to do."""


def run_main(module: str, *, prints: bool = False) -> NoReturn:
    """Import a command's module, run its `main` as this process's whole work, and exit.

    Imports take seconds. A module that is run by `python -m` calls this before its own imports, which then happen here:
    a signal in the middle of them is one line as well. It ends the process on the spot, as nothing was written yet, and
    as an exception could be swallowed by the module that is being imported.
    prints: as `run_command` takes it.
    """
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end_at_once)
    run_command(check_thread_variables)  # before libraries read them
    run_command(importlib.import_module(module).main, prints=prints)
    sys.exit()


def run_command(command: Callable[[], None], *, prints: bool = False) -> None:
    """Run `command`; exit as the top of this file says if it ends in anything but success.

    All that is the user's to mend is one line without a traceback. Any other exception is a fault of the project and
    keeps its traceback. Where the reader of the output has gone (`… | head`) or its disk is full, the work goes on, and
    a full disk is told at the end. prints: what is printed is all of the work, which then ends there.
    """
    _guard_streams(prints)
    _came.clear()
    found: BaseException | None = None
    try:
        with _handled(_interrupt):
            command()
            sys.stdout.flush()
    except BaseException as error:
        found = error
    code, words = _outcome(found)
    if words:
        print(words, file=sys.stderr, flush=True)
    if code is None and found is not None:
        sys.excepthook = sys.__excepthook__  # TVM's hook shows nothing of some errors
        raise found
    if found is not None or code:
        sys.exit(code)


@contextmanager
def heed_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt at the block's end if it was raised in it by a signal and a library swallowed it."""
    before = _raised
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is run_command's, or somebody's
    with _handled(_interrupt, signal.SIGINT) if ours else nullcontext():
        yield
    if _raised > before:
        raise KeyboardInterrupt


@contextmanager
def defer_interrupt() -> Iterator[Callable[[], bool]]:
    """Let the signals that end a process be noted in the block: yield a function that says whether one came.

    For work that then ends itself, and raises KeyboardInterrupt, whose text `run_command` shows. A second Ctrl-C ends
    it at once. Other signals may come again, as torchrun passes on what its ranks got too.
    """
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came and number == signal.SIGINT:
            _interrupt(number, frame)
        came = True
        _came.append(number)

    with _handled(note):
        yield lambda: came


def disk_trouble(error: BaseException) -> str | None:
    """Say what is wrong with a disk, if that is behind an error, also one that a library raised in words of its own."""
    cause: BaseException | None = error
    while cause is not None:
        for number in DISK:
            if getattr(cause, "errno", None) == number or os.strerror(number) in str(cause):
                return os.strerror(number)
        cause = cause.__cause__ or cause.__context__
    return None


def check_threads(threads: int | None) -> None:
    """Raise UserError for a number of threads, if one is given, that is below 1 or above the machine's CPUs."""
    if threads is not None and not 1 <= threads <= (os.cpu_count() or 1):
        raise UserError(f"threads={threads}: must be in 1 … {os.cpu_count()}, the CPUs of this machine")


def check_thread_variables() -> None:
    """Raise UserError for an environment variable of THREAD_VARIABLES that is no number, or so large as to crash."""
    for name in THREAD_VARIABLES:
        value = os.environ.get(name, "")
        numbers = value.split(",") if value else []  # OpenMP's has a number for each level of nesting
        if not all(number.strip().isdecimal() and 1 <= int(number) <= MOST_THREADS for number in numbers):
            raise UserError(f"{name}={value}: must be a whole number from 1 to {MOST_THREADS}; set it so, or unset it")


class _Descriptor(io.FileIO):
    """Standard output or error. A write that fails is noted, and from then on all goes to nowhere.

    raises: the write that fails raises too.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.raises = False
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if self.raises:
                raise
            return len(data)


def _guard_streams(prints: bool) -> None:
    """Make output and errors streams that a lost reader does not stop, unless they are not this process's own.

    Characters that the encoding lacks are escaped. A closed stream is opened to nowhere: the next file that is opened
    would get its number, and with it all that libraries print.
    """
    global _output
    if sys.stdout is sys.__stdout__ and sys.stderr is sys.__stderr__:
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(descriptor, True)
        os.close(descriptor)
        _output = _Descriptor(1)
        sys.stdout = _guarded(sys.stdout, _output)
        sys.stderr = _guarded(sys.stderr, _Descriptor(2))
    if _output is not None:
        _output.raises = prints


def _guarded(stream: TextIO | None, raw: _Descriptor) -> io.TextIOWrapper:
    """Return a stream like the one that Python made, or did not make as it was closed, over another descriptor."""
    if not isinstance(stream, io.TextIOWrapper):
        return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace")
    stream.flush()
    buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)  # as python -u does
    return io.TextIOWrapper(
        buffer,
        stream.encoding,
        "backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _outcome(error: BaseException | None) -> tuple[int | None, str]:
    """Return the exit code and the line to print for what a command ended in; no code for a fault of the project."""
    if isinstance(error, KeyboardInterrupt) or (_came and isinstance(error, Exception)):
        number = _came[0] if _came else signal.SIGINT
        return 128 + number, _words_of(number, str(error) if isinstance(error, KeyboardInterrupt) else "")
    if isinstance(error, UserError):
        return 2, f"error: {error}"
    if isinstance(error, SystemExit) and error.code not in (None, 0):
        return (error.code, "") if isinstance(error.code, int) else (1, str(error.code))
    with suppress(OSError):
        sys.stdout.flush()  # of a command that left by SystemExit, as --help does
    failed = _output.error if _output is not None else None
    if failed is not None and (error is failed or error is None or isinstance(error, SystemExit)):
        if isinstance(failed, BrokenPipeError):
            return 0, ""
        return 2, f"error: cannot write the output: {failed.strerror}"
    if error is None or isinstance(error, SystemExit):
        return 0, ""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return 2, f"error: {str(error.filename)[:60]}…: {error.strerror}; choose a shorter name"
    if trouble := disk_trouble(error):
        place = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return 2, f"error: {trouble}{place}; free some space, or take another disk"
    return None, ""


def _words_of(number: int, told: str = "") -> str:
    begin = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    return f"{begin}: {told or 'nothing half-written was left behind'}"


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handle a signal that ends the command: by KeyboardInterrupt, whichever it is.

    While a first one is being heeded, only Ctrl-C raises again: somebody waits there.
    """
    global _raised
    if _came and number != signal.SIGINT:
        return
    _came.append(number)
    _raised += 1
    raise KeyboardInterrupt


def _end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """Handle a signal while nothing is at stake: print the line and leave, past all handlers of exceptions."""
    with suppress(OSError):
        os.write(2, f"{_words_of(number)}\n".encode())
    os._exit(128 + number)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """Have `handler` called in the block for some signals, by default ENDING; one that is ignored (nohup) stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are not this block's
        return
    before = {number: signal.getsignal(number) for number in numbers or ENDING}
    heard = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in heard:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in heard.items():
            signal.signal(number, old)
