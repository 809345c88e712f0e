"""Read the model files of llm.c: a header of 256 whole numbers, then the tensors of all layers by kind.

As `write_model` in train_gpt2.py of https://github.com/karpathy/llm.c writes them.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.foreign import ForeignModel, Hints
from gpt.foreign.names import bring_to_our_names, fill_in
from gpt.tokenizer import gpt2_or_none

MAGIC = 20240326
HEADER_BYTES = 1024
DTYPES = {3: torch.float32, 5: torch.bfloat16}  # by the version of the file


def is_llmc(content: bytes) -> bool:
    """Return whether a file begins as llm.c's models do."""
    return len(content) >= HEADER_BYTES and int.from_bytes(content[:4], "little") == MAGIC


def read_llmc(path: Path, content: bytes, hints: Hints) -> ForeignModel:
    """Return the GPT-2 of a file, whose rows of the embedding beyond the vocabulary are left out. Raises UserError."""
    header = np.frombuffer(content, "<i4", 8).tolist()
    version, T, V, L, n_head, C, padded = header[1:]
    if version not in DTYPES:
        raise UserError(f"{path}: version {version} of llm.c's model files; versions 3 and 5 can be read")
    sizes = {"block_size": T, "vocab_size": V, "n_layer": L, "n_head": n_head, "n_embd": C}
    if min(*sizes.values(), padded) < 1 or padded < V:
        raise UserError(f"{path}: llm.c's header says {sizes}, padded vocabulary {padded}; copy the file again")
    shapes = _shapes_of(T, padded, L, C)
    dtype = DTYPES[version]
    wanted = HEADER_BYTES + dtype.itemsize * sum(map(math.prod, shapes.values()))
    if len(content) != wanted:
        raise UserError(f"{path}: is truncated or damaged ({len(content):,} of {wanted:,} bytes); copy it again")
    state, at, buffer = {}, HEADER_BYTES, bytearray(content)  # torch warns of bytes that cannot be written
    for name, shape in shapes.items():
        count = math.prod(shape)
        state[name] = torch.frombuffer(buffer, dtype=dtype, count=count, offset=at).view(shape)
        at += count * dtype.itemsize
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:V]
    weights = bring_to_our_names(path, _by_layer(state), tied=True)
    heads, activation = hints.complete(path, n_head, "gelu_tanh")
    try:
        config = GPTConfig(**weights.shape, n_head=heads, activation=activation)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    tokenizer = gpt2_or_none(config.vocab_size).to_json()
    return ForeignModel("llm.c's", config, fill_in(path, weights, config, "llm.c's header"), tokenizer)


def _shapes_of(T: int, padded: int, L: int, C: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in their order in a file, those of the layers with all layers in one."""
    return {
        "transformer.wte.weight": (padded, C),
        "transformer.wpe.weight": (T, C),
        "ln_1.weight": (L, C),
        "ln_1.bias": (L, C),
        "attn.c_attn.weight": (L, 3 * C, C),
        "attn.c_attn.bias": (L, 3 * C),
        "attn.c_proj.weight": (L, C, C),
        "attn.c_proj.bias": (L, C),
        "ln_2.weight": (L, C),
        "ln_2.bias": (L, C),
        "mlp.c_fc.weight": (L, 4 * C, C),
        "mlp.c_fc.bias": (L, 4 * C),
        "mlp.c_proj.weight": (L, C, 4 * C),
        "mlp.c_proj.bias": (L, C),
        "transformer.ln_f.weight": (C,),
        "transformer.ln_f.bias": (C,),
    }


def _by_layer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give each layer's part of a tensor a name of its own."""
    found = {}
    for name, tensor in state.items():
        if name.startswith("transformer."):
            found[name] = tensor
        else:
            found |= {f"transformer.h.{i}.{name}": each for i, each in enumerate(tensor)}
    return found
