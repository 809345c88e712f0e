"""Runs a compiled step over a KV cache on a GPU, and keeps tokens there until all are generated."""

from collections.abc import Callable

import numpy as np
import tvm

from gpt.cli import UserError
from tvm_frontend.graph import CHOOSE
from tvm_frontend.runtime.cuda_graph import Recording, Stream
from tvm_frontend.runtime.exclusive import exclusive
from tvm_frontend.runtime.session import CachedSession, first_of, is_whole, rows_at

LEAST_BUCKET = 16  # the shortest length that prompts are padded to, in tokens


class DeviceSession(CachedSession):
    """A `CachedSession` that also takes and gives tensors on its device, and chooses tokens there.

    When `generate` needs the same work a second time, it is recorded as a CUDA graph: a prompt by B and T, padded to a
    power of two, and a step by B. `begin` makes another cache, so all is recorded anew.
    """

    def _make_own(self) -> None:
        super()._make_own()
        self._choose = self._library.get_function(CHOOSE, query_imports=True)
        self._stream = None if self._on_cpu else Stream()
        self._begun: set[tuple[object, ...]] = set()
        self._recordings: dict[tuple[object, ...], Recording] = {}

    @exclusive
    def begin(self, B: int) -> None:
        super().begin(B)
        self._begun.clear()
        self._recordings.clear()

    @exclusive
    def fill_on_device(self, ids: tvm.runtime.Tensor, rows: tvm.runtime.Tensor | None = None) -> tvm.runtime.Tensor:
        """Put prompts int64 [B, T] in the cache that `begin` made and return logits float32 [B, 1, V] at rows [B].

        By default these are the last rows. Nothing is checked, and nothing waits.
        """
        B, T = ids.shape
        self._filled = np.full(B, T)
        if rows is None:
            rows = self._on_device("last", T - 1, (B,))
        inputs = ids, self._on_device("none", 0, (B,)), *self._cache, self._weights
        if self._parts is None or T == 1:
            return first_of(self._forward(*inputs))
        body, head = self._parts
        return head(first_of(body(*inputs)), rows, self._weights)

    @exclusive
    def decode_on_device(self, ids: tvm.runtime.Tensor, pos: tvm.runtime.Tensor) -> tvm.runtime.Tensor:
        """Compute logits float32 [B, 1, V] of one token each, ids int64 [B, 1], after pos int64 [B] others.

        Nothing is checked, and nothing waits. The session does not know of these tokens: `step` and `decode` refuse to
        go on behind them.
        """
        return first_of(self._forward(ids, pos, *self._cache, self._weights))

    def synchronize(self) -> None:
        """Wait until the device has done all its work."""
        self._device.sync()
        if self._stream is not None:
            self._stream.synchronize()

    @exclusive
    def generate(
        self,
        ids: np.ndarray,
        tokens: int,
        *,
        lengths: np.ndarray | None = None,
        top_k: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> np.ndarray:
        """Continue prompts int64 [B, T] by `tokens` tokens each, int64 [B, tokens], without a round trip a token.

        lengths: int64 [B], where each prompt ends, if not at T. Each token is drawn from the `top_k` likeliest (and
        those as likely as the last of them) by the softmax of their logits / temperature; with 1, or at temperature 0,
        it is the likeliest. The same seed gives the same tokens. Raises UserError for what does not fit.
        """
        ids = self.model.check_ids(ids)
        B, T = ids.shape
        rows = np.full(B, T - 1) if lengths is None else rows_at(ids, lengths)
        room, V = self.model.gpt.block_size - int(rows.max()), self.model.gpt.vocab_size
        if not is_whole(tokens) or not 1 <= tokens <= room:
            raise UserError(f"tokens={tokens}: must be 1 to {room} behind this prompt")
        whole = is_whole(top_k) and is_whole(seed)
        if not whole or not 1 <= top_k <= V or not temperature >= 0 or not 0 <= seed < 2**53:  # NaN is not >= 0
            raise UserError(
                f"top_k={top_k}, temperature={temperature}, seed={seed}: must be 1 to {V}, at least 0, and at least 0"
            )
        if not self._cache or self._cache[0].shape[0] != B:
            self.begin(B)
        bucket = min(self.model.gpt.block_size, max(LEAST_BUCKET, 1 << (T - 1).bit_length()))
        prompt = self._on_device("prompt", np.pad(ids, ((0, 0), (0, bucket - T))), (B, bucket))
        ends = self._on_device("ends", rows, (B,))
        settings = self._on_device("settings", np.array([top_k, temperature, seed], np.float64), (3,))
        following = self._on_device("following", np.zeros((B, 1), np.int64), (B, 1))
        positions = self._on_device("positions", rows, (B,))
        length = self.model.gpt.block_size + 1  # the last token is in no cache
        text = self._on_device("text", np.zeros((B, length), np.int64), (B, length))

        def choose(logits: tvm.runtime.Tensor) -> None:
            self._choose(logits, settings, following, positions, text)

        self._start(("fill", B, bucket), lambda: choose(self.fill_on_device(prompt, ends)))
        for _ in range(tokens - 1):
            self._start(("step", B), lambda: choose(self.decode_on_device(following, positions)))
        self.synchronize()
        self._filled = rows + tokens  # all but the last token
        chosen = text.numpy()
        return np.stack([chosen[b, row + 1 : row + 1 + tokens] for b, row in enumerate(rows)])

    def _start(self, key: tuple[object, ...], work: Callable[[], None]) -> None:
        """Launch work that is always the same for a key, from the second time on as a recorded graph."""
        if self._stream is None:
            work()
        elif key in self._begun:
            if key not in self._recordings:
                self._recordings[key] = self._stream.record(work)
            self._recordings[key].run()
        else:
            with self._stream.use():
                work()
            self._begun.add(key)
