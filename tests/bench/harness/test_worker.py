"""A worker answers, fails in words, is never waited for forever, and is stopped while nobody asks it."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.harness.worker import FEWEST_SAMPLES, MOST_SAMPLES, THREAD_VARIABLES, Worker, WorkerError, sample
from bench.models.artifacts import Artifacts

FAKES = """
import os, signal, subprocess, sys, time
from gpt.cli import UserError

class Fake:
    def echo(self, *values): return values
    def environment(self, name): return os.environ[name]
    def raises(self): raise RuntimeError("the flux\\ncapacitor\\nis empty")
    def mistaken(self): raise UserError("use another one")
    def dies(self): print("last words", file=sys.stderr, flush=True); os.kill(os.getpid(), signal.SIGSEGV)
    def leaves(self): os._exit(3)
    def sleeps(self, seconds): time.sleep(seconds)
    def has_child(self): return subprocess.Popen(["sleep", "60"]).pid
    def counts(self): self.count = getattr(self, "count", 0) + 1; return self.count
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A class that misbehaves on demand, where a worker can import it."""
    (tmp_path / "fakes_of_a_test.py").write_text(FAKES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "fakes_of_a_test:Fake"


@pytest.fixture
def worker(factory: str) -> Iterator[Worker]:
    """A worker that misbehaves on demand."""
    with Worker(factory, threads=1) as started:
        yield started


def state_of(pid: int) -> str:
    """A process's state letter (proc(5)): T is stopped, S asleep, R running; X if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def until(condition: Callable[[], bool]) -> bool:
    """Wait for the condition to come true, for two minutes at most, and return whether it did."""
    end = time.monotonic() + 120
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_it_answers(worker: Worker) -> None:
    assert worker.call("echo", 1, "two") == (1, "two")
    assert [worker.call("counts"), worker.call("counts")] == [1, 2]


@pytest.mark.parametrize("name", THREAD_VARIABLES)
def test_threads_are_set_before_anything_is_imported(worker: Worker, name: str) -> None:
    assert worker.call("environment", name) == "1"


def test_what_is_raised_becomes_words_and_it_goes_on(worker: Worker) -> None:
    with pytest.raises(WorkerError, match=r"^RuntimeError: the flux capacitor$"):
        worker.call("raises")
    assert worker.call("echo") == ()


def test_a_users_mistake_keeps_its_words(worker: Worker) -> None:
    with pytest.raises(WorkerError, match=r"^use another one$"):
        worker.call("mistaken")


def test_death_is_told_with_its_signal_and_last_words(worker: Worker) -> None:
    with pytest.raises(WorkerError, match="the process died of SIGSEGV; it last said: last words"):
        worker.call("dies")
    with pytest.raises(WorkerError, match="SIGSEGV"):
        worker.call("echo")


def test_an_exit_is_told_with_its_code(worker: Worker) -> None:
    with pytest.raises(WorkerError, match="the process died with exit code 3"):
        worker.call("leaves")


def test_a_hang_ends_at_the_deadline(worker: Worker) -> None:
    worker.call("echo")
    with pytest.raises(WorkerError, match=r"no answer within 0.2 s"):
        worker.call("sleeps", 60, deadline_s=0.2)
    assert state_of(worker.pid) == "X"


def test_a_class_that_is_not_there_is_told(tmp_path: Path) -> None:
    with Worker("nonesuch:Engine", threads=1) as worker, pytest.raises(WorkerError, match="No module named 'nonesuch'"):
        worker.call("load")


def test_it_is_stopped_while_nobody_asks(worker: Worker) -> None:
    worker.call("echo")
    assert until(lambda: state_of(worker.pid) == "T")
    worker.call("echo")
    assert until(lambda: state_of(worker.pid) == "T")


def test_others_are_stopped_while_one_is_timed(worker: Worker, factory: str) -> None:
    with Worker(factory, threads=1) as other:
        child = other.call("has_child")
        assert until(lambda: state_of(other.pid) == state_of(child) == "T")
        worker.time("sleeps", 0.01, budget_s=0.1)
        assert state_of(other.pid) == state_of(child) == "T"
        assert other.call("echo") == ()


def test_leaving_kills_it_and_all_it_started(factory: str) -> None:
    with Worker(factory, threads=1) as worker:
        child = worker.call("has_child")
    assert state_of(worker.pid) == "X"
    assert until(lambda: state_of(child) in "XZ")


def test_an_interrupt_while_waiting_leaves_no_process(factory: str) -> None:
    worker = Worker(factory, threads=1)
    worker.call("echo")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    main = threading.main_thread().ident
    threading.Timer(0.1, signal.pthread_kill, [main, signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt), worker:
        worker.call("sleeps", 60)
    assert state_of(worker.pid) == "X"


def test_it_dies_with_a_parent_that_is_killed(factory: str) -> None:
    program = f"""
import os, signal
from bench.harness.worker import Worker
worker = Worker({factory!r}, threads=1)
worker.call("echo")
print(worker.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ["PYTHONPATH"]])}
    out = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert until(lambda: state_of(int(out.stdout)) in "XZ")


def test_the_workers_clock_times_calls(worker: Worker) -> None:
    samples = worker.time("sleeps", 0.01, budget_s=0.1)
    assert len(samples) >= FEWEST_SAMPLES
    assert min(samples) >= 0.01
    assert worker.time_once("sleeps", 0.01) >= 0.01


def test_a_warm_up_is_not_a_sample() -> None:
    calls = []
    samples = sample(lambda: calls.append(time.sleep(0.01)), budget_s=0.1)
    assert FEWEST_SAMPLES <= len(samples) < len(calls)


def test_samples_are_few_but_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is one on which every call takes a second."""
    monkeypatch.setattr("bench.harness.worker.time", SimpleNamespace(perf_counter=count().__next__))
    assert sample(lambda: None, budget_s=100) == [1] * MOST_SAMPLES
    assert sample(lambda: None, budget_s=10) == [1] * 10
    assert sample(lambda: None, budget_s=0.001) == [1] * FEWEST_SAMPLES


@pytest.mark.parametrize("onnx", [None, Path("theirs.onnx")])
def test_artifacts_are_sent_without_a_name_that_only_some_pythons_have(onnx: Path | None) -> None:
    artifacts = Artifacts(Path("some", "folder"), onnx=onnx)
    sent = pickle.dumps(artifacts)
    assert b"pathlib" not in sent
    assert pickle.loads(sent) == artifacts
