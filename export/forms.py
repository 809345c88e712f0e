"""The forms of an export: what goes in, what comes out, and the module that is traced for each.

forward  ids [B, T] → logits [B, T, V]
cached   the same after what a preallocated cache [B, nh, block_size, hs] holds, each sequence with a length of its own
past     the same after the keys and values of P earlier tokens, names as Hugging Face Optimum's
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpt.bigram import Bigram
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.model import GPT

Dims = list[str | int]
Described = dict[str, tuple[str, Dims]]  # name to dtype and dims


@dataclass(frozen=True)
class Form:
    """One form: its name as an entry point, its title in messages, the word in its file's name, its first opset."""

    name: str
    title: str
    suffix: str
    oldest_opset: int
    module: type[nn.Module]


class Forward(nn.Module):
    """The plain forward pass: ids int64 [B, T] to logits float32 [B, T, V], or [B, 1, V] with `last`."""

    def __init__(self, model: GPT | Bigram, last: bool) -> None:
        super().__init__()
        self.model, self.last = model, last

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, last_only=self.last).float()


class Cached(nn.Module):
    """One step over a preallocated cache: ids [B, T], pos [B] and each layer's key and value, all also given back.

    Row b of a cache holds pos[b] tokens; T more are written behind them, and what lies further is never seen.
    """

    def __init__(self, model: GPT, last: bool) -> None:
        super().__init__()
        self.model, self.last = model, last

    def forward(self, ids: Tensor, pos: Tensor, cache: list[Tensor]) -> tuple[Tensor, ...]:
        steps = torch.arange(ids.shape[1])  # [T]
        kept = _StaticCache(pos, pos + ids.shape[1], cache)
        logits = _run(self.model, ids, pos[:, None] + steps, kept, self.last)
        return logits, kept.end, *kept.written


class Past(nn.Module):
    """One step after P earlier tokens: input_ids [B, T] and each layer's past key and value, given back longer by T."""

    def __init__(self, model: GPT, last: bool) -> None:
        super().__init__()
        self.model, self.last = model, last

    def forward(self, ids: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        P, T = past[0].shape[2], ids.shape[1]
        kept = _GrowingCache(past)
        logits = _run(self.model, ids, torch.arange(P, P + T), kept, self.last)
        return logits, *kept.written


class _StaticCache:
    """Stands in for `gpt.cache.KVCache` while a block is traced: it writes the new rows by ONNX's operators."""

    def __init__(self, pos: Tensor, end: Tensor, tensors: Sequence[Tensor]) -> None:
        self.pos, self.end, self.tensors = pos, end, tensors
        self.written: list[Tensor] = []

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        written = [self._scatter(*pair) for pair in zip(self.tensors[2 * layer : 2 * layer + 2], (k, v), strict=True)]
        self.written += written
        return written[0], written[1]  # [B, nh, block_size, hs] each

    def attend(self, q: Tensor, k: Tensor, v: Tensor, _dropout: float, scale: float) -> Tensor:
        inputs = (q, k, v, None, None, None, self.end)  # the seventh says how many of the cache's rows count
        attributes: dict[str, Any] = {"is_causal": 1, "scale": scale}
        return torch.onnx.ops.symbolic("Attention", inputs, attributes, dtype=q.dtype, shape=q.shape, version=24)

    def _scatter(self, cache: Tensor, new: Tensor) -> Tensor:
        inputs = (cache, new, self.pos)
        return torch.onnx.ops.symbolic(
            "TensorScatter", inputs, {"axis": 2}, dtype=cache.dtype, shape=cache.shape, version=24
        )


class _GrowingCache:
    """Does the same for past and present: the Attention operator itself joins the two."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.written: list[Tensor] = []

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v  # as they are: `attend` joins them to the past of the layer that it has come to

    def attend(self, q: Tensor, k: Tensor, v: Tensor, _dropout: float, scale: float) -> Tensor:
        past = self.tensors[len(self.written) : len(self.written) + 2]
        B, nh, T, hs = q.shape
        present = (B, nh, past[0].shape[2] + T, hs)
        y, key, value = torch.onnx.ops.symbolic_multi_out(
            "Attention",
            (q, k, v, None, *past),
            {"is_causal": 1, "scale": scale},
            dtypes=[q.dtype] * 3,
            shapes=[q.shape, present, present],
            version=23,
        )
        self.written += [key, value]
        return y


def _run(model: GPT, ids: Tensor, positions: Tensor, kept: _StaticCache | _GrowingCache, last: bool) -> Tensor:
    """Do `gpt.model.GPT.forward` at given positions ([T] or [B, T]), with `kept` in the place of its cache."""
    parts = model.transformer
    x = parts.wte(ids) + parts.wpe(positions)  # [B, T, C]
    for block in parts.h:
        block.attn.attend = kept.attend
        x = block(x, kept)  # [B, T, C]
    x = parts.ln_f(x)
    return model.lm_head(x[:, -1:] if last else x).float()  # [B, T, V] or [B, 1, V]


FORMS = {
    form.name: form
    for form in (
        Form("forward", "the forward pass", "", 18, Forward),
        Form("cached", "a static cache", "cache", 24, Cached),  # TensorScatter is of opset 24
        Form("past", "a past", "past", 23, Past),  # Attention is of opset 23
    )
}


def entry_point_of(form: Form, config: GPTConfig, dtype: str, last: bool) -> dict[str, Described]:
    """Describe a form, in order: {"inputs": {name: (dtype, dims)}, "outputs": …}; dims are B, T, P, P+T or numbers.

    Raises UserError for a cache of a bigram, which keeps nothing.
    """
    if form.name != "forward" and config.model == "bigram":
        raise UserError(f"{form.title} of a bigram: it has no keys and values to keep; export it without a cache")
    T: str | int = "T" if config.block_size > 1 else 1
    ids: tuple[str, Dims] = ("int64", ["B", T])
    logits: tuple[str, Dims] = ("float32", ["B", 1 if last else T, config.vocab_size])

    def tensors(prefix: str, length: str | int) -> Described:
        dims: Dims = ["B", config.n_head, length, config.head_size]
        return {f"{prefix}.{i}.{part}": (dtype, dims) for i in range(config.n_layer) for part in ("key", "value")}

    inputs: Described
    outputs: Described
    if form.name == "cached":
        inputs = {"ids": ids, "pos": ("int64", ["B"]), **tensors("cache", config.block_size)}
        outputs = {"logits": logits, "pos_out": ("int64", ["B"]), **tensors("cache_out", config.block_size)}
    elif form.name == "past":
        inputs = {"input_ids": ids} | tensors("past_key_values", "P")
        outputs = {"logits": logits} | tensors("present", f"P+{T}")
    else:
        inputs, outputs = {"ids": ids}, {"logits": logits}
    return {"inputs": inputs, "outputs": outputs}
