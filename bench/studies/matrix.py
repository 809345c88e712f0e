"""Compiles and runs the files of `foreign_files`, one after the other, and keeps what each came to."""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from bench.harness.worker import Worker, WorkerError
from bench.studies.foreign_recipes import Recipe
from bench.studies.matrix_cell import CRASHED, Outcome
from gpt.files import cut_half_line, sha256_file
from gpt.progress import progress_bar

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 900
CELLS_A_WORKER = 40  # after which a new process takes over, as TVM keeps what it compiled


@dataclass(frozen=True)
class Result:
    """One line of the file of results: a file, the hashes of it and of the code, and what it came to."""

    name: str
    sha256: str
    code: str
    outcome: Outcome

    @classmethod
    def from_json(cls, line: str) -> "Result":
        """Read a line."""
        found: dict[str, Any] = json.loads(line)
        outcome = Outcome(**found.pop("outcome"))
        return cls(outcome=outcome, **found)


def code_hash() -> str:
    """Hash all code that a cell's outcome depends on."""
    files = [path for folder in ("tvm_frontend", "export") for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [ROOT / "bench/studies" / name for name in ("matrix_cell.py", "foreign_feeds.py")]
    lines = [f"{path.relative_to(ROOT)} {sha256_file(path)}" for path in sorted(files) if path.suffix != ".pyc"]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_results(path: Path) -> dict[str, Result]:
    """Read results, of each file the last."""
    if not path.exists():
        return {}
    cut_half_line(path)
    found = [Result.from_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {result.name: result for result in found}


def in_mixed_order(recipes: Iterable[Recipe]) -> list[Recipe]:
    """Order cells so that any first part of them has some of everything."""
    ordered = sorted(recipes, key=lambda recipe: recipe.name)
    random.Random(0).shuffle(ordered)
    return ordered


def cells_to_try(folder: Path, recipes: Iterable[Recipe], results: Mapping[str, Result]) -> list[Recipe]:
    """List the cells whose file or code is another than when they were tried last, or that were never tried."""
    code = code_hash()

    def is_known(recipe: Recipe) -> bool:
        known = results.get(recipe.name)
        return known is not None and known.code == code and known.sha256 == sha256_file(folder / recipe.name)

    return [recipe for recipe in in_mixed_order(recipes) if not is_known(recipe)]


def run_cells(
    folder: Path, recipes: Iterable[Recipe], results: Path, *, import_only: bool = False, workers: int = 1
) -> None:
    """Try files of a folder and add what each came to to the results, a line each. A worker that dies is an outcome."""
    code = code_hash()
    todo = list(recipes)
    rest = iter(todo)
    lock = Lock()
    with progress_bar(total=len(todo), desc="matrix", unit="cell") as bar, results.open("a", encoding="utf-8") as lines:

        def work() -> None:
            with _Cells("import_only" if import_only else "whole") as cells:
                while True:
                    with lock:
                        recipe = next(rest, None)
                    if recipe is None:
                        return
                    path = folder / recipe.name
                    result = Result(recipe.name, sha256_file(path), code, cells.outcome_of(path))
                    with lock:
                        lines.write(json.dumps(asdict(result)) + "\n")
                        lines.flush()
                        bar.update()

        with ThreadPoolExecutor(workers) as pool:
            for done in [pool.submit(work) for _ in range(workers)]:
                done.result()


class _Cells:
    """Tries files in a worker process; a new process takes over now and then, and after a fault."""

    def __init__(self, method: str) -> None:
        self._method = method
        self._worker: Worker | None = None
        self._tried = 0

    def __enter__(self) -> "_Cells":
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def outcome_of(self, path: Path) -> Outcome:
        """Try a file."""
        if self._worker is None:
            self._worker, self._tried = Worker("bench.studies.matrix_cell:Cell", threads=1), 0
        try:
            outcome = Outcome(**self._worker.call(self._method, str(path), deadline_s=DEADLINE_S))
        except WorkerError as error:
            self.__exit__()
            return Outcome(CRASHED, str(error))
        self._tried += 1
        if self._tried == CELLS_A_WORKER:
            self.__exit__()
        return outcome
