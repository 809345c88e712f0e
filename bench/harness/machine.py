"""Describes the machine that results were measured on, and chooses how many threads to use on it."""

import os
import platform
from pathlib import Path

from gpt.cli import check_threads
from tvm_frontend.runtime.threads import physical_cores


def checked_threads(threads: int | None) -> int:
    """Return the threads asked for, by default one per physical core. Raises UserError for more than there are CPUs."""
    if threads is None:
        return physical_cores()
    check_threads(threads)
    return threads


def describe_machine() -> dict[str, str | int]:
    """Describe all that a reader needs to judge a time: CPU, cores, memory, operating system, Python."""
    cpu = _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    kilobytes = (_field("/proc/meminfo", "MemTotal") or "0 kB").split()[0]
    return {
        "cpu": cpu,
        "architecture": platform.machine(),
        "physical_cores": physical_cores(),
        "logical_cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": int(kilobytes) * 1024,
        "simd": _widest_simd(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _widest_simd() -> str:
    flags = (_field("/proc/cpuinfo", "flags") or _field("/proc/cpuinfo", "Features") or "").split()
    return next((name for name in ("avx512f", "avx2", "avx", "sse2", "asimd") if name in flags), "unknown")


def _field(path: str, name: str) -> str | None:
    if not Path(path).exists():
        return None
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None
