"""The registry of engines on a GPU: every file of this folder is one, as in `bench.backends`."""

import importlib
from collections.abc import Sequence
from dataclasses import replace

from bench.backends import Candidate
from bench.backends import find_candidates as find_in
from bench.correctness.agreement import PRECISIONS

UNASKED = "it needs a module for each prompt, each compiled in some half a minute or more; --engine {} asks for it"
OURS, BASELINE = "tvm O3", "eager"  # labels of candidates


def find_candidates(asked: Sequence[str], target: str) -> list[Candidate]:
    """List every variant of the engines asked for, or of all, with the files for a target.

    A static engine that is not asked for is absent: to compile its modules would take the time of all others. Raises
    UserError as `bench.backends.find_candidates` does.
    """
    found = []
    for each in find_in(asked, PRECISIONS, __name__):
        files = tuple((phase, file.format(target=target)) for phase, file in each.files)
        unasked = UNASKED.format(each.engine) if each.static and not asked else None
        found.append(replace(each, files=files, absent=each.absent or unasked))
    return found


def takes_any_shape(candidate: Candidate) -> bool:
    """Return True if a new shape costs the engine nothing; see `bench.gpu.engine`."""
    return importlib.import_module(f"{candidate.package}.{candidate.engine}").Engine.any_shape
