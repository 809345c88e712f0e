"""End a command after a user's mistake, as every command of the project does. Standard library only."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class UserError(ValueError):
    """A mistake that the user can mend. The message is one line: what is wrong, where, and what to do."""


def run_command(command: Callable[[], None]) -> None:
    """Run `command` as a process's whole work; exit with 2 after a user's mistake, with 130 after Ctrl-C.

    Both are one line without a traceback. Any other exception is a fault of the project and keeps its traceback.
    """
    try:
        command()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: nothing half-written was left behind", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone (`... | head`): not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            print(f"error: {str(error.filename)[:60]}…: {error.strerror}; choose a shorter name", file=sys.stderr)
            sys.exit(2)
        sys.excepthook = sys.__excepthook__  # TVM's hook shows nothing of some errors
        raise


@contextmanager
def heed_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt at the block's end if Ctrl-C came in it and a bare `except` of a library swallowed it."""
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.default_int_handler(number, frame)

    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield  # Ctrl-C is not this block's
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt
