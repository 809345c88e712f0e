"""Runs the model by torch.compile, compiled for each shape: by default, and with max-autotune and CUDA graphs."""

from typing import TYPE_CHECKING, ClassVar

from bench.backends import Variant
from bench.gpu.device import DeviceArtifacts
from bench.gpu.engines import eager

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from gpt.model import GPT

ROWS = (64, 256)  # lengths of the cache; the first that suffices is taken, else block_size
AUTOTUNED = "max-autotune"  # the variant, and torch's name of the mode


class Engine(eager.Engine):
    """Compiles a prompt and a step, which write the cache in place, at their first call with a shape.

    A graph has one shape, so a step reads a fixed number of the cache's rows and masks those not filled yet.
    """

    summary = "torch.compile, one compilation a shape; the KV cache in place, in blocks of fixed length"
    variants: ClassVar[dict[str, Variant]] = {
        "": Variant(eager.FILES, "bf16"),
        AUTOTUNED: Variant(eager.FILES, "bf16", about="mode max-autotune: kernels timed and chosen, CUDA graphs"),
    }
    any_shape = False

    def _load(self, artifacts: DeviceArtifacts, threads: int) -> None:
        import torch
        import torch._dynamo
        import torch._inductor.config

        super()._load(artifacts, threads)
        # By default the ninth shape would silently fall back to eager.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        torch._inductor.config.compile_threads = threads
        self._graphs = self.variant_name == AUTOTUNED and self.device == "cuda"
        mode = self.variant_name or None
        self._compiled_prompt = torch.compile(prompt, dynamic=False, fullgraph=True, mode=mode)
        self._compiled_step = torch.compile(step, dynamic=False, fullgraph=True, mode=mode)
        self._rows = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def samples(self, method: str, arguments: tuple, budget_s: float) -> list[float]:
        """Time as any engine does. Raises RuntimeError if torch skipped CUDA graphs, which it only logs."""
        found = super().samples(method, arguments, budget_s)
        if self._graphs and (reason := skipped_graphs()):
            raise RuntimeError(reason)
        return found

    def notes(self) -> dict[str, str]:
        return {"CUDA graphs": "yes, none skipped"} if self._graphs else {}

    def _first(self, ids: "Tensor") -> "Tensor":
        B, T = ids.shape
        rows = self._rows_for(T)
        if (B, rows) != (len(self._keys[0]) if self._keys else 0, self._rows):
            self._make_cache(B, rows)
        return self._run(self._compiled_prompt, ids)

    def _next(self, ids: "Tensor", context: int) -> "Tensor":
        if context >= self._rows:
            held = self._keys, self._values
            self._make_cache(len(ids), self._rows_for(context))
            for new, old in zip((*self._keys, *self._values), (*held[0], *held[1]), strict=True):
                new[:, :, : old.shape[2]] = old
        return self._run(self._compiled_step, ids, self._pos(1, context))

    def _run(self, compiled: "Callable[..., Tensor]", *inputs: "Tensor") -> "Tensor":
        import torch

        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()  # allows it to overwrite the last call's logits
        with torch.no_grad():  # inference_mode would add a guard
            return compiled(self._model, *inputs, self._keys, self._values)

    def _rows_for(self, tokens: int) -> int:
        """Rows that hold some tokens and one more, where there is one."""
        return next((rows for rows in ROWS if tokens < rows < self.config.block_size), self.config.block_size)

    def _make_cache(self, B: int, rows: int) -> None:
        import torch

        shape = (B, self.gpt.n_head, rows, self.gpt.head_size)
        self._rows, self._keys, self._values = rows, [], []
        for tensors in (self._keys, self._values):
            for _ in range(self.gpt.n_layer):
                tensor = torch.zeros(shape, dtype=torch.bfloat16, device=self.device)
                torch._dynamo.mark_static_address(tensor)  # else a CUDA graph could not write to it
                tensors.append(tensor)


def skipped_graphs() -> str | None:
    """Return a message if torch counted CUDA graphs that it did not record, else None."""
    from torch._dynamo.utils import counters

    skipped = counters["inductor"]["cudagraph_skips"]
    return f"torch skipped CUDA graphs {skipped} times, so this is not what the row says" if skipped else None


def prompt(model: "GPT", ids: "Tensor", keys: "list[Tensor]", values: "list[Tensor]") -> "Tensor":
    """Run a prompt, ids [B, T], into the first rows of the cache, and return the last logits [B, V].

    keys, values: each layer's cache, [B, nh, rows, hs].
    """
    import torch

    return _forward(model, ids, torch.arange(ids.shape[1], device=ids.device), keys, values)


def step(model: "GPT", ids: "Tensor", pos: "Tensor", keys: "list[Tensor]", values: "list[Tensor]") -> "Tensor":
    """Run one token of each sequence, ids [B, 1], into row pos [1] of the cache, and return the logits [B, V]."""
    return _forward(model, ids, pos, keys, values)


def _forward(model: "GPT", ids: "Tensor", rows: "Tensor", keys: "list[Tensor]", values: "list[Tensor]") -> "Tensor":
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    parts = model.transformer
    x = parts.wte(ids) + parts.wpe(rows)  # [B, T, C]
    for block, k, v in zip(parts.h, keys, values, strict=True):
        new = block.attn.c_attn(block.ln_1(x)).unflatten(2, (3, k.shape[1], k.shape[3]))  # [B, T, 3, nh, hs]
        q, new_k, new_v = new.permute(2, 0, 3, 1, 4)  # [B, nh, T, hs] each
        k.index_copy_(2, rows, new_k)
        v.index_copy_(2, rows, new_v)
        if ids.shape[1] > 1:  # a prompt begins the cache, so it sees itself alone
            y = scaled_dot_product_attention(q, new_k, new_v, is_causal=True, scale=block.attn.scale)  # [B, nh, T, hs]
        else:
            seen = torch.arange(k.shape[2], device=ids.device) <= rows  # [rows of the cache]
            y = scaled_dot_product_attention(q, k, v, attn_mask=seen[None], scale=block.attn.scale)
        x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))  # [B, T, C]
        x = x + block.mlp(block.ln_2(x))
    return model.lm_head(parts.ln_f(x)[:, -1])  # [B, V]
