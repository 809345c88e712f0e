"""Other people's state dicts under this project's names, and the names of the models that they are of."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.zoo import weights_of

KEYS = ("model", "state_dict", "model_state_dict", "model_state", "module", "network", "net", "weights", "params")
# what torch.compile, FSDP, DeepSpeed, Lightning and recomputation put into the names of what they wrap
WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
MASKS = (".attn.bias", ".attn.masked_bias")  # constants that some models hold among the weights
OTHER_HEADS = re.compile(r"(score|classifier|multiple_choice_head|v_head|qa_outputs)\b")  # beside the language model
LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
CONV1D = tuple(f"{name.rpartition('.')[2]}.weight" for name in LINEARS)  # transformers keeps them as [in, out]

# What tensors of other models are called, and what the model is. The first that matches is it.
OTHERS = (
    (r"attn\.c_q\.weight", "a nanochat model: rotary positions, RMSNorm, separate queries, keys and values"),
    (r"gpt_neox\.|\battention\.query_key_value\.", "a GPT-NeoX: rotary positions, attention and MLP side by side"),
    (r"word_embeddings_layernorm\.", "a BLOOM: ALiBi in the place of positions, a LayerNorm behind the embedding"),
    (r"self_attention\.query_key_value\.", "a Falcon or a BLOOM: rotary positions or ALiBi, one fused projection"),
    (r"attn\.attention\.q_proj\.", "a GPT-Neo: local attention in every second layer, unscaled scores"),
    (r"mlp\.fc_in\.", "a GPT-J: rotary positions, attention and MLP side by side"),
    (r"decoder\.embed_positions\.", "an OPT: separate queries, keys and values, positions that begin at 2"),
    (r"layers\.\d+\.self_attn\.q_norm\.", "a Qwen3 or its like: rotary positions, RMSNorm, also of queries and keys"),
    (r"layers\.\d+\.self_attn\.q_proj\.bias", "a Qwen2 or its like: rotary positions, RMSNorm, a gated MLP"),
    (
        r"layers\.\d+\.(self_attn\.q_proj|attention\.wq)\.",
        "a Llama or its like: rotary positions, RMSNorm, a gated MLP",
    ),
    (r"self_attn\.qkv_proj\.", "a Phi-3 or its like: rotary positions, RMSNorm, a gated MLP"),
    (r"attn\.Wqkv\.", "an MPT or its like: ALiBi in the place of positions"),
    (r"blocks\.\d+\.att\.time_", "an RWKV: no attention"),
    (r"\.mixer\.A_log", "a Mamba: no attention"),
    (r"SelfAttention\.q\.", "a T5: an encoder and a decoder, relative positions"),
    (r"attention\.self\.query\.", "a BERT or its like: an encoder, whose tokens see those after them"),
    (r"self_attn\.in_proj_weight", "of torch.nn's Transformer layers"),
    (r"blocks\.\d+\.attn\.(key|query)\.", "a minGPT of before 2022: separate queries, keys and values"),
    (r"token_embedding_table\.", "of the lecture's gpt.py: a query, a key and a value for each head"),
    (r"attn\.q_attn\.|crossattention\.", "a GPT-2 with cross-attention, which also reads an encoder's output"),
)


@dataclass(frozen=True)
class Weights:
    """A GPT-2's tensors under our names, in float32, each Linear's weight as [out, in].

    shape: the fields of GPTConfig that tensors show: all but the heads and the activation. conv1d: whether the file had
    the weights as [in, out], as transformers' GPT-2 does. masked: whether masks were among them.
    """

    state: dict[str, Tensor]
    shape: dict[str, Any]
    conv1d: bool
    masked: bool


def find_state(found: Any) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the state dict that a file holds, itself or under one of the usual names, and what lies beside it."""
    if _is_state(found):
        return found, {}
    if isinstance(found, dict):
        for key in KEYS:
            if _is_state(found.get(key)):
                return found[key], {name: value for name, value in found.items() if name != key}
    return None


def _is_state(found: Any) -> bool:
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        return False
    return bool(found) and all(isinstance(value, Tensor) for value in found.values())


def bring_to_our_names(path: Path, state: Mapping[str, Tensor], tied: bool | None = None) -> Weights:
    """Return a GPT-2's weights by our names. tied: whether the head is the embedding, None if the tensors say.

    Prefixes of wrappers go, and so do masks and heads other than the language model's; biases that only some layers
    have are zeros in the others. Raises UserError, which names the model, for tensors that are not a GPT-2's.
    """
    named = _without_prefixes(path, state)
    masked = any(name.endswith(MASKS) for name in named)
    named = {name: tensor for name, tensor in named.items() if not name.endswith(MASKS)}
    for name, tensor in named.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor.to(torch.float32)).all():
            what = "NaN or infinity" if tensor.is_floating_point() else f"whole numbers ({tensor.dtype})"
            raise UserError(f"{path}: {name} holds {what}; take other weights")
    shape = _shape_of(path, named)
    C = shape["n_embd"]
    conv1d = named["transformer.h.0.attn.c_attn.weight"].shape == (C, 3 * C)
    for name, tensor in named.items():
        turned = tensor.t() if conv1d and name.endswith(CONV1D) and tensor.dim() == 2 else tensor
        named[name] = turned.to(torch.float32).contiguous()
    head, embedding = named.get("lm_head.weight"), named["transformer.wte.weight"]
    if tied is None:
        tied = head is None or torch.equal(head, embedding)
    if tied:
        named["lm_head.weight"] = embedding  # most files leave the head out
    return Weights(named, shape | {"tied_head": tied}, conv1d, masked)


