"""Runs one engine in a process of its own, which is stopped (SIGSTOP) except while it is asked something.

So no thread pool of another engine can spin beside the engine that is timed. Calls are timed by the worker's own clock,
which leaves out the transfer through the pipe.
"""

import ctypes
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from bench.harness.memory import give_memory_back
from gpt.cli import THREAD_VARIABLES, UserError

ROOT = Path(__file__).resolve().parents[2]
FEWEST_SAMPLES = 3  # per turn
MOST_SAMPLES = 50  # per turn; more samples of a call of microseconds add nothing
MOST_CHARACTERS = 300  # of an engine's own message in a table
WARM_UP = 0.2  # share of a turn's budget that brings clock rates, caches and threads back after other engines' turns


class WorkerError(RuntimeError):
    """A failure of a worker; its message is the reason in a row of the results."""


@dataclass(frozen=True)
class Interpreter:
    """The Python that a worker runs in. variables: its environment variables, its module search path among them."""

    program: str = sys.executable
    variables: tuple[tuple[str, str], ...] = ()


OURS = Interpreter()


class Worker:
    """The parent's end of a worker. Use it as a context manager: leaving kills the process and all that it started.

    factory: `module:Class`; the object is made in the worker, and its methods are called by name. Every method raises
    WorkerError if the object raised, the process died, or the deadline passed; after the last two the worker is gone.
    """

    def __init__(self, factory: str, threads: int, interpreter: Interpreter = OURS) -> None:
        self._gone: str | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (`close` closes it)
        self._pipe, theirs = Pipe()
        variables = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")} | dict(interpreter.variables)
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), variables["PYTHONPATH"]]))}
        environment = variables | paths | dict.fromkeys(THREAD_VARIABLES, str(threads))
        self._process = subprocess.Popen(
            [interpreter.program, "-m", "bench.harness.worker", str(theirs.fileno()), factory],
            env=os.environ | environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # its children stop, continue and die with it, and Ctrl-C reaches the parent alone
        )
        theirs.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Return the id of the process, which is also that of its process group."""
        return self._process.pid

    def call(self, method: str, *arguments: Any, deadline_s: float = 600) -> Any:
        """Call a method of the object and return its result."""
        return self._ask("call", method, arguments, deadline_s=deadline_s)

    def time(self, method: str, *arguments: Any, budget_s: float, deadline_s: float = 600) -> list[float]:
        """Time several calls by the worker's clock, as `sample` does: the seconds of each."""
        return self._ask("time", method, arguments, budget_s, deadline_s=deadline_s)

    def time_once(self, method: str, *arguments: Any, deadline_s: float = 600) -> float:
        """Time one call by the worker's clock, without a warm-up: its seconds."""
        return self._ask("time once", method, arguments, deadline_s=deadline_s)

    def close(self) -> None:
        """Kill the process with everything it started, stopped or not, and reap it."""
        self._gone = self._gone or "closed"
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._pipe.close()
        self._log.close()

    def _ask(self, *message: Any, deadline_s: float) -> Any:
        if self._gone:
            raise WorkerError(self._gone)
        with self._awake():
            try:
                self._pipe.send(message)
                if not self._pipe.poll(deadline_s):
                    raise self._lost(f"no answer within {deadline_s:g} s")
                succeeded, answer = self._pipe.recv()
                self._pipe.recv()  # the worker has freed its memory
            except (EOFError, ConnectionError):
                raise self._lost("the process died") from None
        if not succeeded:
            raise WorkerError(answer)
        return answer

    @contextmanager
    def _awake(self) -> Iterator[None]:
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:  # not yet reaped, so the group's number is still ours
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def _lost(self, what: str) -> WorkerError:
        self._signal(signal.SIGKILL)
        code = self._process.wait()
        if what == "the process died":
            what += f" of {signal.Signals(-code).name}" if code < 0 else f" with exit code {code}"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        last = " | ".join([line.strip() for line in lines if line.strip()][-3:])
        self._gone = f"{what}; it last said: {last[-MOST_CHARACTERS:]}" if last else what
        return WorkerError(self._gone)


def sample(call: Callable[[], object], budget_s: float) -> list[float]:
    """Time a few calls, more while the budget lasts, after a warm-up that is not counted: the seconds of each."""
    warm = 0.0
    while warm < WARM_UP * budget_s:
        warm += _seconds_of(call)
    samples: list[float] = []
    while len(samples) < FEWEST_SAMPLES or (len(samples) < MOST_SAMPLES and sum(samples) < budget_s):
        samples.append(_seconds_of(call))
    return samples


def _seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# The parent's messages begin with one of these words.
ANSWERS: dict[str, Callable[..., Any]] = {"call": lambda call: call(), "time": sample, "time once": _seconds_of}


def _serve(pipe: Connection, factory: str) -> None:
    """Make the object in the worker, then answer the parent until it is gone."""
    subject: Any = None
    while True:
        try:
            kind, method, arguments, *rest = pipe.recv()
        except EOFError:
            return
        try:
            if subject is None:
                module, name = factory.split(":")
                subject = getattr(importlib.import_module(module), name)()
            call = getattr(subject, method)
            answer = ANSWERS[kind](partial(call, *arguments), *rest)
        except UserError as error:
            pipe.send((False, str(error)))
        except Exception as error:
            traceback.print_exc()
            lines = [line.strip() for line in f"{type(error).__name__}: {error}".split("\n") if line.strip()]
            pipe.send((False, " ".join(lines[:2])[:MOST_CHARACTERS]))
        else:
            pipe.send((True, answer))
        if kind == "call":  # a timed call keeps its memory, or the next one would have to ask for it again
            # Logits of GPT-2 for 4 × 1024 tokens are 0.8 GB, and each stopped engine would keep its own.
            arguments = answer = call = None
            give_memory_back()
        pipe.send(None)  # from now on it may be stopped


def _die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, as a stopped process would never notice."""
    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    _die_with_parent()
    _serve(Connection(int(sys.argv[1])), sys.argv[2])
