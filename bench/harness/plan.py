"""The plan of a comparison: the model, the works that are timed, for how long, on how many threads, how often."""

import os
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from bench.harness.machine import checked_threads
from bench.harness.work import PHASES, Decode, Prefill, Work, phases_of
from bench.models.shape import Model, fitted, shape_of
from gpt.cli import UserError

ROUNDS = 5  # turns of each engine at each work


@dataclass(frozen=True)
class Plan:
    """A comparison of engines on one model. Raises UserError for a value that makes no sense.

    config: the model's. works: those to time. minutes: of timing; loading and checking come on top. together: a round
    has all works, so that their times may be compared with each other; otherwise a work has all of its rounds before
    the next one begins. seed: of the random ids. precision: the one that is compared. baseline: the label of the
    engine that speed-ups are relative to.
    """

    config: Model
    works: tuple[Work, ...]
    threads: int
    minutes: float = 0.75
    together: bool = False
    seed: int = field(default_factory=lambda: int.from_bytes(os.urandom(4)))
    precision: str = "fp32"
    baseline: str = "eager"

    def __post_init__(self) -> None:
        checked_threads(self.threads)
        if not self.minutes > 0:
            raise UserError(f"minutes={self.minutes}: must be more than 0")
        if self.seed < 0:
            raise UserError(f"seed={self.seed}: must be at least 0")

    @property
    def phases(self) -> tuple[str, ...]:
        """List the phases of the works, each once."""
        return tuple(dict.fromkeys(work.phase for work in self.works))

    @property
    def prompts(self) -> tuple[tuple[int, int], ...]:
        """List the shapes (B, T) of prefill, for which static engines need files."""
        return tuple((work.B, work.T) for work in self.works if work.phase == Prefill.phase)

    @property
    def always_checked(self) -> list[Work]:
        """List the works that are checked whatever is timed, of the phases that are timed; each once."""
        kinds = dict.fromkeys(type(work) for work in self.works)
        return list(dict.fromkeys(work for kind in kinds for work in kind.checked(self.config)))

    @property
    def to_check(self) -> list[Work]:
        """List the works that are checked whatever is timed, then those that are timed, each once."""
        return list(dict.fromkeys([*self.always_checked, *self.works]))

    def ids_of(self, work: Work) -> np.ndarray:
        """Draw the random ids of a work, int64 [B, ≥ context + T], always the same for one seed."""
        return work.ids(self.config, self.seed)


def works_of(
    config: Model, phases: Collection[str] = (), shapes: Collection[str] = (), contexts: Collection[int] = ()
) -> tuple[Work, ...]:
    """List the works to time of a model: of the phases asked for, by default of all that it has.

    shapes: `BxT` each, of prefill. contexts: numbers of tokens, of decode. By default each phase has its own.

    Raises UserError for a phase that the model has not, a shape or a context that it cannot take, or that belongs to a
    phase that is not asked for.
    """
    has = phases_of(config)
    if unknown := [name for name in phases if name not in has]:
        raise UserError(f"phase {unknown[0]!r}: must be one of {', '.join(has)} with this model")
    for given, phase, what in ((shapes, Prefill.phase, "shape"), (contexts, Decode.phase, "context")):
        if given and phase not in (phases or has):
            raise UserError(f"{what} {next(iter(given))}: is of {phase}, which is not among the phases compared")
    B = shape_of(config).fixed[0] or 1
    asked = {
        # The small shapes come first, so that a slow engine is known before the large ones.
        Prefill.phase: tuple(Prefill(*shape) for shape in sorted({parse_shape(text, config) for text in shapes})),
        Decode.phase: tuple(Decode(B, 1, _checked_context(context, config)) for context in contexts),
    }
    names = [name for name in has if name in (phases or has)]
    return tuple(work for name in names for work in asked.get(name) or PHASES[name].timed(config))


def parse_shape(text: str, config: Model) -> tuple[int, int]:
    """Read `BxT` as two numbers. Raises UserError unless B is at least 1 and T in 1 … block_size."""
    B, separator, T = text.partition("x")
    if not (separator and B.isdecimal() and T.isdecimal() and int(B) >= 1 and 1 <= int(T) <= config.block_size):
        raise UserError(f"shape {text!r}: must be BxT, as 1x64, with B at least 1 and T in 1 … {config.block_size}")
    shape = int(B), int(T)
    if fitted(config, [shape]) != [shape]:
        takes = "x".join(str(size or "any") for size in shape_of(config).fixed)
        raise UserError(f"shape {text!r}: the file's inputs are {takes}")
    return shape


def _checked_context(context: int, config: Model) -> int:
    if not 1 <= context < config.block_size:
        raise UserError(f"context {context}: must be in 1 … {config.block_size - 1}, so that a token fits behind it")
    return context
