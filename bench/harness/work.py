"""What engines are asked to do, a phase a class: at which sizes, by which calls, what is right, and what limits it.

Prefill is a prompt: arithmetic limits it as soon as some rows share a weight. Decode is one token behind a KV cache:
each weight is read for one row, so reading limits it. Generate is both, as a user meets them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from bench.correctness.agreement import Agreement, compare_logits, compare_steps, compare_tokens, odd_shapes, random_ids
from bench.report.format import shape_name
from bench.roofline.bounds import (
    Bound,
    Limits,
    decode_bound,
    decode_bytes,
    generation_bound,
    prefill_bound,
    prefill_bytes,
)
from gpt.config import GPTConfig

CONTEXTS = (32, 128)  # of decode, where they fit; and the longest there is
STEPS = 8  # of decode, one behind the other, are checked
PROMPT, TOKENS = 8, 64  # of generate, where they fit

Request = tuple[str, tuple]  # a method of an engine and its arguments
Ask = Callable[..., np.ndarray]  # has an engine do a request


class Reference(Protocol):
    """A model that gives the right logits, float64."""

    def __call__(self, ids: np.ndarray, positions: Sequence[int] | None = None) -> np.ndarray:
        """Return the logits [B, S, V] of ids int64 [B, T] at S positions; by default at all, [B, T, V]."""


@dataclass(frozen=True)
class Work(ABC):
    """One piece of work: B sequences compute T tokens each, behind `context` tokens that came before.

    phase: its name. unit: what a time is of. title: of its section in a report. about: what limits it, for readers.
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
    def timed(cls, config: GPTConfig) -> tuple["Work", ...]:
        """What is timed of a model, if nobody asks for something else."""

    @classmethod
    def checked(cls, config: GPTConfig) -> tuple["Work", ...]:
        """What is checked whatever is timed: sizes that are no round numbers."""
        return ()

    @property
    @abstractmethod
    def name(self) -> str:
        """What tells it from other work of its phase."""

    @property
    def units_a_call(self) -> int:
        """How many units one call is: its time is divided by them."""
        return 1

    @property
    def tells_speed(self) -> bool:
        """Whether its time a token says how long other work of the phase will take."""
        return True

    def ids(self, config: GPTConfig, seed: int) -> np.ndarray:
        """Random ids int64 [B, ≥ context + T] that depend on the seed and the work alone."""
        return random_ids(config, self.B, self.context + self.T, seed)

    def before(self, ids: np.ndarray) -> Request | None:
        """What an engine must have done before the clock starts, once."""
        return None

    @abstractmethod
    def call(self, ids: np.ndarray) -> Request:
        """What is timed, again and again."""

    @abstractmethod
    def check(self, ask: Ask, reference: Reference, ids: np.ndarray, tolerance: float) -> Agreement:
        """Have an engine do it and compare with the plain forward in float64."""

    @abstractmethod
    def bound(self, limits: Limits, config: GPTConfig) -> Bound:
        """The least time that a unit can take on a machine."""

    @abstractmethod
    def moved_bytes(self, config: GPTConfig, precision: str) -> int | None:
        """Bytes that a unit must read or write at least; None if that is not one number."""


