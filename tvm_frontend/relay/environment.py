"""Finds Relay's environment, a folder of its own made by `make relay`, and what a process needs to run in it."""

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from gpt.cli import UserError
from gpt.files import atomic_output

FOLDER = Path(__file__).resolve().parents[2] / ".venv-relay"
WHEEL = "bitblas-0.1.0.post1"  # the wheel that `make relay` installs; others of bitblas have another TVM
TVM = "bitblas/3rdparty/tvm"
STUB = Path(__file__).with_name("libcuda.c")
DRIVER = "libcuda.so.1"
REMAKE = "remove it and run: make relay"


@dataclass(frozen=True)
class Environment:
    """Describes Relay's environment.

    folder: its folder, in which its processes also run, as TVM leaves a cache in the folder it is imported in. python:
    its Python. variables: the environment variables that a process of it needs, besides those of this one.
    """

    folder: Path
    python: Path
    variables: dict[str, str]


def why_absent() -> str | None:
    """Say why Relay cannot run here, or give None if it can."""
    found = _packages_or_why_not()
    return found if isinstance(found, str) else None


def _packages_or_why_not() -> Path | str:
    """Give the folder of the environment's packages, or say why Relay cannot run here."""
    if not FOLDER.exists():
        return f"no {FOLDER.name}, in which Relay runs: make relay"
    packages = _packages()
    if packages is None or not all((FOLDER / name).exists() for name in ("bin/python", "installed")):
        return f"{FOLDER} is incomplete: {REMAKE}"
    if not (packages / f"{WHEEL}.dist-info").is_dir() or not (packages / TVM / "python/tvm/relay").is_dir():
        found = ", ".join(sorted(path.name.removesuffix(".dist-info") for path in packages.glob("bitblas-*.dist-info")))
        return f"{FOLDER} has {found or 'no bitblas'}, and Relay is in {WHEEL}: {REMAKE}"
    return packages


def find_environment() -> Environment:
    """Find the environment, and make a stand-in for NVIDIA's driver if there is none. Raises UserError if absent."""
    packages = _packages_or_why_not()
    if isinstance(packages, str):
        raise UserError(f"--frontend relay: {packages}")
    libraries = [packages / "nvidia" / name / "lib" for name in ("cuda_nvrtc", "cuda_runtime")]
    if not _has_driver():
        libraries.append(_stand_in())
    variables = {
        "PYTHONPATH": str(packages / TVM / "python"),
        "TVM_LIBRARY_PATH": str(packages / TVM / "build"),
        "LD_LIBRARY_PATH": os.pathsep.join([*map(str, libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]),
        "TOPHUB_LOCATION": "NONE",  # else it downloads schedules that others tuned
    }
    return Environment(FOLDER, FOLDER / "bin" / "python", variables)


def _packages() -> Path | None:
    return next(FOLDER.glob("lib/python3*/site-packages"), None)


def _has_driver() -> bool:
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return False
    return True


def _stand_in() -> Path:
    """Compile, once, the library that stands in for NVIDIA's driver, and give its folder."""
    library = FOLDER / "stand-in" / DRIVER
    if not library.exists():
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        if compiler is None:
            raise UserError("no C compiler on PATH, and without NVIDIA's driver Relay needs one once: install gcc")
        with atomic_output(library) as part:
            subprocess.run([compiler, "-shared", "-fPIC", "-o", str(part), str(STUB)], check=True)
    return library.parent
