"""Defines the work of engines on a GPU: the first token after a prompt, the next one over a cache, and many."""

import numpy as np

from bench.correctness.agreement import Agreement, Errors, compare_steps
from bench.harness.work import Ask, Decode, Generate, Reference, Request, Work
from bench.models.shape import Model, shape_of
from bench.report.format import shape_name
from bench.roofline.bounds import CACHE_BYTES, Bound, Roofline, first_token_bound, weight_bytes

BATCHES, PROMPTS, CONTEXTS = (1, 8), (128, 1024), (128, 1000)  # those timed; a short model has shorter ones
PROMPT, TOKENS = 128, 64  # of generate; a short model has fewer
CHECKED_BATCHES, CHECKED_PROMPT = (1, 3), 17


class FirstToken(Work):
    """Prefill of a prompt into the emptied cache, with the logits of its last position, which the first token needs."""

    phase = "first-token"
    unit = "prompt"
    title = "First token: a prompt into the cache"
    about = "Arithmetic is the limit as soon as some hundred tokens share each weight."
    columns = ()

    @classmethod
    def timed(cls, config: Model) -> tuple[Work, ...]:
        """List prompts of two lengths, alone and in a batch; a model too short for one has its own longest instead."""
        prompts = dict.fromkeys(min(T, config.block_size) for T in PROMPTS)
        return tuple(cls(B, T) for B in BATCHES for T in prompts)

    @classmethod
    def checked(cls, config: Model) -> tuple[Work, ...]:
        """List prompts of one token, no round number, the longest; alone and three at a time."""
        prompts = dict.fromkeys((1, min(CHECKED_PROMPT, config.block_size), config.block_size))
        return tuple(cls(B, T) for B in CHECKED_BATCHES for T in prompts)

    @property
    def name(self) -> str:
        return shape_name((self.B, self.T))

    def call(self, ids: np.ndarray) -> Request:
        return "fill", (ids,)

    def check(self, ask: Ask, reference: Reference, ids: np.ndarray, allowed: Errors) -> Agreement:
        return compare_steps(reference(ids, [self.T - 1]), [ask("fill", ids)], allowed)

    def bound(self, limits: Roofline, config: Model) -> Bound:
        return first_token_bound(limits, config, self.B, self.T)

    def moved_bytes(self, config: Model, precision: str) -> int:
        """Count the bytes of weights read, and of keys and values written."""
        element_bytes, _ = CACHE_BYTES[precision]
        return weight_bytes(config, precision) + 2 * self.B * self.T * shape_of(config).kept * element_bytes


class Step(Decode):
    """Decode of one token of each sequence over a cache."""

    columns = ()

    @classmethod
    def timed(cls, config: Model) -> tuple[Work, ...]:
        """List decodes after few tokens and many, alone and in a batch; a short model has its own longest instead."""
        contexts = dict.fromkeys(min(context, config.block_size - 1) for context in CONTEXTS)
        return tuple(cls(B, 1, context) for B in BATCHES for context in contexts)

    @classmethod
    def checked(cls, config: Model) -> tuple[Work, ...]:
        """List decodes after one token, no round number, all that fit; alone and three at a time."""
        longest = config.block_size - 1
        contexts = dict.fromkeys((1, min(CHECKED_PROMPT, longest), longest))
        return tuple(cls(B, 1, context) for B in CHECKED_BATCHES for context in contexts)


class Tokens(Generate):
    """Greedy generation after a prompt, each token chosen on the device."""

    columns = ()

    @classmethod
    def timed(cls, config: Model) -> tuple[Work, ...]:
        """List the generation of one sequence and of a batch; a short model has a prompt of half its block_size."""
        prompt = min(PROMPT, config.block_size // 2)
        return tuple(cls(B, min(TOKENS, config.block_size - prompt), prompt) for B in BATCHES if prompt)

    @property
    def name(self) -> str:
        return super().name + (f", {self.B} sequences" if self.B > 1 else "")


DEVICE_PHASES: dict[str, type[Work]] = {each.phase: each for each in (FirstToken, Step, Tokens)}
