"""Read GPT-2s that Hugging Face's transformers saved: a folder, or one file of weights with its config.json beside."""

import hashlib
import json
import pickle
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.files import sha256_file
from gpt.foreign import NO_HINTS, ForeignModel, Hints
from gpt.foreign.names import bring_to_our_names, fill_in, find_state
from gpt.foreign.unpickle import load_torch, name_of_refused
from gpt.sealed import check_folder
from gpt.tokenizer import (
    GPT2_VOCAB_SIZE,
    GPT2Tokenizer,
    HuggingFaceTokenizer,
    NoTokenizer,
    Tokenizer,
    gpt2_or_none,
    tokenizer_from_json,
)

SEAL = "gpt_frontend.json"  # the hashes of the files of a folder that export.huggingface wrote
SEALED_TOKENIZER = "tokenizer"  # in it: the checkpoint's own tokenizer, as our JSON has it
CONFIG, WEIGHTS, PICKLED = "config.json", "model.safetensors", "pytorch_model.bin"
SHARDS = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
TOKENIZER, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
NAME = re.compile(r"\w[\w.-]*")  # of a file in the same folder
# transformers' activations (its ACT2FN) by our names; where they have two names for one function, the first is written
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
# fields that have the same name and meaning in GPTConfig, with transformers' defaults
SHARED = {
    "vocab_size": 50257,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "n_inner": None,
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
# What other models are, by their model_type.
OTHERS = {
    "bloom": "ALiBi in the place of positions",
    "falcon": "rotary positions or ALiBi, one fused projection",
    "gemma": "rotary positions, RMSNorm, a gated MLP",
    "gpt_bigcode": "one head of keys and values for all queries",
    "gpt_neo": "local attention in every second layer, unscaled scores",
    "gpt_neox": "rotary positions, attention and MLP side by side",
    "gptj": "rotary positions, attention and MLP side by side",
    "llama": "rotary positions, RMSNorm, a gated MLP",
    "mistral": "rotary positions, RMSNorm, a gated MLP",
    "nanochat": "rotary positions, RMSNorm, squared ReLU",
    "opt": "separate queries, keys and values, positions that begin at 2",
    "phi3": "rotary positions, RMSNorm, a gated MLP",
    "qwen2": "rotary positions, RMSNorm, a gated MLP",
    "qwen3": "rotary positions, RMSNorm, also of queries and keys",
}
# hashes GPT-2's merges, one a line (tiktoken's vocab.bpe without its first line)
MERGES_SHA256 = "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0"


def read_folder(folder: Path, hints: Hints = NO_HINTS) -> ForeignModel:
    """Return the GPT-2 in a folder of transformers, from safetensors or pytorch_model.bin, whole or in several files.

    Of a classifier and a model with two heads it is the language model in it. Raises UserError for other models, and
    for files that are damaged or that do not fit each other.
    """
    sealed = check_folder(folder, SEAL, "python -m export.huggingface") if (folder / SEAL).exists() else {}
    state: dict[str, Tensor] = {}
    for path in weight_files(folder):
        state |= _read_weights(path)
    return _model_of(folder, state, hints, sealed)


def read_single_file(path: Path, state: dict[str, Tensor], hints: Hints) -> ForeignModel:
    """Return the GPT-2 whose tensors are in one file, and whose config.json and tokenizer lie beside it."""
    return _model_of(path.parent, state, hints, {}, path)


def folder_sha256(folder: Path) -> str:
    """Return the SHA-256 of the names and hashes of the files that a model is read from."""
    files = [folder / CONFIG, *weight_files(folder)]
    return hashlib.sha256("".join(f"{each.name} {sha256_file(each)}\n" for each in files).encode()).hexdigest()


def _model_of(
    folder: Path, state: dict[str, Tensor], hints: Hints, sealed: dict[str, Any], source: Path | None = None
) -> ForeignModel:
    found = read_json(folder / CONFIG)
    tied = _tied(folder / CONFIG, found)
    config = _config_of(folder / CONFIG, found, tied, hints)
    weights = bring_to_our_names(source or folder, state, tied)
    state = fill_in(source or folder, weights, config, f"its {CONFIG}")
    own = sealed.get(SEALED_TOKENIZER)
    tokenizer = tokenizer_from_json(own) if isinstance(own, dict) else _tokenizer_of(folder, config)
    return ForeignModel("transformers'", config, state, tokenizer.to_json())


def _tied(path: Path, found: dict[str, Any]) -> bool:
    tied = found.get("tie_word_embeddings", True)
    if type(tied) is not bool:
        raise UserError(f"{path}: tie_word_embeddings={tied!r}: must be true or false")
    return tied


def _config_of(path: Path, found: dict[str, Any], tied: bool, hints: Hints) -> GPTConfig:
    """Read the shape from a config.json. Raises UserError for a model that is not a GPT-2."""
    kind = found.get("model_type", "gpt2")
    if kind != "gpt2":
        words = f" ({OTHERS[kind]})" if isinstance(kind, str) and kind in OTHERS else ""
        raise UserError(f"{path}: model_type={kind!r}{words}, not 'gpt2', the only kind that can be read")
    if found.get("add_cross_attention", False):
        raise UserError(f"{path}: add_cross_attention=True: a model that also reads an encoder's output, no GPT-2")
    activation = found.get("activation_function", "gelu_new")
    if hints.activation is None and (not isinstance(activation, str) or activation not in ACTIVATIONS):
        raise UserError(f"{path}: activation_function={activation!r}: must be one of {', '.join(ACTIVATIONS)}")
    shared: dict[str, Any] = {name: found.get(name, default) for name, default in SHARED.items()}
    if hints.heads is not None:
        shared["n_head"] = hints.heads
    try:
        return GPTConfig(
            block_size=found.get("n_positions", 1024),
            activation=hints.activation or ACTIVATIONS[activation],
            tied_head=tied,
            **shared,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """Return one file, or the several into which a large model was split. Raises UserError."""
    for name, index in zip((WEIGHTS, PICKLED), SHARDS, strict=True):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / index).is_file():
            return _shards_of(folder / index)
    raise UserError(
        f"{folder}: holds no {WEIGHTS} and no {PICKLED}; save the model there with transformers' save_pretrained"
    )


def _shards_of(index: Path) -> list[Path]:
    table = read_json(index).get("weight_map")
    names: list[Any] = list(table.values()) if isinstance(table, dict) else [table]
    for name in names:
        if not isinstance(name, str) or not NAME.fullmatch(name):  # a path with `..` leads out of the folder
            raise UserError(f"{index}: weight_map names {name!r}, no file of this folder; save it again")
    return [index.with_name(name) for name in sorted(set(names))]


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); download or save it again") from error
    if path.suffix == ".safetensors":
        return read_safetensors(path, content)
    try:
        found = find_state(load_torch(content))
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        refused = name_of_refused(error)
        raise UserError(f"{path}: refused, as it would run {refused} when loaded; use safetensors") from error
    except Exception as error:  # torch raises many kinds for a file that it did not write
        raise UserError(f"{path}: is truncated or damaged ({str(error).splitlines()[0][:120]})") from error
    if found is None:
        raise UserError(f"{path}: holds no state dict of a model; save the model with transformers' save_pretrained")
    return found[0]


