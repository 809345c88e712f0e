"""Every engine that can run the model, one a file; the folder is the registry and the file's name the engine's name.

To add an engine, put a file here that defines a class `Engine(Backend)`. Nothing else names it.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

import numpy as np

from bench.artifacts import Artifacts
from gpt.cli import UserError


class Backend(ABC):
    """One engine. Its file imports the packages in `requires` only inside methods, so that it can always be read.

    requires: the packages it needs, import name to the name to install it by. variants: ways to run it, each timed by
    itself; `""` if there is one. stage: the last stage of the artifacts that it needs: `checkpoint`, `exported` or
    `compiled`. dtype: of its arithmetic. summary: what it is, in a few words.
    """

    requires: ClassVar[dict[str, str]]
    summary: ClassVar[str]
    variants: ClassVar[tuple[str, ...]] = ("",)
    stage: ClassVar[str] = "checkpoint"
    dtype: ClassVar[str] = "float32"

    @abstractmethod
    def load(self, artifacts: Artifacts, threads: int, variant: str) -> None:
        """Make ready to run on exactly `threads` threads. Called once, in a process of the engine's own."""

    @abstractmethod
    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Logits float32 [B, T, V] of ids int64 [B, T]; may be a view that the next call overwrites."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Package name to version, of the packages that decide the speed."""


@dataclass(frozen=True)
class Contender:
    """One engine in one variant: what a row of the results is about. missing: the absent packages, if any."""

    engine: str
    variant: str
    dtype: str
    stage: str
    summary: str
    missing: tuple[str, ...]

    @property
    def label(self) -> str:
        """The engine's name with its variant: `tvm O3`."""
        return f"{self.engine} {self.variant}".strip()

    @property
    def factory(self) -> str:
        """Where a worker finds the engine's class."""
        return f"{__name__}.{self.engine}:Engine"

    @property
    def reason_missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if not self.missing:
            return None
        return f"not installed: pip install {' '.join(self.missing)}"


def engine_names() -> list[str]:
    """The names of all engines, present or absent: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find_contenders(asked: Sequence[str] = ()) -> list[Contender]:
    """Every variant of every engine, or of the engines asked for; an absent one has its `missing` packages.

    Raises UserError for a name that is no engine, and for an engine asked for whose packages are absent.
    """
    known = engine_names()
    for name in asked:
        if name not in known:
            raise UserError(f"engine {name!r}: not known; known are {', '.join(known)}")
    found = [contender for name in known if not asked or name in asked for contender in _contenders_of(name)]
    for contender in found:
        if asked and contender.missing:
            raise UserError(f"engine {contender.engine!r} was asked for and is {contender.reason_missing}")
    return found


def _contenders_of(name: str) -> list[Contender]:
    engine: type[Backend] = importlib.import_module(f"{__name__}.{name}").Engine
    missing = tuple(package for module, package in engine.requires.items() if find_spec(module) is None)
    return [
        Contender(name, variant, engine.dtype, engine.stage, engine.summary, missing) for variant in engine.variants
    ]
