"""Runs torch.compile with its default backend, Inductor, which compiles the model for each shape with static sizes."""

from typing import TYPE_CHECKING

import numpy as np

from bench.backends import eager
from bench.models.artifacts import Artifacts

if TYPE_CHECKING:
    from torch import Tensor

    from gpt.model import GPT

ROWS = (64, 256)  # cache rows that a decode step reads: the first that holds the context, else block_size


class Engine(eager.Engine):
    """Runs torch.compile over the model with SDPA. The first call at a shape compiles it and is never timed.

    A compiled graph has static shapes, so a decode step reads a fixed number of cache rows and masks those not filled
    yet. Prompts are processed by eager.
    """

    summary = "torch.compile, one compilation a shape; the KV cache in place, in blocks of fixed length"
    attention = "sdpa"

    def _load(self, artifacts: Artifacts, threads: int) -> None:
        import torch
        import torch._dynamo
        import torch._inductor.config

        super()._load(artifacts, threads)
        # By default the ninth shape would silently fall back to eager.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        torch._inductor.config.compile_threads = (
            threads  # its compile processes are stopped with the worker while other engines are timed
        )
        self._compiled = torch.compile(self._model, dynamic=False, fullgraph=True)
        self._compiled_step = torch.compile(_step, dynamic=False, fullgraph=True)

    def _prefill(self, ids: np.ndarray) -> np.ndarray:
        import torch

        with torch.no_grad():  # inference_mode would add a guard
            return self._to_numpy(self._compiled(torch.from_numpy(ids)))

    def _fill(self, ids: np.ndarray) -> np.ndarray:
        import torch

        self._gpt = eager.gpt_of(self._model)
        logits = super()._fill(ids)
        self._pos = torch.zeros(1, dtype=torch.int64)
        self._seen = torch.zeros(1, self.config.block_size, dtype=torch.bool)
        return logits

    def _decode(self, ids: np.ndarray, context: int) -> np.ndarray:
        import torch

        rows = next((rows for rows in ROWS if context < rows < self.config.block_size), self.config.block_size)
        self._pos[0] = context
        self._seen[:, : context + 1], self._seen[:, context + 1 :] = True, False
        keys, values = self._cache.keys[:, :, :, :rows], self._cache.values[:, :, :, :rows]
        arguments = (torch.from_numpy(np.ascontiguousarray(ids)), self._pos, self._seen[:, :rows], keys, values)
        with torch.no_grad():
            return self._to_numpy(self._compiled_step(self._gpt, *arguments))[:, 0]


def _step(model: "GPT", ids: "Tensor", pos: "Tensor", seen: "Tensor", keys: "Tensor", values: "Tensor") -> "Tensor":
    """Compute `GPT.forward` of one token per sequence, ids [B, 1], writing row pos [1] of the cache: logits [B, 1, V].

    seen: bool [1, S], the attention mask over the rows of keys and values [n_layer, B, nh, S, hs].
    """
    from torch.nn.functional import scaled_dot_product_attention

    parts = model.transformer
    x = parts.wte(ids) + parts.wpe(pos)  # [B, 1, C]
    for block, k, v in zip(parts.h, keys, values, strict=True):
        new = block.attn.c_attn(block.ln_1(x)).unflatten(2, (3, k.shape[1], k.shape[3]))  # [B, 1, 3, nh, hs]
        q, new_k, new_v = new.permute(2, 0, 3, 1, 4)  # [B, nh, 1, hs] each
        k.index_copy_(2, pos, new_k)
        v.index_copy_(2, pos, new_v)
        y = scaled_dot_product_attention(q, k, v, attn_mask=seen)  # [B, nh, 1, hs]
        x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))  # [B, 1, C]
        x = x + block.mlp(block.ln_2(x))
    return model.lm_head(parts.ln_f(x))