class Prefill(Work):
    """The logits of a prompt at all its positions."""

    phase = "prefill"
    unit = "prefill"
    title = "Prefill: a prompt at once"
    about = "All tokens share each weight that is read, so arithmetic is the limit, but for the shortest."
    columns = ("median", "spread", "× eager", "of limit", "error", "top-1")

    @classmethod
    def timed(cls, config: GPTConfig) -> tuple[Work, ...]:
        """A short prompt, a longer one and a batch; for large models, which untuned code runs in minutes, no batch."""
        if config.block_size >= 512:
            return cls(1, 16), cls(1, 64), cls(1, 128)
        return cls(1, max(1, config.block_size // 4)), cls(1, config.block_size), cls(8, config.block_size)

    @classmethod
    def checked(cls, config: GPTConfig) -> tuple[Work, ...]:
        return tuple(cls(*shape) for shape in odd_shapes(config))

    @property
    def name(self) -> str:
        return shape_name((self.B, self.T))

    @property
    def tells_speed(self) -> bool:
        return self.B * self.T > 1

    def call(self, ids: np.ndarray) -> Request:
        return "prefill", (ids,)

    def check(self, ask: Ask, reference: Reference, ids: np.ndarray, tolerance: float) -> Agreement:
        return compare_logits(reference(ids), ask("prefill", ids), tolerance)

    def bound(self, limits: Limits, config: GPTConfig) -> Bound:
        return prefill_bound(limits, config, self.B, self.T)

    def moved_bytes(self, config: GPTConfig, precision: str) -> int:
        return prefill_bytes(config, self.B, self.T, precision)


class Decode(Work):
    """The logits of one token behind a KV cache."""

    phase = "decode"
    unit = "token"
    title = "Decode: one token behind a KV cache"
    about = (
        "Every weight and all of the cache so far must be read for one token, so reading is the limit: the share of it "
        "is the share of the read bandwidth that was measured here."
    )
    columns = ("ms/token", "spread", "× eager", "GB/s", "of limit", "error", "top-1")

    @classmethod
    def timed(cls, config: GPTConfig) -> tuple[Work, ...]:
        longest = config.block_size - 1
        return tuple(cls(1, 1, context) for context in dict.fromkeys((*CONTEXTS, longest)) if 1 <= context <= longest)

    @classmethod
    def checked(cls, config: GPTConfig) -> tuple[Work, ...]:
        longest = config.block_size - 1
        return tuple(cls(B, 1, min(context, longest)) for B, context in ((1, 1), (3, 13)) if longest)

    @property
    def name(self) -> str:
        return f"context {self.context}" + (f", {self.B} sequences" if self.B > 1 else "")

    def ids(self, config: GPTConfig, seed: int) -> np.ndarray:
        """As many as are checked."""
        return random_ids(config, self.B, min(self.context + STEPS, config.block_size), seed)

    def before(self, ids: np.ndarray) -> Request:
        return "fill", (ids[:, : self.context],)

    def call(self, ids: np.ndarray) -> Request:
        return "decode", (ids[:, self.context : self.context + 1], self.context)

    def check(self, ask: Ask, reference: Reference, ids: np.ndarray, tolerance: float) -> Agreement:
        """The prompt's last logits, those of some steps behind it, and the first step's over again."""
        at = [*range(self.context, ids.shape[1]), self.context]
        steps = [ask("fill", ids[:, : self.context])]
        steps += [ask("decode", ids[:, position : position + 1], position) for position in at]
        return compare_steps(reference(ids, [self.context - 1, *at]), steps, tolerance)

    def bound(self, limits: Limits, config: GPTConfig) -> Bound:
        return decode_bound(limits, config, self.B, self.context)

    def moved_bytes(self, config: GPTConfig, precision: str) -> int:
        return decode_bytes(config, self.B, self.context, precision)


class Generate(Work):
    """The likeliest tokens after a short prompt: the prompt into the cache, then token by token."""

    phase = "generate"
    unit = "token"
    title = "Generate: tokens after a short prompt"
    about = "The prompt, then one decode a token, each waiting for the one before. The tokens are the likeliest ones."
    columns = ("ms/token", "tok/s", "spread", "× eager", "of limit", "same tokens")

    @classmethod
    def timed(cls, config: GPTConfig) -> tuple[Work, ...]:
        prompt = min(PROMPT, config.block_size // 2)
        return (cls(1, min(TOKENS, config.block_size - prompt), prompt),) if prompt else ()

    @property
    def name(self) -> str:
        return f"{self.T} tokens after {self.context}"

    @property
    def units_a_call(self) -> int:
        return self.T

    def call(self, ids: np.ndarray) -> Request:
        return "generate", (ids[:, : self.context], self.T)

    def check(self, ask: Ask, reference: Reference, ids: np.ndarray, tolerance: float) -> Agreement:
        """Each token is the reference's likeliest after those before it, which the engine itself chose."""
        prompt = ids[:, : self.context]
        tokens = ask("generate", prompt, self.T)  # [B, T]
        seen = np.concatenate([prompt, tokens[:, :-1]], axis=1)  # what each token was chosen after
        return compare_tokens(reference(seen, range(self.context - 1, seen.shape[1])), tokens, tolerance)

    def bound(self, limits: Limits, config: GPTConfig) -> Bound:
        return generation_bound(limits, config, self.B, self.context, self.T)

    def moved_bytes(self, config: GPTConfig, precision: str) -> None:
        return None


PHASES: dict[str, type[Work]] = {each.phase: each for each in (Prefill, Decode, Generate)}


def phases_of(config: GPTConfig) -> tuple[str, ...]:
    """The phases that a model has: a bigram keeps no keys and values, so it has no cache to decode with."""
    return (Prefill.phase,) if config.model == "bigram" else tuple(PHASES)