def read_safetensors(path: Path, content: bytes) -> dict[str, Tensor]:
    """Return the tensors in the bytes of a safetensors file. Raises UserError."""
    try:
        return load(content)
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); download or save it again") from error


def is_safetensors(content: bytes) -> bool:
    """Return whether a file begins as safetensors do: with the length of a JSON object, and that."""
    return content[8:9] == b"{" and int.from_bytes(content[:8], "little") <= max(len(content), 10**8)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a folder. Raises UserError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); take a folder of transformers") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: is not a JSON object; take a folder of transformers")
    return found


def _tokenizer_of(folder: Path, config: GPTConfig) -> Tokenizer:
    """Return the folder's own tokenizer; GPT-2's if it is that, or if there is none and the vocabulary has its size."""
    tokenizer: Tokenizer
    if (folder / TOKENIZER).is_file():
        found = read_json(folder / TOKENIZER)
        tokenizer = HuggingFaceTokenizer.of(found, str(folder / TOKENIZER))
        if _is_gpt2s(_merges_in(found)) and tokenizer.vocab_size == GPT2_VOCAB_SIZE:
            tokenizer = GPT2Tokenizer()
    elif (folder / MERGES).is_file():
        merges = _read_merges(folder / MERGES)
        if _is_gpt2s(merges) and config.vocab_size >= GPT2_VOCAB_SIZE:
            tokenizer = GPT2Tokenizer()
        elif (folder / VOCAB).is_file():
            tokenizer = HuggingFaceTokenizer.of(byte_pairs(read_json(folder / VOCAB), merges), str(folder / VOCAB))
        else:
            tokenizer = NoTokenizer()
    else:
        tokenizer = gpt2_or_none(config.vocab_size)
    if not isinstance(tokenizer, NoTokenizer) and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, but vocab_size={config.vocab_size}; save the "
            "tokenizer that the model was trained with"
        )
    return tokenizer


def _is_gpt2s(merges: list[str]) -> bool:
    return hashlib.sha256("\n".join(merges).encode(errors="surrogatepass")).hexdigest() == MERGES_SHA256


def _merges_in(found: dict[str, Any]) -> list[str]:
    """Return the byte pairs that a tokenizer.json joins, "a b" each, in their order."""
    model = found.get("model")
    merges = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(merges, list):
        return []
    return [" ".join(map(str, merge)) if isinstance(merge, list) else str(merge) for merge in merges]


def _read_merges(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); save the tokenizer again") from error
    return [line for line in lines if line.strip() and not line.startswith("#version")]


def byte_pairs(vocab: dict[str, Any], merges: list[str], added: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return the tokenizer.json of a tokenizer like GPT-2's, of other byte pairs."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    return pipeline(model=model, pre_tokenizer=level, decoder=level, added_tokens=added or [])


def pipeline(**parts: Any) -> dict[str, Any]:
    """Return a tokenizer.json of which only these parts are not empty."""
    empty = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {"version": "1.0", "added_tokens": []} | dict.fromkeys(empty) | parts
