"""Registry of the engines that can run the model: each file of this folder is one, and its name is the engine's name.

To add an engine, put a file here that defines a class `Engine(Backend[Artifacts])`. No list has to be extended.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import ClassVar, Generic, TypeVar

import numpy as np

from bench.correctness.loss import nats_of
from bench.correctness.rounding import Rounding
from bench.harness.worker import OURS, Interpreter
from bench.models.artifacts import Artifacts
from bench.models.shape import Model
from gpt.cli import UserError
from gpt.config import GPTConfig

ArtifactsT = TypeVar("ArtifactsT", bound=Artifacts)


@dataclass(frozen=True)
class Variant:
    """A way to run an engine, such as a precision or an optimisation level.

    files: maps each phase that it supports to the file of `models.artifacts` that it needs. precision: that of the
    matrix products, a name in `bench.correctness.agreement.PRECISIONS`. requires: packages beyond the engine's. about:
    its difference from the other variants. unable: the reason why it cannot run on any machine, None if it can.
    rounding: what it rounds; needed in int8 and int4, and None in others.
    """

    files: dict[str, str]
    precision: str = "fp32"
    requires: dict[str, str] = field(default_factory=dict)
    about: str = ""
    unable: str | None = None
    rounding: Rounding | None = None


class Backend(ABC, Generic[ArtifactsT]):
    """Base class of an engine, which runs one kind of artifacts.

    Its file imports the packages in `requires` only inside methods, so that it can be imported where they are absent.
    requires: maps the import name of each package to the name to install it by. variants: the ways to run the engine,
    each timed separately (`""` is the default one). summary: a short description. static: True if each of its files
    holds one shape and is built for the timed shapes alone.

    A subclass implements `_load` and `_prefill`, and for a KV cache `_fill` and `_decode`, or `_generate` and `_stream`
    if it has a generation loop of its own. The public methods check the ids and raise UserError before any kernel runs,
    so the implementations only see valid input. variant: the variant that was loaded.
    """

    requires: ClassVar[dict[str, str]]
    summary: ClassVar[str]
    variants: ClassVar[dict[str, Variant]]
    static: ClassVar[bool] = False

    @classmethod
    def why_absent(cls) -> str | None:
        """Return why the engine cannot run although the packages in `requires` are installed, or None if it can."""
        return None

    @classmethod
    def interpreter(cls) -> Interpreter:
        """Return the Python interpreter to run it in. Only called if it can run here."""
        return OURS

    def load(self, artifacts: ArtifactsT, config: Model, threads: int, variant: str) -> None:
        """Prepare to run on exactly `threads` threads. Called once, in the engine's own process."""
        self.config, self.variant = config, self.variants[variant]
        self._cached: tuple[int, int] = (0, 0)  # (sequences, tokens) in the KV cache
        self._load(artifacts, threads)

    @property
    def gpt(self) -> GPTConfig:
        """The shape of a GPT of this project, for what makes its cache. Raises UserError for another model."""
        if not isinstance(self.config, GPTConfig):
            raise UserError("the model is somebody's ONNX file, and this needs one of this project")
        return self.config

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Compute logits float32 [B, T, V] of ids int64 [B, T]; may return a view that the next call overwrites.

        Raises UserError for ids that the model cannot take.
        """
        self._check(ids)
        return self._prefill(ids)

    def fill(self, ids: np.ndarray) -> np.ndarray:
        """Reset the cache, fill it with a prompt of ids int64 [B, T] and return its last logits, float32 [B, V].

        Raises UserError for ids that the model cannot take.
        """
        self._check(ids)
        self._cached = (0, 0)
        logits = self._fill(ids)
        self._cached = ids.shape
        return logits

    def decode(self, ids: np.ndarray, context: int) -> np.ndarray:
        """Compute logits float32 [B, V] of one more token, ids int64 [B, 1], after `context` tokens of the cache.

        The cache is overwritten from position `context` on, so a second call with the same arguments does the same
        work. Raises UserError for ids that the model cannot take, and unless 1 ≤ context ≤ tokens in the cache.
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
        """Generate `tokens` tokens greedily after a prompt of ids int64 [B, T]: int64 [B, tokens].

        Raises UserError for ids that the model cannot take, and unless all but the last token fit in block_size.
        """
        self._check_tokens(ids, tokens)
        return self._generate(ids, tokens)

    def stream(self, ids: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
        """Yield the tokens of `generate` one at a time, int64 [B] each."""
        self._check_tokens(ids, tokens)
        yield from self._stream(ids, tokens)

    def loss(self, windows: np.ndarray) -> float:
        """Compute the mean cross-entropy, in nats per token, over windows of a text, int64 [N, T + 1]."""
        nats = [nats_of(self.prefill(window[None, :-1])[0], window[1:]) for window in windows]
        return float(np.mean(nats))

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Map each package that decides the speed to its version."""

    @abstractmethod
    def _load(self, artifacts: ArtifactsT, threads: int) -> None:
        """Implement `load`. Files that only some phases need may be loaded at their first use."""

    @abstractmethod
    def _prefill(self, ids: np.ndarray) -> np.ndarray:
        """Implement `prefill`."""

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
        """Raise UserError unless the prompt is valid and all new tokens but the last fit in block_size after it."""
        self._check(ids)
        room = self.config.block_size - ids.shape[1] + 1
        if not 1 <= tokens <= room:
            raise UserError(f"tokens={tokens}: must be 1 to {room} after a prompt of {ids.shape[1]}")

    def _check(self, ids: np.ndarray, context: int = 0) -> None:
        """Raise UserError unless ids are int64 [B, T] in [0, V) and fit in block_size after `context` tokens.

        The check is timed with every engine's calls, so it makes a single pass over the ids.
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


def in_float32(logits: np.ndarray) -> np.ndarray:
    """Return the logits of a file that gives them in another type as float32; others as they are."""
    return logits.astype(np.float32, copy=False)


@dataclass(frozen=True)
class Candidate:
    """One engine in one variant, the subject of a row of the results.

    precision: that of the matrix products, a name in `bench.correctness.agreement.PRECISIONS`. files: pairs of a phase
    that it supports and the file that it needs for it. absent: the reason why it cannot run here, or None. static,
    interpreter: as in `Backend`. package: the registry that lists it. rounding: as in `Variant`.
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
    rounding: Rounding | None = None

    @property
    def label(self) -> str:
        """Join the engine's name and its variant: `tvm O3`."""
        return f"{self.engine} {self.variant}".strip()

    @property
    def factory(self) -> str:
        """Return `module:Class` of the engine, for a worker to import."""
        return f"{self.package}.{self.engine}:Engine"

    @property
    def phases(self) -> tuple[str, ...]:
        """List the names of the phases that it supports."""
        return tuple(phase for phase, _ in self.files)


def engine_names(package: str = __name__) -> list[str]:
    """List the names of all engines, installed or not: the files of this folder, or of another registry."""
    return sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__))


def find_candidates(
    asked: Sequence[str] = (), precisions: Collection[str] = ("fp32",), package: str = __name__
) -> list[Candidate]:
    """List every variant of some precisions of every engine of a registry, or of the engines asked for.

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
    """Raise UserError for the first engine asked for that cannot run here in any variant."""
    for name in asked:
        reasons = [candidate.absent for candidate in candidates if candidate.engine == name]
        if reasons and all(reasons):
            raise UserError(f"engine {name!r} was asked for and is absent: {reasons[0]}")


def candidates_of(name: str, package: str = __name__) -> list[Candidate]:
    """List all variants of one engine."""
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
            Candidate(
                name,
                label,
                variant.precision,
                files,
                summary,
                absent,
                engine.static,
                interpreter,
                package,
                variant.rounding,
            )
        )
    return found
