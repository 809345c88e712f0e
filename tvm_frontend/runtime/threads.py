"""Chooses the number of threads that kernels run on, and how these wait for the next kernel."""

import os
import threading
from pathlib import Path

from gpt.cli import UserError
from tvm_frontend.runtime.exclusive import FORKED

CPUS, CGROUPS, OWN_CGROUP = Path("/sys/devices/system/cpu"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
VARIABLES = ("TVM_NUM_THREADS", "OMP_NUM_THREADS")  # TVM's own, in its order
# Yields before a waiting thread sleeps: a fraction of a millisecond, as long as the gap between two kernels or steps.
# On two Zen 5 cores, models of 0.08 to 20 ms a step: no different from TVM's own 300000. At 100 some steps of the
# smallest take 40 % longer, at 0 five times as long. A step after a pause wakes the threads, in 0.1 ms.
SPINS = "1000"
_SHARE_ALL_CPUS = -3  # TVM's ThreadGroup::kSpecifyThreadShareAllCore
_of_this_thread = threading.local()


def chosen_threads(threads: int | None = None) -> int:
    """Choose as many threads as asked for, else as the environment says, else one a physical core of this process.

    Raises UserError for less than one, and for a variable that is no number.
    """
    if threads is not None:
        name, value = "threads", str(threads)
    else:
        given = [name for name in VARIABLES if os.environ.get(name)]
        if not given:
            return physical_cores()
        name = given[0]
        value = os.environ[name].split(",")[0]  # OpenMP's has a number for each level of nesting
    if not value.strip().isdecimal() or int(value) < 1:
        raise UserError(f"{name}={value}: must be a whole number of at least 1")
    return int(value)


def physical_cores() -> int:
    """Count the cores among the CPUs that this process may use, up to its quota; hyperthreads of a core count once."""
    cores = len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})
    return int(max(1, min(cores, _quota())))


def use_threads(threads: int) -> None:
    """Run the kernels that the calling thread launches from now on on that many threads.

    TVM keeps a pool of threads for each thread that calls kernels, and a pool cannot grow: it is made for all CPUs,
    and whoever needs fewer lets the others sleep. Raises UserError for more than it has, and in a process that was
    forked from one whose pool the calling thread made: only that thread is there.
    """
    if getattr(_of_this_thread, "process", os.getpid()) != os.getpid():
        raise UserError(FORKED)
    if getattr(_of_this_thread, "threads", None) == threads:
        return
    import tvm  # noqa: F401  (registers the functions)
    import tvm_ffi

    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", SPINS)
    # Else TVM binds threads to the machine's first cores, which others bind to as well and which may not be ours.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    _of_this_thread.process = os.getpid()
    configure = tvm_ffi.get_global_func("runtime.config_threadpool")
    cpus = [str(cpu) for cpu in sorted(os.sched_getaffinity(0))]
    if not hasattr(_of_this_thread, "threads"):
        _configure(configure, max(threads, len(cpus)), cpus)
    _configure(configure, threads, cpus)
    if (there := tvm_ffi.get_global_func("runtime.NumThreads")()) < threads:
        raise UserError(f"threads={threads}: TVM already runs in this process, with a pool of {there}; start with more")
    _of_this_thread.threads = threads


def _configure(configure, threads: int, cpus: list[str]) -> None:
    configure(_SHARE_ALL_CPUS, threads, [cpus[i % len(cpus)] for i in range(threads)])


def _siblings(cpu: int) -> str:
    path = CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list"
    return path.read_text().strip() if path.exists() else str(cpu)


def _quota() -> float:
    """Read the CPU time per second that the control groups grant (cgroups(7), version 2); infinite without a limit."""
    own = next((line[3:] for line in _lines(OWN_CGROUP) if line.startswith("0::")), "/")
    group = CGROUPS / own.lstrip("/")
    quotas = [float("inf")]
    for folder in (group, *group.parents):
        for line in _lines(folder / "cpu.max"):
            most, period = line.split()
            quotas += [int(most) / int(period)] if most != "max" else []
    return min(quotas)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
