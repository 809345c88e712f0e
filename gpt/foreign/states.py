"""Read what PyTorch's users save: nanoGPT's, build-nanogpt's, minGPT's and Lightning's files, and bare state dicts."""

from pathlib import Path
from typing import Any

from torch import Tensor

from gpt.cli import UserError
from gpt.config import ACTIVATIONS, GPTConfig
from gpt.foreign import ForeignModel, Hints
from gpt.foreign.huggingface import CONFIG, read_single_file
from gpt.foreign.names import Weights, bring_to_our_names, fill_in, find_state
from gpt.foreign.nanogpt import find_meta, tokenizer_of_meta
from gpt.foreign.unpickle import StandIn
from gpt.tokenizer import Tokenizer, gpt2_or_none

BUILD_NANOGPT = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd"}
NANOGPT = BUILD_NANOGPT | {"bias", "dropout"}
# Where files keep a model's settings, the likeliest first, and what the number of heads is called there.
SETTINGS = ("model_args", "config", "hyper_parameters", "model_config", "hparams", "args", "cfg")
HEADS = ("n_head", "n_heads", "num_heads", "num_attention_heads", "nhead")
STEPS = ("iter_num", "step", "global_step")
SAME = ("block_size", "vocab_size", "n_layer", "n_embd")  # settings that tensors show too


def read_object(path: Path, found: Any, hints: Hints) -> ForeignModel:
    """Return the GPT-2 in what a file of torch.save holds. Raises UserError, which says what it is instead."""
    if isinstance(found, StandIn):
        raise UserError(
            f"{path}: holds an object of the class {found.path}, of which only its code could make a model; save "
            "model.state_dict() instead"
        )
    if (state := find_state(found)) is None:
        what = f"a dict of {', '.join(map(str, list(found)[:5]))}" if isinstance(found, dict) else type(found).__name__
        raise UserError(f"{path}: not a checkpoint: holds {what}, and no state dict of a model")
    return read_state(path, *state, hints)


def read_state(path: Path, state: dict[str, Tensor], beside: dict[str, Any], hints: Hints) -> ForeignModel:
    """Return the GPT-2 of a state dict. beside: what the file holds next to it. Raises UserError."""
    weights = bring_to_our_names(path, state)
    if weights.conv1d and (path.parent / CONFIG).is_file():
        return read_single_file(path, state, hints)
    settings = _settings_of(beside)
    kind, activation = _recognise(weights, beside, settings)
    heads = next((settings[name] for name in HEADS if type(settings.get(name)) is int), None)
    for name in SAME:
        if type(settings.get(name)) is int and settings[name] != weights.shape[name]:
            raise UserError(f"{path}: says {name}={settings[name]}, but its tensors have {weights.shape[name]}")
    n_head, activation = hints.complete(path, heads, activation)
    dropout = settings.get("dropout", 0.0)
    config = _config_of(path, weights, n_head, activation, dropout if 0 <= _number(dropout) < 1 else 0.0)
    step = next((beside[name] for name in STEPS if type(beside.get(name)) is int), 0)
    tokenizer = _tokenizer_of(path, beside, config)
    return ForeignModel(kind, config, fill_in(path, weights, config, "a GPT-2"), tokenizer.to_json(), max(step, 0))


def _config_of(path: Path, weights: Weights, n_head: int, activation: str, dropout: float) -> GPTConfig:
    try:
        return GPTConfig(**weights.shape, n_head=n_head, activation=activation, dropout=dropout)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _settings_of(beside: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a file keeps beside its weights, where those say how many heads there are."""
    for key in SETTINGS:
        found = beside.get(key)
        for each in (found, *_values(found)):
            settings = _values_by_name(each)
            if any(name in settings for name in HEADS):
                return settings
    return {}


def _values_by_name(found: Any) -> dict[str, Any]:
    """Return a dict, or an object's attributes, as a dict."""
    return found if isinstance(found, dict) else vars(found) if isinstance(found, StandIn) else {}


def _values(found: Any) -> list[Any]:
    return list(_values_by_name(found).values())


def _recognise(weights: Weights, beside: dict[str, Any], settings: dict[str, Any]) -> tuple[str, str | None]:
    """Return whose file it is and its activation, None where only the user knows."""
    fields = settings.keys()
    if not weights.conv1d and fields >= BUILD_NANOGPT:
        # nanoGPT has had the exact GELU since May 2023; before that it wrote the same files with the tanh's
        if fields <= NANOGPT and ("model_args" in beside or fields == NANOGPT):
            return "nanoGPT's", "gelu"
        if fields == BUILD_NANOGPT:
            return "build-nanogpt's", "gelu_tanh"
    if not weights.conv1d and weights.masked and not weights.shape["tied_head"] and weights.shape["bias"]:
        return "minGPT's", "gelu_tanh"
    named = settings.get("activation", settings.get("activation_function"))
    return "a state dict", named if isinstance(named, str) and named in ACTIVATIONS else None


def _tokenizer_of(path: Path, beside: dict[str, Any], config: GPTConfig) -> Tokenizer:
    """Return the tokenizer of nanoGPT's meta.pkl where it is found, or GPT-2's where the vocabulary has its size."""
    trained = beside.get("config")
    dataset = trained.get("dataset") if isinstance(trained, dict) else None
    if (meta := find_meta(path, dataset)) is not None:
        tokenizer = tokenizer_of_meta(meta)
        if tokenizer.vocab_size == config.vocab_size:  # else it is of other data
            return tokenizer
    return gpt2_or_none(config.vocab_size)


def _number(found: Any) -> float:
    return found if type(found) in (int, float) else 0.0
