import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt.cli import UserError
from tvm_frontend.runtime import threads as threads_module
from tvm_frontend.runtime.threads import chosen_threads, physical_cores

ROOT = Path(__file__).parents[3]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of four CPUs, two of a core, of which this process may use three; its control group is a/b."""
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/topology/thread_siblings_list").write_text(f"{siblings}\n")
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "own").write_text("0::/a/b\n")
    monkeypatch.setattr(threads_module, "CPUS", tmp_path)
    monkeypatch.setattr(threads_module, "CGROUPS", tmp_path)
    monkeypatch.setattr(threads_module, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    for name in threads_module.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_one_thread_a_physical_core_that_we_may_use(machine, monkeypatch):
    assert chosen_threads() == physical_cores() == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3})
    assert chosen_threads() == 1


@pytest.mark.parametrize(
    ("group", "quota", "cores"),
    [("a/b", "max 100000", 2), ("a/b", "150000 100000", 1), ("a", "100000 100000", 1), (".", "5000 100000", 1)],
)
def test_no_more_than_the_quota_of_any_group_that_we_are_in(machine, group, quota, cores):
    (machine / group / "cpu.max").write_text(f"{quota}\n")
    assert physical_cores() == cores


def test_a_number_goes_before_the_environment_and_that_before_the_cores(machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5,2")
    assert chosen_threads() == 5
    monkeypatch.setenv("TVM_NUM_THREADS", "7")
    assert chosen_threads() == 7
    assert chosen_threads(3) == 3


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_what_is_no_number_of_threads_is_refused(machine, monkeypatch, value):
    monkeypatch.setenv("TVM_NUM_THREADS", value)
    with pytest.raises(UserError, match=f"TVM_NUM_THREADS={value}: must be a whole number of at least 1"):
        chosen_threads()
    with pytest.raises(UserError, match="threads=0: must be"):
        chosen_threads(0)


def run(code, folder, **environment):
    """What a process of its own prints: a pool is made once in a process."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TVM_", "OMP_"))}
    command = [sys.executable, "-c", f"{PRELUDE}\n{code}", str(folder)]
    environment = clean | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()


PRELUDE = """
import os, sys, threading, time
import numpy as np, tvm_ffi
from gpt.cli import UserError
from tvm_frontend.artifact import load_compiled
from tvm_frontend.runtime import open_session
model = load_compiled(sys.argv[1])
ids = np.zeros((4, 64), int)
used = lambda: tvm_ffi.get_global_func("runtime.NumThreads")()
"""

# sched_yield(2) is what TVM's threads call while they wait actively: this counts its calls in the whole process.
YIELDS_C = """
#define _GNU_SOURCE
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>
atomic_long yields;
int sched_yield(void) { atomic_fetch_add(&yields, 1); return syscall(SYS_sched_yield); }
"""
YIELDS = """
import ctypes
yields = lambda: ctypes.c_long.in_dll(ctypes.CDLL(None), "yields").value
def others_sleep():
    others = [task for task in os.listdir("/proc/self/task") if int(task) != threading.get_native_id()]
    return all(open(f"/proc/self/task/{task}/stat").read().rsplit(")", 1)[1].split()[0] == "S" for task in others)
def settle(deadline_s=100):
    # Wait until no other thread runs and none has begun to yield meanwhile.
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        before = yields()
        asleep = others_sleep()
        time.sleep(0.2)
        if asleep and others_sleep() and yields() == before:
            return
    raise SystemExit("the threads do not come to rest")
"""


@pytest.fixture(scope="module")
def counted_yields(tmp_path_factory):
    """The environment in which a process counts the calls of sched_yield."""
    folder = tmp_path_factory.mktemp("yields")
    (folder / "yields.c").write_text(YIELDS_C)
    compiler = next(filter(shutil.which, ("gcc", "clang", "g++", "clang++")))
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-x", "c", str(folder / "yields.c"), "-o", str(folder / "yields.so")], check=True
    )
    # numpy's own threads yield too, so there are none.
    return {"LD_PRELOAD": str(folder / "yields.so"), "OPENBLAS_NUM_THREADS": "1"}


