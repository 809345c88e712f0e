"""Defines the work that engines are asked to do, a class for each phase: its sizes, its calls, its check, its bound.

A prefill of a prompt is compute-bound as soon as some rows share a weight. A decode of one token over a KV cache reads
each weight for one row, so it is bound by reading. Generate does both, as a user meets them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from bench.correctness.agreement import (
    Agreement,
    Errors,
    compare_logits,
    compare_steps,
    compare_tokens,
    odd_shapes,
    random_ids,
)
from bench.correctness.rounding import Rounding
from bench.models.shape import Model, fitted, shape_of
from bench.report.format import shape_name
from bench.roofline.bounds import (
    Bound,
    Roofline,
    decode_bound,
    decode_bytes,
    generation_bound,
    prefill_bound,
    prefill_bytes,
)

CONTEXTS = (32, 128)  # tokens in the cache before a decode, if the model has room; the longest is added
STEPS = 8  # decodes, one after the other, that are checked
PROMPT, TOKENS = 8, 64  # of generate, if the model has room

Request = tuple[str, tuple[Any, ...]]  # a method of an engine and its arguments
Ask = Callable[..., np.ndarray]  # calls a method of an engine, which is named first


class Reference(Protocol):
    """A model that gives the right logits, float64."""

    def __call__(self, ids: np.ndarray, positions: Sequence[int] | None = None) -> np.ndarray:
        """Return the logits [B, S, V] of ids int64 [B, T] at S positions; by default at all, [B, T, V]."""


class References(Protocol):
    """The model as it is and as each engine rounds its weights, in float64, and the errors that are allowed."""

    def __call__(
        self, ids: np.ndarray, positions: Sequence[int] | None = None, rounding: Rounding | None = None
    ) -> np.ndarray:
        """Return the logits [B, S, V] of ids int64 [B, T] at S positions, of the model with its weights rounded."""

    def allowed(self, precision: str, rounding: Rounding | None = None) -> Errors:
        """Return the errors that an engine of a precision and a rounding may have."""


@dataclass(frozen=True)
class Work(ABC):
    """One work: B sequences compute T tokens each, after `context` tokens that came before.

    phase: the name of the class. unit: the word for what its times are of. title, about: of its section in a report.
    columns: of its table there, after the engine's name.
    """

    B: int
    T: int
    context: int = 0
    phase: ClassVar[str]
    unit: ClassVar[str]
    title: ClassVar[str]
    about: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]

    @classmethod
    @abstractmethod
    def timed(cls, config: Model) -> tuple["Work", ...]:
        """List the works that are timed of a model by default."""

    @classmethod
    def checked(cls, config: Model) -> tuple["Work", ...]:
        """List the works that are checked whatever is timed, at sizes that are no round numbers."""
        return ()

    @property
    @abstractmethod
    def name(self) -> str:
        """Return the name that tells the work from others of its phase."""

    @property
    def units_a_call(self) -> int:
        """Return the number of units in one call, by which its time is divided."""
        return 1

    @property
    def tells_speed(self) -> bool:
        """Return True if its time per token predicts that of other works of the phase."""
        return True

    def ids(self, config: Model, seed: int) -> np.ndarray:
        """Draw random ids, int64 [B, ≥ context + T], which depend on the seed and the work alone."""
        return random_ids(config, self.B, self.context + self.T, seed)

    def before(self, ids: np.ndarray) -> Request | None:
        """Return the request that prepares the timed calls, once; None if there is none."""
        return None

    @abstractmethod
    def call(self, ids: np.ndarray) -> Request:
        """Return the request that is timed, again and again."""

    @abstractmethod
    def check(self, ask: Ask, reference: Reference, ids: np.ndarray, allowed: Errors) -> Agreement:
        """Have an engine do the work, and compare the result with the reference in float64.

        allowed: the errors that it may have, by `bench.correctness.agreement.measure_allowed`.
        """

    @abstractmethod
    def bound(self, limits: Roofline, config: Model) -> Bound:
        """Compute the least time that a unit can take on a machine."""

    @abstractmethod
    def moved_bytes(self, config: Model, precision: str) -> int | None:
        """Count the bytes that a unit must read or write at least; None if that is not one number."""


class Prefill(Work):
    """Prefill of a prompt without a cache: its logits at all positions."""

    phase = "prefill"
    unit = "prefill"
    title = "Prefill: a prompt at once"
    about = "All tokens share each weight that is read, so arithmetic is the limit, but for the shortest."
    columns: ClassVar[tuple[str, ...]] = ("median", "spread", "× eager", "of limit", "error", "top-1")

    @classmethod
    def timed(cls, config: Model) -> tuple[Work, ...]:
        """List a short prompt, a longer one and a batch; no batch of a large model: it takes untuned code minutes."""
        shapes = [(1, max(1, config.block_size // 4)), (1, config.block_size), (8, config.block_size)]
        if config.block_size >= 512:
            shapes = [(1, 16), (1, 64), (1, 128)]
        return tuple(cls(*shape) for shape in fitted(config, shapes))

    @classmethod
    def checked(cls, config: Model) -> tuple[Work, ...]:
        return tuple(cls(*shape) for shape in odd_shapes(config))

    @property
    def name(self) -> str:
        return shape_name((self.B, self.T))

    @property
    def tells_speed(self) -> bool:
        return self.B * self.T > 1

    def call(self, ids: np.ndarray) -> Request:
        return "prefill", (ids,)

    def check(self, ask: Ask, reference: Reference, ids: np.ndarray, allowed: Errors) -> Agreement:
        return compare_logits(reference(ids), ask("prefill", ids), allowed)

    def bound(self, limits: Roofline, config: Model) -> Bound:
        return prefill_bound(limits, config, self.B, self.T)

    def moved_bytes(self, config: Model, precision: str) -> int:
        return prefill_bytes(config, self.B, self.T, precision)


class Decode(Work):
    """Decode of one token over a KV cache: its logits."""

    phase = "decode"
    unit = "token"
    title = "Decode: one token behind a KV cache"
    about = (
        "Every weight and all of the cache so far must be read for one token, so reading is the limit: the share of it "
        "is the share of the read bandwidth that was measured here."
    )
    columns: ClassVar[tuple[str, ...]] = ("ms/token", "spread", "× eager", "GB/s", "of limit", "error", "top-1")

    @classmethod
    def timed(cls, config: Model) -> tuple[Work, ...]:
        longest, B = config.block_size - 1, shape_of(config).fixed[0] or 1
        return tuple(cls(B, 1, context) for context in dict.fromkeys((*CONTEXTS, longest)) if 1 <= context <= longest)

    @classmethod
    def checked(cls, config: Model) -> tuple[Work, ...]:
        longest, fixed = config.block_size - 1, shape_of(config).fixed[0]
        return tuple(cls(fixed or B, 1, min(context, longest)) for B, context in ((1, 1), (3, 13)) if longest)

    @property
    def name(self) -> str:
        return f"context {self.context}" + (f", {self.B} sequences" if self.B > 1 else "")

    def ids(self, config: Model, seed: int) -> np.ndarray:
        """Draw random ids for the context and for the steps that are checked."""
        return random_ids(config, self.B, min(self.context + STEPS, config.block_size), seed)

    def before(self, ids: np.ndarray) -> Request:
        return "fill", (ids[:, : self.context],)

    def call(self, ids: np.ndarray) -> Request:
        return "decode", (ids[:, self.context : self.context + 1], self.context)

    def check(self, ask: Ask, reference: Reference, ids: np.ndarray, allowed: Errors) -> Agreement:
        """Compare the prompt's last logits, those of STEPS decodes after it, and those of the first decode again."""
        at = [*range(self.context, ids.shape[1]), self.context]
        steps = [ask("fill", ids[:, : self.context])]
        steps += [ask("decode", ids[:, position : position + 1], position) for position in at]
        return compare_steps(reference(ids, [self.context - 1, *at]), steps, allowed)

    def bound(self, limits: Roofline, config: Model) -> Bound:
        return decode_bound(limits, config, self.B, self.context)

    def moved_bytes(self, config: Model, precision: str) -> int:
        return decode_bytes(config, self.B, self.context, precision)


