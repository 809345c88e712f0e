"""Runs the model by PyTorch with its fused attention, for which flash is the only kernel allowed."""

from typing import TYPE_CHECKING

import numpy as np

from bench.backends.eager import gpt_of
from bench.gpu.device import DeviceArtifacts
from bench.gpu.engines import eager

if TYPE_CHECKING:
    from torch import Tensor

FLASH = "_scaled_dot_product_flash_attention"  # part of the names of torch's operators


class Engine(eager.Engine):
    """Eager with fused attention. If flash cannot run, torch raises, as no other kernel is allowed."""

    summary = "PyTorch, one operator after the other, scaled_dot_product_attention with flash forced; a KV cache"
    attention = "sdpa"

    def _load(self, artifacts: DeviceArtifacts, threads: int) -> None:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        super()._load(artifacts, threads)
        self._forced = sdpa_kernel(SDPBackend.FLASH_ATTENTION)
        self._forced.__enter__()  # never left: entering it at each call takes the host as long as a kernel
        for block in gpt_of(self._model).transformer.h:
            block.attn.attend = attend

    def notes(self) -> dict[str, str]:
        """Name the attention operators that torch's profiler sees. Raises RuntimeError if any is not flash."""
        import torch

        ids = self._put(np.zeros((1, min(128, self.config.block_size)), np.int64))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            self._first(ids)
        seen = sorted({event.key for event in profile.key_averages() if "::_scaled_dot_product" in event.key})
        if not seen or any(FLASH not in name for name in seen):
            raise RuntimeError(f"flash was forced, and torch ran {', '.join(seen) or 'no fused attention'}")
        return {"attention": ", ".join(seen)}


def attend(q: "Tensor", k: "Tensor", v: "Tensor", _dropout: float, scale: float) -> "Tensor":
    """Attend as `gpt.attention.sdpa` does, [B, nh, T, hs], but without a mask, so that flash can run.

    A prompt is causal, and a single token sees all keys.
    """
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(q, k, v, is_causal=q.shape[-2] > 1, scale=scale)  # [B, nh, T, hs]
