"""What an engine on a device has in common with the others: what it reads and gives stays on the device."""

import gc
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bench.backends import Backend
from bench.gpu.clock import sample_on
from bench.gpu.device import DeviceArtifacts
from gpt.config import GPTConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Inputs:
    """What a prepared call reads, always from the same memory: ids int64 [B, T] and pos int64 [B].

    given: what both hold.
    """

    ids: "Tensor"
    pos: "Tensor"
    given: "tuple[Tensor, int] | None" = None

    def hold(self, ids: "Tensor", pos: int) -> None:
        """Copy them there, unless it is the same call again: then what is timed has no copies."""
        if self.given is None or self.given[0] is not ids or self.given[1] != pos:
            self.ids.copy_(ids)
            self.pos.fill_(pos)
            self.given = ids, pos


class DeviceEngine(Backend):
    """One engine on a device. For checks it takes and gives arrays as any `Backend`; what is timed never leaves.

    An engine writes `_load`, `_first` and `_next`, whose tensors are torch's, on the device, and which need not wait
    for their results. any_shape: whether a new shape costs it nothing; if it compiles or loads something for each, it
    is checked only where it is timed. device: `cuda` or `cpu`. variant_name: the one that was loaded.
    """

    any_shape: ClassVar[bool] = True

    def load(self, artifacts: DeviceArtifacts, config: GPTConfig, threads: int, variant: str) -> None:
        """As `Backend.load`."""
        self.device, self.variant_name = artifacts.device, variant
        self._positions: dict[tuple[int, int], Tensor] = {}
        super().load(artifacts, config, threads, variant)
        gc.freeze()  # what is loaded stays; to look through it after each call of a check takes longer than the call

    def samples(self, method: str, arguments: tuple, budget_s: float) -> list[float]:
        """Seconds of each of some calls of `fill`, `decode` or `generate`, by the device's clock, with all on it."""
        getattr(self, method)(*arguments)  # refuses what does not fit
        ids, *rest = arguments
        call, on_device = {"fill": self._first, "decode": self._next, "generate": self._tokens}[method], self._put(ids)
        return sample_on(self.device, lambda: call(on_device, *rest), budget_s)

    def notes(self) -> dict[str, str]:
        """What ran, as it was seen to, in words for the results."""
        return {}

    @abstractmethod
    def _first(self, ids: "Tensor") -> "Tensor":
        """Put a prompt, ids int64 [B, T], into the emptied cache: the logits [B, V] of its last position."""

    @abstractmethod
    def _next(self, ids: "Tensor", context: int) -> "Tensor":
        """Logits [B, V] of one more token each, ids int64 [B, 1], behind the first `context` in the cache."""

    def _tokens(self, ids: "Tensor", tokens: int) -> "Tensor":
        """The likeliest `tokens` tokens after ids int64 [B, T], each chosen on the device: int64 [B, tokens]."""
        import torch

        T, logits, chosen = ids.shape[1], self._first(ids), []
        for context in range(T, T + tokens):
            chosen.append(logits.argmax(-1, keepdim=True))  # [B, 1]
            if len(chosen) < tokens:
                logits = self._next(chosen[-1], context)
        return torch.cat(chosen, dim=1)

    def _prefill(self, ids: np.ndarray) -> np.ndarray:
        raise NotImplementedError("on a device prompts go into a cache: fill")

    def _fill(self, ids: np.ndarray) -> np.ndarray:
        return self._to_numpy(self._first(self._put(ids)))

    def _decode(self, ids: np.ndarray, context: int) -> np.ndarray:
        return self._to_numpy(self._next(self._put(ids), context))

    def _generate(self, ids: np.ndarray, tokens: int) -> np.ndarray:
        return self._tokens(self._put(ids), tokens).cpu().numpy()

    def _put(self, ids: np.ndarray) -> "Tensor":
        import torch

        return torch.from_numpy(np.ascontiguousarray(ids)).to(self.device)

    def _pos(self, B: int, context: int) -> "Tensor":
        """Int64 [B] on the device, made once."""
        import torch

        if (B, context) not in self._positions:
            self._positions[B, context] = torch.full((B,), context, dtype=torch.int64, device=self.device)
        return self._positions[B, context]

    def _to_numpy(self, logits: "Tensor") -> np.ndarray:
        """In float32. Raises RuntimeError if they are not on the device: then something else computed them."""
        if logits.device.type != self.device:
            raise RuntimeError(f"the logits are on {logits.device.type}, and were to be computed on {self.device}")
        return logits.float().cpu().numpy().copy()  # of memory that the next call may write to
