"""Every engine that can run the model on a GPU, one a file; see `bench.backends`, whose kind of registry this is."""

import importlib
from collections.abc import Sequence
from dataclasses import replace

from bench.backends import Contender
from bench.backends import find_contenders as find_in
from bench.correctness.agreement import PRECISIONS

PHASES = ("first-token", "decode", "generate")  # of `bench.gpu.phases`, all of which an engine with a cache has
UNASKED = "it needs a module for each prompt, each compiled in some half a minute or more; --engine {} asks for it"
OURS, BASELINE = "tvm O3", "eager"  # labels


def find_contenders(asked: Sequence[str], target: str) -> list[Contender]:
    """Every variant of the engines asked for, or of all, with the files for a target. Raises UserError as there.

    A static engine that is not asked for is absent: to compile its modules would take the time of all others.
    """
    found = []
    for each in find_in(asked, PRECISIONS, __name__):
        files = tuple((phase, file.format(target=target)) for phase, file in each.files)
        unasked = UNASKED.format(each.engine) if each.static and not asked else None
        found.append(replace(each, files=files, absent=each.absent or unasked))
    return found


def takes_any_shape(contender: Contender) -> bool:
    """Whether a new shape costs the engine nothing; see `bench.gpu.engine`."""
    return importlib.import_module(f"{contender.package}.{contender.engine}").Engine.any_shape
