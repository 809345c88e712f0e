"""Every CUDA kernel of this project on the GPU that is here, against float64: the cases of its tests, as they stand.

The tests run each kernel in a model of a GPU's threads, and where there is a GPU on that too.
"""

import math
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.harness.worker import MOST_CHARACTERS, ROOT

CASES = ROOT / "tests" / "tvm_frontend" / "kernels" / "cuda"
ON = {"cuda": "on_gpu", "cpu": "emulated"}  # a device, and the word for it in the tests' names
NO_CASES = "{}: not there; run it in a checkout, which has the tests"
MOST_PROCESSES = 8  # each compiles its kernels, and has a context on the GPU
ERROR = "error_of_tolerance"  # what a test records: its largest error over what rounding explains


def check_kernels(device: str, deadline_s: float, cases: Path = CASES) -> dict[str, Any]:
    """Run the cases on a device: `cases`, each with its `name`, `status` (`agrees`, `disagrees`, `not run`), `reason`
    and `error_of_tolerance`, and `reason`, why there are none or not all; None if there is no such reason.
    """
    if not cases.is_dir():
        return {"cases": [], "reason": NO_CASES.format(cases)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cases.xml"
        command = [*command_of(device, cases), f"--junitxml={file}"]
        if find_spec("xdist") and device == "cuda":
            command += ["-n", str(min(MOST_PROCESSES, os.cpu_count() or 1))]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=deadline_s)
        except subprocess.TimeoutExpired:
            return {"cases": [], "reason": f"not done within {deadline_s:.0f} s"}
        found = read_cases(file) if file.exists() else []
    if done.returncode in (0, 1) and found:
        return {"cases": found, "reason": None}
    said = " | ".join(line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip())
    return {"cases": found, "reason": f"pytest ended with {done.returncode}: {said[-MOST_CHARACTERS:]}"}


def command_of(device: str, cases: Path) -> list[str]:
    """The command that runs the cases on a device, in one process."""
    command = [sys.executable, "-m", "pytest", str(cases), "-q", "-p", "no:cacheprovider", "-k", ON[device]]
    return [*command, "-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]


def read_cases(file: Path) -> list[dict[str, Any]]:
    """The cases in what pytest wrote by --junitxml."""
    found = []
    for case in ElementTree.parse(file).iter("testcase"):
        errors = [float(each.get("value")) for each in case.iter("property") if each.get("name") == ERROR]
        errors = errors if all(map(math.isfinite, errors)) else []  # a case with NaN fails, which is said below
        status, reason = "agrees", None
        for tag, meaning in (("failure", "disagrees"), ("error", "disagrees"), ("skipped", "not run")):
            if (node := case.find(tag)) is not None:
                status, reason = meaning, (node.get("message") or "").split("\n")[0][:MOST_CHARACTERS]
        found.append(
            {
                "name": f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name')}",
                "status": status,
                "reason": reason,
                ERROR: max(errors, default=None),
            }
        )
    return found
