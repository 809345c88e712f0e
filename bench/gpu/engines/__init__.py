"""The registry of engines on a GPU: every file of this folder is one, as in `bench.backends`."""

import importlib
from collections.abc import Sequence
from dataclasses import replace

from bench.backends import Contender
from bench.backends import find_contenders as find_in
from bench.correctness.agreement import PRECISIONS

UNASKED = "it needs a module for each prompt, each compiled in some half a minute or more; --engine {} asks for it"
OURS, BASELINE = "tvm O3", "eager"  # labels of contenders


def find_contenders(asked: Sequence[str], target: str) -> list[Contender]:
    """List every variant of the engines asked for, or of all, with the files for a target.

    A static engine that is not asked for is absent: to compile its modules would take the time of all others. Raises
    UserError as `bench.backends.find_contenders` does.
    """
    found = []
    for each in find_in(asked, PRECISIONS, __name__):
        files = tuple((phase, file.format(target=target)) for phase, file in each.files)
        unasked = UNASKED.format(each.engine) if each.static and not asked else None
        found.append(replace(each, files=files, absent=each.absent or unasked))
    return found


def takes_any_shape(contender: Contender) -> bool:
    """Return True if a new shape costs the engine nothing; see `bench.gpu.engine`."""
    return importlib.import_module(f"{contender.package}.{contender.engine}").Engine.any_shape
