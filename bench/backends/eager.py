"""Runs eager PyTorch: the model as it is written, one operator after the other, with explicit attention."""

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bench.backends import Backend, Variant
from bench.correctness.agreement import PRECISIONS
from bench.models.artifacts import CHECKPOINT, Artifacts
from gpt.cli import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from gpt.bigram import Bigram
    from gpt.model import GPT

FILES = dict.fromkeys(("prefill", "decode", "generate"), CHECKPOINT)


class Engine(Backend[Artifacts]):
    """The baseline of every float32 speedup.

    In bfloat16, weights, KV cache and activations are all bfloat16.
    """

    requires: ClassVar[dict[str, str]] = {"torch": "torch"}
    summary = "PyTorch, one operator after the other, attention spelled out; a KV cache in place"
    variants: ClassVar[dict[str, Variant]] = {
        "": Variant(FILES),
        "bf16": Variant(FILES, "bf16", about="all of it in bfloat16"),
    }
    attention: ClassVar[str] = "explicit"

    @property
    def arithmetic(self) -> str:
        """Return torch's name of the dtype of weights and activations."""
        return PRECISIONS[self.variant.precision].dtype

    def _load(self, artifacts: Artifacts, threads: int) -> None:
        import torch

        from gpt.checkpoint import load_checkpoint

        torch.set_num_threads(threads)
        model = load_checkpoint(artifacts.checkpoint).build(attention=self.attention)
        self._model = model.to(getattr(torch, self.arithmetic))

    def _prefill(self, ids: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self._to_numpy(self._model(torch.from_numpy(ids)))

    def _fill(self, ids: np.ndarray) -> np.ndarray:
        import torch

        from gpt.cache import KVCache

        self._cache = KVCache(self.gpt, len(ids), dtype=getattr(torch, self.arithmetic))
        return self._step(ids)

    def _decode(self, ids: np.ndarray, context: int) -> np.ndarray:
        self._cache.length = context
        return self._step(ids)

    def _step(self, ids: np.ndarray) -> np.ndarray:
        """Append ids to the cache and return the last position's logits [B, V]."""
        import torch

        with torch.inference_mode():
            return self._to_numpy(self._model(torch.from_numpy(ids), last_only=True, cache=self._cache))[:, -1]

    def _to_numpy(self, logits: "Tensor") -> np.ndarray:
        """Return a view of the logits, or a float32 copy of bfloat16, for which numpy has no dtype."""
        return (logits.float() if self.arithmetic == "bfloat16" else logits).numpy()

    def versions(self) -> dict[str, str]:
        import torch

        return {"torch": torch.__version__}


def gpt_of(model: "GPT | Bigram") -> "GPT":
    """Return the model, which must be a GPT. Raises UserError for a bigram, which has no attention and no cache."""
    from gpt.model import GPT

    if not isinstance(model, GPT):
        raise UserError("model 'bigram': it has no cache and no attention")
    return model
