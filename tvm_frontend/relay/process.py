"""Starts a process in Relay's environment, which answers a question at a time, and shows its log as it comes."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpt.cli import UserError
from tvm_frontend.relay.environment import find_environment

WORKER = Path(__file__).with_name("worker.py")
LAST_LINES = 3  # lines at the end of the log that an error quotes
MOST_CHARACTERS = 300  # of those lines in all


class RelayProcess:
    """Runs `worker.py` in Relay's environment. Use it as a context manager, or `close` it: that ends the process.

    variables: its environment variables, besides those that Relay needs. files: open files that it shares, by their
    numbers. show_log: also print its output here, to stderr. Raises UserError if there is no environment.
    """

    def __init__(
        self, variables: Mapping[str, str] | None = None, *, files: tuple[int, ...] = (), show_log: bool = False
    ) -> None:
        environment = find_environment()
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._show_log = show_log
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [environment.python, "-P", WORKER, str(theirs.fileno())],
                env=os.environ | environment.variables | dict(variables or {}),
                cwd=environment.folder,
                pass_fds=[theirs.fileno(), *files],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        self._answers = self._socket.makefile("rb")
        self._log = threading.Thread(target=self._follow_log, daemon=True)
        self._log.start()

    def __enter__(self) -> "RelayProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Give the id of the process, which is in its parent's process group, to be stopped and continued with it."""
        return self._process.pid

    def ask(self, question: str, deadline_s: float, **details: Any) -> dict[str, Any]:
        """Call the worker's function of that name and return its answer.

        Raises UserError, in one line, if it refuses or fails, and if the process dies, gives no answer in time or one
        that makes no sense; after those it is gone.
        """
        try:
            self._socket.settimeout(deadline_s)
            self._socket.sendall(json.dumps({"ask": question} | details).encode() + b"\n")
            line = self._answers.readline()
        except TimeoutError:
            raise self._lost(f"gave no answer within {deadline_s:g} s") from None
        except ConnectionError:
            line = b""
        if not line.endswith(b"\n"):
            raise self._lost("died")
        try:
            ((kind, answer),) = json.loads(line).items()
        except (ValueError, AttributeError):
            raise self._lost(f"answered what makes no sense: {line[:60]!r}") from None
        if kind != "answer":
            raise UserError(answer if kind == "refused" else f"Relay: {answer}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._log.join(timeout=5)
        self._answers.close()
        self._socket.close()

    def _lost(self, what: str) -> UserError:
        if what == "died":
            with suppress(subprocess.TimeoutExpired):  # it may have closed the socket and live on
                code = self._process.wait(timeout=5)
                what += f" of {signal.Signals(-code).name}" if code < 0 else f" with exit code {code}"
        self.close()
        last = " | ".join(self._last)[-MOST_CHARACTERS:]
        return UserError(f"Relay's process {what}" + (f"; it last said: {last}" if last else ""))

    def _follow_log(self) -> None:
        assert self._process.stdout is not None  # it is a pipe
        with self._process.stdout as log:
            for line in log:
                text = line.decode(errors="replace").rstrip()
                if text:
                    self._last.append(text)
                if self._show_log:
                    print(f"relay: {text}", file=sys.stderr, flush=True)
