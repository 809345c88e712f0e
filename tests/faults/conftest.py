"""Commands whose file operations are disturbed: what the tests of kills and full disks share."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent


@dataclass(frozen=True)
class Ended:
    """How a command ended. code: negative for a signal. kinds: a letter for each of its operations, as in faults.c."""

    code: int
    out: str
    err: str
    kinds: str


Disturbed = Callable[..., Ended]


@pytest.fixture(scope="session")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disturbed]:
    """Run a command with one of its operations on files below a folder disturbed.

    Arguments: the module, its arguments, the folder; `number` of the operation, counted from 1, and 0 for none;
    `error`, an errno, or 0 for a kill; `patches` as (module, name, value), where None is a function that does nothing;
    `variables` of the environment.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler on PATH: install gcc")
    folder = tmp_path_factory.mktemp("faults")
    library = folder / "faults.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, HERE / "faults.c", "-ldl"], check=True
    )
    environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, HERE / "commands.py", library, folder]
    with subprocess.Popen(
        command, env=environment, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def run(
            module: str,
            arguments: list[str],
            folder: Path,
            *,
            number: int = 0,
            error: int = 0,
            patches: tuple[tuple[str, str, object], ...] = (),
            variables: dict[str, str] | None = None,
        ) -> Ended:
            request = {"module": module, "arguments": arguments, "folder": str(folder.resolve()), "number": number}
            request |= {"error": error, "patches": patches, "variables": variables or {}}
            assert process.stdin
            assert process.stdout
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return Ended(**json.loads(process.stdout.readline()))

        yield run
        process.stdin.close()
