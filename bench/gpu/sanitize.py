"""python -m bench.gpu.sanitize                        # all four tools → docs/gpu/sanitizer.json and its table
python -m bench.gpu.sanitize --tool racecheck --minutes 5

Run every CUDA kernel's cases on the GPU that is here under NVIDIA's compute-sanitizer: accesses out of bounds
(memcheck), races in shared memory (racecheck), memory that is read before it is written (initcheck), barriers that not
all threads reach (synccheck). Kernels run much slower under it.
"""

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is one line too
    from gpt.cli import run_main

    run_main("bench.gpu.sanitize")

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import tyro

from bench.gpu.cases import MODULE
from bench.gpu.kernels import command_of
from bench.gpu.table import SANITIZER, write_table
from bench.harness.worker import MOST_CHARACTERS, ROOT
from gpt.cli import UserError
from gpt.files import atomic_output, hold_output
from tvm_frontend.cuda_toolchain import find_tool, gpu_arch

Tool = Literal["memcheck", "racecheck", "initcheck", "synccheck"]
Status = Literal["clean", "errors", "not run"]
FOUND = 86  # the exit code of compute-sanitizer if it found something, which is none of the cases' own
MARK = "========="  # the prefix of compute-sanitizer's own lines


@dataclass(frozen=True)
class Finding:
    """The result of one tool. status: `clean`, `errors`, or `not run`, also if cases failed for another reason.

    said: the last lines that it printed, or why it was not run. seconds: the time that it took.
    """

    tool: Tool
    status: Status
    said: str
    seconds: float


def sanitize(tool: Tool, deadline_s: float, module: str = MODULE) -> Finding:
    """Run the kernels' cases, those of `module`, under a tool. Raises UserError without compute-sanitizer."""
    watched = [str(find_tool("compute-sanitizer")), "--tool", tool, "--target-processes", "all"]
    start = time.monotonic()
    with subprocess.Popen(
        [*watched, "--error-exitcode", str(FOUND), *command_of("cuda", module)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that all processes of its group can be killed
    ) as process:
        try:
            output, _ = process.communicate(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            return Finding(tool, "not run", f"not done within {deadline_s:.0f} s", deadline_s)
        finally:
            if process.poll() is None:  # it is late, or Ctrl-C came, which reaches this process alone
                os.killpg(process.pid, signal.SIGKILL)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    own = [line.removeprefix(MARK).strip() for line in lines if line.startswith(MARK)]
    statuses: dict[int, Status] = {0: "clean", FOUND: "errors"}
    status = statuses.get(process.returncode, "not run")
    said = own if status != "not run" else [f"it ended with {process.returncode}:", *lines]
    return Finding(tool, status, " | ".join(said[-3:])[-MOST_CHARACTERS:], time.monotonic() - start)


def sanitize_command(
    tool: tyro.conf.UseAppendAction[tuple[Tool, ...]] = (),
    minutes: float = 9.0,
    output: Path = Path("docs/gpu"),
) -> None:
    """Run every CUDA kernel's cases on the GPU that is here under NVIDIA's compute-sanitizer.

    Args:
        tool: only this one; may be given again
        minutes: for all of it
        output: the folder to write, that of python -m bench.gpu
    """
    if not minutes > 0:
        raise UserError(f"minutes={minutes}: must be more than 0")
    if gpu_arch() is None:
        raise UserError("no NVIDIA driver with a GPU on this machine: run it where there is one")
    find_tool("compute-sanitizer")
    until, found = time.monotonic() + 60 * minutes, []
    with hold_output(output):
        for each in tool or get_args(Tool):
            print(f"the kernels under {each}", file=sys.stderr, flush=True)
            found.append(sanitize(each, max(1.0, until - time.monotonic())))
            with atomic_output(output / SANITIZER) as part:
                part.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", encoding="utf-8")
            print(f"{each}: {found[-1].status}: {found[-1].said}")
        print(f"wrote {write_table(output)}")
    if any(each.status == "errors" for each in found):
        sys.exit(1)


def main() -> None:
    """The command line. Exits with 1 if a tool found something."""
    tyro.cli(sanitize_command, prog="python -m bench.gpu.sanitize")