@pytest.mark.slow
def test_between_steps_its_threads_sleep_after_few_yields_and_bind_nobody(compiled, counted_yields):
    """Of the two threads one is the caller's own, so one waits between steps."""
    *waited, total, same = run(
        f"""{YIELDS}
before = os.sched_getaffinity(0)
session = open_session(model, threads=2)
for _ in range(3):
    session.prefill(ids)
    start = yields()
    settle()
    print(yields() - start)
print(yields())
print(all(os.sched_getaffinity(int(thread)) == before for thread in os.listdir("/proc/self/task")))
""",
        compiled.path,
        **counted_yields,
    )
    assert max(map(int, waited)) <= int(threads_module.SPINS) <= int(total)  # in all, so they are counted
    assert same == "True"


@pytest.mark.slow
def test_the_environment_may_say_to_wait_actively(compiled):
    # TVM's threads yield while they wait, so how much time they use is up to whoever else runs.
    code = """
session = open_session(model, threads=2)
session.prefill(ids)
print(os.environ["TVM_THREAD_POOL_SPIN_COUNT"])
"""
    assert run(code, compiled.path, TVM_THREAD_POOL_SPIN_COUNT="3000000") == ["3000000"]


@pytest.mark.slow
@pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="one CPU: the pool of a session of one thread has no second"
)
def test_each_session_of_a_process_keeps_its_number_of_threads(compiled):
    found = run(
        """
one, two = open_session(model, threads=1), open_session(model, threads=2)
for session in (one, two, one):
    session.prefill(ids)
    print(used())
def other():
    two.prefill(ids)
    print(used())
thread = threading.Thread(target=other)
thread.start()
thread.join()
print(np.array_equal(one.prefill(ids), two.prefill(ids)))
try:
    open_session(model, threads=len(os.sched_getaffinity(0)) + 1)
except UserError as error:
    print("refused" if f"with a pool of {len(os.sched_getaffinity(0))}" in str(error) else error)
""",
        compiled.path,
    )
    assert found == ["1", "2", "1", "2", "True", "refused"]


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_process_is_told_to_open_a_session_itself(compiled, threads):
    """It has none of the threads: a call would wait for ever, so an alarm ends one that is not refused."""
    found = run(
        f"""
import signal
def forked(work):
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            print(work().shape, flush=True)
        except UserError as error:
            print("refused" if "spawn" in str(error) else error, flush=True)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
forked(lambda: open_session(model, threads={threads}).prefill(ids))
session = open_session(model, threads={threads})
session.prefill(ids)
forked(lambda: session.prefill(ids))
forked(lambda: session.clone())
forked(lambda: open_session(model, threads={threads}).prefill(ids))
print(session.prefill(ids).shape[0])
""",
        compiled.path,
    )
    assert found == ["(4,", "64,", "211)", "0", "refused", "0", "refused", "0", "refused", "0", "4"]


@pytest.mark.slow
def test_sessions_that_are_gone_leave_no_memory_behind(compiled):
    """In bytes that malloc has given out, which do not depend on who else runs; logits outlive their session."""
    grown, same = run(
        """
import ctypes, gc
fields = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Info(ctypes.Structure):  # mallinfo2(3)
    _fields_ = [(name, ctypes.c_size_t) for name in fields]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
def logits_of_the_last(times):
    for _ in range(times):
        logits = open_session(model, threads=1).prefill(ids)
    gc.collect()
    return logits
held = logits_of_the_last(1)
expected = held.copy()
logits_of_the_last(20)
before = mallinfo().uordblks
logits_of_the_last(100)
print((mallinfo().uordblks - before) // 100, np.array_equal(held, expected))
""",
        compiled.path,
    )
    assert int(grown) < 1000
    assert same == "True"
