"""Compiles and runs the files of `foreign_files`, one after the other, and keeps what each came to."""

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
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


def run_cells(folder: Path, recipes: Iterable[Recipe], results: Path, *, import_only: bool = False) -> None:
    """Try files of a folder and add what each came to to the results. A worker that dies is an outcome too."""
    code = code_hash()
    worker: Worker | None = None
    tried = 0
    try:
        for recipe in progress_bar(list(recipes), desc="matrix", unit="cell"):
            path = folder / recipe.name
            if worker is None:
                worker, tried = Worker("bench.studies.matrix_cell:Cell", threads=1), 0
            try:
                found = worker.call("import_only" if import_only else "whole", str(path), deadline_s=DEADLINE_S)
                outcome = Outcome(**found)
                tried += 1
            except WorkerError as error:
                outcome = Outcome(CRASHED, str(error))
                tried = CELLS_A_WORKER
            result = Result(recipe.name, sha256_file(path), code, outcome)
            with results.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(asdict(result)) + "\n")
            if tried >= CELLS_A_WORKER:
                worker.close()
                worker = None
    finally:
        if worker is not None:
            worker.close()
