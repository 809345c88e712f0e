"""Run the cases of every CUDA kernel (`bench.gpu.cases`) on the GPU that is here, or in the emulator of one."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.gpu.cases import MODULE
from bench.harness.worker import MOST_CHARACTERS, ROOT

MAX_PROCESSES = 8  # each compiles its kernels, and has a context on the GPU


def check_kernels(device: str, deadline_s: float, module: str = MODULE) -> dict[str, Any]:
    """Run the cases on a device, `cuda` or `cpu` for the emulator, in processes of their own.

    Returns `cases`, each with its `name`, `status` (`agrees`, `disagrees`, `not run`), `reason` and
    `error_of_tolerance`, and `reason`: why there are none or not all, None if there is no such reason. module: the one
    that has the CASES.
    """
    processes = min(MAX_PROCESSES, os.cpu_count() or 1) if device == "cuda" else 1
    until = time.monotonic() + deadline_s
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{index}.jsonl") for index in range(processes)]
        running = [
            subprocess.Popen(
                [*command_of(device, module), "--output", str(file), "--share", str(index), str(processes)],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            )
            for index, file in enumerate(files)
        ]  # fmt: skip
        try:
            said = [process.communicate(timeout=max(0.0, until - time.monotonic()))[0] for process in running]
        except subprocess.TimeoutExpired:
            return {"cases": _read(files), "reason": f"not done within {deadline_s:.0f} s"}
        finally:
            for process in running:
                process.kill()
                process.wait()
        found = _read(files)
    for process, words in zip(running, said, strict=True):
        if process.returncode not in (0, 1) or (process.returncode == 1 and not found):
            lines = " | ".join(line.strip() for line in words.splitlines() if line.strip())
            reason = f"the cases ended with {process.returncode}: {lines[-MOST_CHARACTERS:]}"
            return {"cases": found, "reason": reason}
    return {"cases": found, "reason": None if found else f"{module} has no cases"}


def command_of(device: str, module: str = MODULE) -> list[str]:
    """Return the command that runs the cases on a device, in one process."""
    return [sys.executable, "-m", MODULE, device, "--module", module]


def _read(files: list[Path]) -> list[dict[str, Any]]:
    """Read what the processes have appended so far; a line that is half written is left out."""
    lines = [line for file in files if file.exists() for line in file.read_text(encoding="utf-8").splitlines(True)]
    return [json.loads(line) for line in lines if line.endswith("\n")]
