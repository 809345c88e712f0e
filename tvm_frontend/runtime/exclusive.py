"""Lets one thread at a time into a session, and no process but its own."""

import os
import threading
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from gpt.cli import UserError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
SessionT = TypeVar("SessionT", bound="Exclusive")

FORKED = (
    "this process was forked from one that had opened a session, whose threads it does not have: open the session in "
    "the process that uses it, and start that one by multiprocessing's method spawn"
)


class Exclusive:
    """Holds the lock of a session and the process that opened it; the methods marked `exclusive` heed both."""

    def __init__(self) -> None:
        self._lock, self._opened_by = threading.RLock(), os.getpid()


def exclusive(
    method: Callable[Concatenate[SessionT, Parameters], Result],
) -> Callable[Concatenate[SessionT, Parameters], Result]:
    """Let one thread at a time into the marked methods of a session; the others wait.

    Raises UserError in a process that was forked from the session's: the threads that its kernels run on, a GPU's
    context and the pipe to Relay's process are not its own, and a call would wait for ever or mix up two answers.
    """

    @wraps(method)
    def call(self: SessionT, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if os.getpid() != self._opened_by:
            raise UserError(FORKED)
        with self._lock:
            return method(self, *args, **kwargs)

    return call
