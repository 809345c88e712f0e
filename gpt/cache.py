"""The KV cache: what attention has computed of the tokens so far, so that the next one costs one token's work."""

import torch
from torch import Tensor

from gpt.config import GPTConfig


class KVCache:
    """Keys and values of every layer for B sequences, in memory taken once for block_size positions.

    It changes as the model runs: each call of the model with it appends what it was given. length: positions filled.
    """

    def __init__(
        self, config: GPTConfig, B: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        shape = (config.n_layer, B, config.n_head, config.block_size, config.head_size)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # [n_layer, B, nh, block_size, hs]
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's k, v [B, nh, T, hs] behind what is there; views of all so far, [B, nh, length + T, hs].

        `length` stays until every layer has written: the model moves it on.
        """
        end = self.length + k.shape[-2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    @property
    def size_bytes(self) -> int:
        """Bytes of both tensors, whatever is filled of them."""
        return self.keys.nbytes + self.values.nbytes