def _without_prefixes(path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a model by the names that begin with `transformer.` and `lm_head.`. Raises UserError."""
    names = {WRAPPERS.sub("", name): name for name in state}
    roots = [name.removesuffix("wte.weight") for name in names if re.search(r"(^|\.)wte\.weight$", name)]
    if not roots or any(re.search(pattern, name) for pattern, _ in OTHERS[:1] for name in names):
        raise UserError(f"{path}: {_other_model(names)}")
    if len(roots) > 1 or len(names) != len(state):
        raise UserError(
            f"{path}: holds several models, as of {', '.join(f'{root}wte.weight' for root in roots)}; save one of them"
        )
    outside = roots[0].removesuffix("transformer.")
    found = {}
    for name, old in names.items():
        if name.startswith(roots[0]) and not name.startswith(f"{roots[0]}lm_head."):
            found["transformer." + name.removeprefix(roots[0])] = state[old]
        elif name.startswith(f"{outside}lm_head."):
            found[name.removeprefix(outside)] = state[old]
        elif not OTHER_HEADS.match(name.removeprefix(outside)):
            raise UserError(f"{path}: {name} is no tensor of a GPT-2; save the model without it")
    return {name: tensor for name, tensor in found.items() if not OTHER_HEADS.match(name.split(".")[1])}


def _other_model(names: Mapping[str, str]) -> str:
    """Say what other model the names are of."""
    for pattern, words in OTHERS:
        if any(re.search(pattern, name) for name in names):
            return f"this is {words}; only GPT-2s can be read"
    some = ", ".join(list(names)[:3])
    return f"not a GPT-2: none of its {len(names)} tensors is called wte.weight, as the first ones are {some}"


def _shape_of(path: Path, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the shape off the tensors. Raises UserError, naming the model, where one that shows it is absent."""
    for name in ("wte", "wpe", "h.0.attn.c_attn", "h.0.mlp.c_fc"):
        tensor = named.get(f"transformer.{name}.weight")
        if tensor is None and name == "wpe" and not any(re.search(p, each) for p, _ in OTHERS for each in named):
            raise UserError(f"{path}: has no table of positions (wpe.weight), so they are rotary or ALiBi: not a GPT-2")
        if tensor is None:
            raise UserError(f"{path}: {_other_model({each: each for each in named})}")
        if tensor.dim() != 2:
            raise UserError(f"{path}: transformer.{name}.weight is {list(tensor.shape)}, no matrix; take other weights")
    (V, C), (T, _) = (named[f"transformer.{name}.weight"].shape for name in ("wte", "wpe"))
    projection, wide = (named[f"transformer.h.0.{name}.weight"].shape for name in ("attn.c_attn", "mlp.c_fc"))
    if 3 * C not in projection:
        raise UserError(
            f"{path}: transformer.h.0.attn.c_attn.weight is {list(projection)}, not of {3 * C} queries, keys and "
            "values: fewer heads of keys than of queries, which is no GPT-2"
        )
    layers = {int(found[1]) for name in named if (found := re.match(r"transformer\.h\.(\d+)\.", name))}
    return {
        "vocab_size": V,
        "block_size": T,
        "n_embd": C,
        "n_layer": max(layers) + 1,
        "n_inner": wide[1] if projection == (C, 3 * C) else wide[0],
        "bias": any(name.endswith(".bias") for name in named),
    }


def fill_in(path: Path, weights: Weights, config: GPTConfig, where: str) -> dict[str, Tensor]:
    """Return the state, with zeros where only the LayerNorms or only the Linears have biases.

    where: says what it does not fit, if it does not. Raises UserError unless it has exactly the config's tensors.
    """
    state = dict(weights.state)
    try:
        wanted = weights_of(config, len(state))
    except UserError as error:
        raise UserError(f"{path}: does not fit {where}: {error}") from error
    with_biases = {_is_norm(name) for name in state if name.endswith(".bias")}
    for name, like in wanted.items():
        if name.endswith(".bias") and _is_norm(name) not in with_biases:
            state[name] = torch.zeros(like.shape)
    for name in sorted(wanted.keys() | state.keys()):
        expected, shape = (tensors[name].shape if name in tensors else None for tensors in (wanted, state))
        if expected != shape:
            here, there = (str(list(each)) if each is not None else "absent" for each in (shape, expected))
            raise UserError(f"{path}: does not fit {where}: {name} is {here}, not {there}")
    return state


def _is_norm(name: str) -> bool:
    return name.split(".")[-2].startswith("ln_")
