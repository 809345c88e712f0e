"""The models that a config can name."""

from gpt.bigram import Bigram
from gpt.config import GPTConfig
from gpt.model import GPT


def build_model(config: GPTConfig, attention: str = "explicit") -> GPT | Bigram:
    """Return the model that `config.model` names, freshly initialised; a bigram has no attention to choose.

    Raises UserError for an unknown attention.
    """
    return Bigram(config) if config.model == "bigram" else GPT(config, attention)
