"""Every engine that can run the model, one a file; the folder is the registry and the file's name the engine's name.

To add an engine, put a file here that defines a class `Engine(Backend)`. Nothing else names it.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import ClassVar

import numpy as np

from bench.correctness.loss import nats_of
from bench.harness.worker import OURS, Interpreter
from bench.models.artifacts import Artifacts
from gpt.cli import UserError
from gpt.config import GPTConfig


@dataclass(frozen=True)
class Variant:
    """A way to run an engine. files: the phases that it can do, with the file of `models.artifacts` that each needs.

    precision: of its products, a name in `bench.correctness.agreement.PRECISIONS`. requires: packages besides the
    engine's. about: what sets it apart. unable: why it cannot run anywhere, None if it can.
    """

    files: dict[str, str]
    precision: str = "fp32"
    requires: dict[str, str] = field(default_factory=dict)
    about: str = ""
    unable: str | None = None


class Backend(ABC):
    """One engine. Its file imports the packages in `requires` only inside methods, so that it can always be read.

    requires: the packages it needs, import name to the name to install it by. variants: ways to run it, each timed by
    itself (`""` is its plainest). summary: what it is, in a few words. static: whether its files are of one shape each,
    and made for those alone that are timed.

    An engine writes the methods that begin with an underscore: `_load` and `_prefill`, and for a KV cache `_fill` and
    `_decode`, or `_generate` and `_stream` if it has a loop of its own. Those are only called with what fits the
    model: the public ones look first, and raise UserError before any kernel runs. variant: the one that was loaded.
    """

    requires: ClassVar[dict[str, str]]
    summary: ClassVar[str]
    variants: ClassVar[dict[str, Variant]]
    static: ClassVar[bool] = False

    @classmethod
    def why_absent(cls) -> str | None:
        """Why it cannot run here though the packages in `requires` are there; None if it can."""
        return None

    @classmethod
    def interpreter(cls) -> Interpreter:
        """The Python that it runs in, of an engine that can run here."""
        return OURS

    def load(self, artifacts: Artifacts, config: GPTConfig, threads: int, variant: str) -> None:
        """Make ready to run on exactly `threads` threads. Called once, in a process of the engine's own."""
        self.config, self.variant = config, self.variants[variant]
        self._cached: tuple[int, int] = (0, 0)  # sequences and tokens that the cache holds
        self._load(artifacts, threads)

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Logits float32 [B, T, V] of ids int64 [B, T]; may be a view that the next call overwrites.

        Raises UserError for ids that the model cannot take.
        """
        self._check(ids)
        return self._prefill(ids)

    def fill(self, ids: np.ndarray) -> np.ndarray:
        """Empty the cache and put a prompt of ids int64 [B, T] in: logits float32 [B, V] of its last position.

        Raises UserError for ids that the model cannot take.
        """
        self._check(ids)
        self._cached = (0, 0)
        logits = self._fill(ids)
        self._cached = ids.shape
        return logits

    def decode(self, ids: np.ndarray, context: int) -> np.ndarray:
        """Logits float32 [B, V] of one more token, ids int64 [B, 1], behind the first `context` tokens in the cache.

        What the cache held from `context` on is overwritten, so a second call with the same arguments is the same
        work. Raises UserError for ids that the model cannot take, and unless 1 ≤ context ≤ what the cache holds.
        """
        self._check(ids, context)
        B, length = self._cached
        if ids.shape != (B, 1):
            raise UserError(
                f"ids of shape {list(ids.shape)}: must be [{B}, 1], one token for each sequence in the cache"
            )
        if not 1 <= context <= length:
            raise UserError(f"context={context}: the cache holds {length} tokens")
        logits = self._decode(ids, context)
        self._cached = (B, context + 1)
        return logits

    def generate(self, ids: np.ndarray, tokens: int) -> np.ndarray:
        """The likeliest `tokens` tokens after ids int64 [B, T], one after the other: int64 [B, tokens].

        Raises UserError for ids that the model cannot take, and unless all but the last token fit in block_size.
        """
        self._check_tokens(ids, tokens)
        return self._generate(ids, tokens)

    def stream(self, ids: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
        """The same one by one, int64 [B] each."""
        self._check_tokens(ids, tokens)
        yield from self._stream(ids, tokens)

    def loss(self, windows: np.ndarray) -> float:
        """Mean cross-entropy, in nats a token, of windows of a text, int64 [N, T + 1]: of each token but the first."""
        nats = [nats_of(self.prefill(window[None, :-1])[0], window[1:]) for window in windows]
        return float(np.mean(nats))

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Package name to version, of the packages that decide the speed."""

    @abstractmethod
    def _load(self, artifacts: Artifacts, threads: int) -> None:
        """See `load`. What only some phases need may wait until they are asked for."""

    @abstractmethod
    def _prefill(self, ids: np.ndarray) -> np.ndarray:
        """See `prefill`."""

    def _fill(self, ids: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _decode(self, ids: np.ndarray, context: int) -> np.ndarray:
        raise NotImplementedError

    def _generate(self, ids: np.ndarray, tokens: int) -> np.ndarray:
        return np.stack(list(self._stream(ids, tokens)), axis=1)

    def _stream(self, ids: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
        T = ids.shape[1]
        logits = self.fill(ids)  # [B, V]
        for context in range(T, T + tokens):
            likeliest = logits.argmax(-1)  # [B]
            yield likeliest
            if context < T + tokens - 1:
                logits = self.decode(likeliest[:, None], context)

    def _check_tokens(self, ids: np.ndarray, tokens: int) -> None:
        """Raise UserError unless some tokens fit behind a prompt that the model can take."""
        self._check(ids)
        room = self.config.block_size - ids.shape[1] + 1
        if not 1 <= tokens <= room:
            raise UserError(f"tokens={tokens}: must be 1 to {room} after a prompt of {ids.shape[1]}")

    def _check(self, ids: np.ndarray, context: int = 0) -> None:
        """Raise UserError unless ids are int64 [B, T], all in [0, V), that fit in block_size behind `context` tokens.

        One pass over them, as it is timed with every engine's calls.
        """
        V, block_size = self.config.vocab_size, self.config.block_size
        if ids.dtype != np.int64:
            raise UserError(f"ids of dtype {ids.dtype}: must be int64")
        if ids.ndim != 2 or not ids.size:
            raise UserError(f"ids of shape {list(ids.shape)}: must be [B, T], with at least one token")
        if ids.shape[1] + context > block_size:
            after = f" after {context} in the cache" if context else ""
            raise UserError(f"{ids.shape[1]} tokens{after}: the model takes at most block_size={block_size}")
        if int(ids.view(np.uint64).max()) >= V:  # a negative id seen as unsigned is very large
            bad = ids[(ids < 0) | (ids >= V)][0]
            raise UserError(f"token id {bad}: must be in 0 … {V - 1} (vocab_size={V})")


@dataclass(frozen=True)
class Candidate:
    """One engine in one variant: what a row of the results is about.

    precision: of its products, a name in `bench.correctness.agreement.PRECISIONS`. files: each phase that it can do,
    with the file that it needs for it. absent: why it cannot run here, or None. static, interpreter: as `Backend` has
    them. package: the registry that has it.
    """

    engine: str
    variant: str
    precision: str
    files: tuple[tuple[str, str], ...]
    summary: str
    absent: str | None = None
    static: bool = False
    interpreter: Interpreter = OURS
    package: str = __name__

    @property
    def label(self) -> str:
        """The engine's name with its variant: `tvm O3`."""
        return f"{self.engine} {self.variant}".strip()

    @property
    def factory(self) -> str:
        """Where a worker finds the engine's class."""
        return f"{self.package}.{self.engine}:Engine"

    @property
    def phases(self) -> tuple[str, ...]:
        """The names of the phases that it can do."""
        return tuple(phase for phase, _ in self.files)


def engine_names(package: str = __name__) -> list[str]:
    """The names of all engines, present or absent: the files of this folder, or of another that is such a registry."""
    return sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__))


