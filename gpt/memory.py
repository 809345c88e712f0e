"""Find what a model holds in memory in each phase by running it on tensors that have a shape and no content."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt.cache import KVCache
from gpt.config import GPTConfig
from gpt.model import loss_of
from gpt.zoo import build_model

PHASES = ("prefill", "decode", "training")
ADAM_MOMENTS = 2  # numbers that AdamW keeps for each weight


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes held in one phase. activations_bytes: the most that all other tensors take at one moment."""

    phase: str
    weights_bytes: int
    activations_bytes: int
    cache_bytes: int = 0
    gradients_bytes: int = 0
    optimizer_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes of all of them. The allocator and the kernels take some for themselves on top."""
        own = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes
        return own + self.cache_bytes + self.activations_bytes


def phase_memory(config: GPTConfig, phase: str, B: int, T: int, attention: str = "sdpa") -> PhaseMemory:
    """Return the memory in float32 on a CPU of B sequences of T tokens; in `decode`, of the T-th with the rest cached.

    phase: a name in PHASES. `training` is one step of AdamW without the optimizer's own temporaries.
    """
    with FakeTensorMode():
        model = build_model(config, attention).train(phase == "training")
        weights = sum(parameter.nbytes for parameter in model.parameters())
        ids = torch.zeros(B, T, dtype=torch.int64)
        if phase == "training":
            peak = _training_peak(model, ids)
            return PhaseMemory(phase, weights, peak, gradients_bytes=weights, optimizer_bytes=ADAM_MOMENTS * weights)
        with torch.no_grad():
            if phase == "prefill":
                return PhaseMemory(phase, weights, _peak_bytes(lambda: model(ids), model.parameters()))
            cache = KVCache(config, B)
            cache.length = T - 1
            held = [*model.parameters(), cache.keys, cache.values]
            peak = _peak_bytes(lambda: model(ids[:, :1], cache=cache), held)
            return PhaseMemory(phase, weights, peak, cache_bytes=cache.size_bytes)


def _training_peak(model: nn.Module, ids: Tensor) -> int:
    parameters = list(model.parameters())
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return _peak_bytes(lambda: loss_of(model(ids), ids).backward(), [*parameters, *gradients])


def _peak_bytes(work: Any, held: Iterable[Tensor]) -> int:
    with _Live(held) as live:
        work()
    return live.peak_bytes


class _Live(TorchDispatchMode):
    """Adds up the storages that operations make and takes each off again when it is freed; `held` are not counted."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.held = [tensor.untyped_storage() for tensor in held]  # kept alive, so that no other gets their address
        self.known = {storage._cdata for storage in self.held}
        self.live_bytes = self.peak_bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, address: int, size_bytes: int) -> None:
        self.known.discard(address)
        self.live_bytes -= size_bytes
