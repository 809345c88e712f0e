"""The bigram baseline: the next token by the last alone. One table: the smallest model that walks every path."""

from torch import Tensor, nn

from gpt.cache import KVCache
from gpt.config import GPTConfig
from gpt.model import check_length


class Bigram(nn.Module):
    """A table with a row of V logits for each token, freshly initialised from torch's global generator.

    config: of `GPTConfig.bigram`. It is called as `gpt.model.GPT` is.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)
        nn.init.normal_(self.table.weight, std=0.02)  # nearly uniform: the loss begins at ln V

    def forward(self, ids: Tensor, last_only: bool = False, cache: KVCache | None = None) -> Tensor:
        """Return logits [B, T, V], or [B, 1, V] with `last_only`, as GPT.forward does. A cache holds nothing of it."""
        check_length(ids, cache, self.config)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.table(ids[:, -1:] if last_only else ids)  # [B, T, V] or [B, 1, V]

    def parameter_count(self) -> int:
        """Return how many numbers are learned: V²."""
        return self.table.weight.numel()