def find_candidates(
    asked: Sequence[str] = (), precisions: Collection[str] = ("fp32",), package: str = __name__
) -> list[Candidate]:
    """Every variant of some precisions of every engine of a registry, or of the engines asked for.

    Raises UserError for a name that is no engine, and for an engine asked for that has no such variant or cannot run
    here.
    """
    known = engine_names(package)
    for name in asked:
        if name not in known:
            raise UserError(f"engine {name!r}: not known; known are {', '.join(known)}")
    found = []
    for name in asked or known:
        candidates = candidates_of(name, package)
        able = [candidate for candidate in candidates if candidate.precision in precisions]
        if asked and not able:
            has = dict.fromkeys(candidate.precision for candidate in candidates)
            raise UserError(f"engine {name!r} has no {' or '.join(precisions)}, only {', '.join(has)}")
        found += able
    refuse_absent(asked, found)
    return found


def refuse_absent(asked: Iterable[str], candidates: Collection[Candidate]) -> None:
    """Raise UserError for the first engine asked for of which no variant can run here."""
    for name in asked:
        reasons = [candidate.absent for candidate in candidates if candidate.engine == name]
        if reasons and all(reasons):
            raise UserError(f"engine {name!r} was asked for and is absent: {reasons[0]}")


def candidates_of(name: str, package: str = __name__) -> list[Candidate]:
    """All variants of one engine."""
    engine: type[Backend] = importlib.import_module(f"{package}.{name}").Engine
    found = []
    for label, variant in engine.variants.items():
        needed = engine.requires | variant.requires
        missing = [package for module, package in needed.items() if find_spec(module) is None]
        absent = f"not installed: pip install {' '.join(missing)}" if missing else variant.unable or engine.why_absent()
        summary = "; ".join(filter(None, [engine.summary, variant.about]))
        files = tuple(variant.files.items())
        interpreter = OURS if absent else engine.interpreter()
        found.append(
            Candidate(name, label, variant.precision, files, summary, absent, engine.static, interpreter, package)
        )
    return found