class Generate(Work):
    """Greedy generation after a short prompt: the prompt into the cache, then token by token."""

    phase = "generate"
    unit = "token"
    title = "Generate: tokens after a short prompt"
    about = "The prompt, then one decode a token, each waiting for the one before. The tokens are the likeliest ones."
    columns: ClassVar[tuple[str, ...]] = ("ms/token", "tok/s", "spread", "× eager", "of limit", "same tokens")

    @classmethod
    def timed(cls, config: Model) -> tuple[Work, ...]:
        prompt, B = min(PROMPT, config.block_size // 2), shape_of(config).fixed[0] or 1
        return (cls(B, min(TOKENS, config.block_size - prompt), prompt),) if prompt else ()

    @property
    def name(self) -> str:
        return f"{self.T} tokens after {self.context}"

    @property
    def units_a_call(self) -> int:
        return self.T

    def call(self, ids: np.ndarray) -> Request:
        return "generate", (ids[:, : self.context], self.T)

    def check(self, ask: Ask, reference: Reference, ids: np.ndarray, allowed: Errors) -> Agreement:
        """Compare each token with the reference's likeliest after the ones before it, which the engine itself chose."""
        prompt = ids[:, : self.context]
        tokens = ask("generate", prompt, self.T)  # [B, T]
        seen = np.concatenate([prompt, tokens[:, :-1]], axis=1)  # the tokens before each one
        return compare_tokens(reference(seen, range(self.context - 1, seen.shape[1])), tokens, allowed)

    def bound(self, limits: Roofline, config: Model) -> Bound:
        return generation_bound(limits, config, self.B, self.context, self.T)

    def moved_bytes(self, config: Model, precision: str) -> None:
        return None


PHASES: dict[str, type[Work]] = {each.phase: each for each in (Prefill, Decode, Generate)}


def phases_of(config: Model) -> tuple[str, ...]:
    """List the phases that a model has: one without keys and values, as a bigram, has no cache to decode with."""
    return tuple(PHASES) if shape_of(config).has_cache else (Prefill.phase,)
