"""The models that a config can name."""

import torch
from torch import Tensor

from gpt.bigram import Bigram
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.model import GPT


def build_model(config: GPTConfig, attention: str = "explicit") -> GPT | Bigram:
    """Return the model that `config.model` names, freshly initialised; a bigram has no attention to choose.

    Raises UserError for an unknown attention.
    """
    return Bigram(config) if config.model == "bigram" else GPT(config, attention)


def weights_of(config: GPTConfig, found: int) -> dict[str, Tensor]:
    """Return the state dict that a model of this config has, on the device `meta`: dtypes and shapes without memory.

    found: the number of tensors that a file has for it. Raises UserError for more layers than that, of which no model
    need be built to know that they are not there, and for sizes that no memory has.
    """
    if config.n_layer > found:
        raise UserError(f"{found} tensors for n_layer={config.n_layer}")
    try:
        with torch.device("meta"):
            return build_model(config).state_dict()
    except RuntimeError as error:  # a product of sizes does not fit in 64 bits
        raise UserError(f"no model has such sizes: {str(error).splitlines()[0]}") from error
