"""The base class of engines on a device, whose inputs and outputs stay on the device."""

import gc
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bench.backends import Backend
from bench.gpu.clock import sample_on
from bench.gpu.device import DeviceArtifacts
from bench.models.shape import Model

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Inputs:
    """The inputs of a prepared call, always in the same memory: ids int64 [B, T] and pos int64 [B].

    given: the tensor and the position that were last copied there.
    """

    ids: "Tensor"
    pos: "Tensor"
    given: "tuple[Tensor, int] | None" = None

    def hold(self, ids: "Tensor", pos: int) -> None:
        """Copy the inputs there, unless it is the same call again, so that the timed calls have no copies."""
        if self.given is None or self.given[0] is not ids or self.given[1] != pos:
            self.ids.copy_(ids)
            self.pos.fill_(pos)
            self.given = ids, pos


class DeviceEngine(Backend[DeviceArtifacts]):
    """One engine on a device. Its checks take and return arrays, as any `Backend`'s; timed calls stay on the device.

    An engine writes `_load`, `_first` and `_next`, which take and return torch's tensors on the device, and need not
    wait for their results. any_shape: False if the engine compiles or loads something for each shape; then it is
    checked only at the works that are timed. device: `cuda` or `cpu`. variant_name: the one that was loaded.
    """

    any_shape: ClassVar[bool] = True

    def load(self, artifacts: DeviceArtifacts, config: Model, threads: int, variant: str) -> None:
        """Load as `Backend.load` does."""
        self.device, self.variant_name = artifacts.device, variant
        self._positions: dict[tuple[int, int], Tensor] = {}
        super().load(artifacts, config, threads, variant)
        gc.freeze()  # else each call of a check would scan what was loaded, which takes longer than the call

    def samples(self, method: str, arguments: tuple, budget_s: float) -> list[float]:
        """Time some calls of `fill`, `decode` or `generate` on the device by its clock: the seconds of each."""
        getattr(self, method)(*arguments)  # refuses what does not fit
        ids, *rest = arguments
        calls: dict[str, Callable[..., Tensor]] = {
            "fill": self._first,
            "decode": self._next,
            "generate": self._tokens,
        }
        call, on_device = calls[method], self._put(ids)
        return sample_on(self.device, lambda: call(on_device, *rest), budget_s)

    def notes(self) -> dict[str, str]:
        """Describe for the results what was seen to run, each note with its name."""
        return {}

    @abstractmethod
    def _first(self, ids: "Tensor") -> "Tensor":
        """Put a prompt, ids int64 [B, T], into the emptied cache, and return the logits [B, V] of its last position."""

    @abstractmethod
    def _next(self, ids: "Tensor", context: int) -> "Tensor":
        """Return the logits [B, V] of one more token each, ids int64 [B, 1], after the first `context` in the cache."""

    def _tokens(self, ids: "Tensor", tokens: int) -> "Tensor":
        """Generate the likeliest tokens after ids int64 [B, T], each chosen on the device: int64 [B, tokens]."""
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
        """Return the position of every sequence, int64 [B], on the device; it is made once."""
        import torch

        if (B, context) not in self._positions:
            self._positions[B, context] = torch.full((B,), context, dtype=torch.int64, device=self.device)
        return self._positions[B, context]

    def _to_numpy(self, logits: "Tensor") -> np.ndarray:
        """Copy logits to the host in float32. Raises RuntimeError if they are not on the engine's device."""
        if logits.device.type != self.device:
            raise RuntimeError(f"the logits are on {logits.device.type}, and were to be computed on {self.device}")
        return logits.float().cpu().numpy().copy()  # the next call may write to the same memory
