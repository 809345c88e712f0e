"""Tokens, and batches of them: each rank its share, and the position one number that a checkpoint can hold."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpt.cli import UserError
from gpt.device import check_memory

ORDERS = ("random", "sequential", "one")


class Tokens:
    """Token ids in a row, kept in one or more arrays (memory-mapped files, say) as if they were one."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.ends = np.cumsum([len(part) for part in self.parts])  # each part's end, counted from the first token

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.parts else 0

    def read(self, start: int, count: int) -> np.ndarray:
        """Return `count` ids from `start` on, int64. Raises IndexError if they are not all there."""
        if not 0 <= start <= start + count <= len(self):
            raise IndexError(f"ids {start} … {start + count} of {len(self)}")
        found = np.empty(count, np.int64)
        part, filled = int(np.searchsorted(self.ends, start, side="right")), 0
        while filled < count:
            begin = start + filled - (self.ends[part] - len(self.parts[part]))
            piece = self.parts[part][begin : begin + count - filled]
            found[filled : filled + len(piece)] = piece
            filled, part = filled + len(piece), part + 1
        return found


@dataclass
class Batches:
    """The batches of a run: each has batch_size sequences, of which each rank takes its own.

    order: `random` blocks, drawn by the seed and the position alone; `sequential`, one block after the other and from
    the start again; `one`, the same random batch each time. micro_batch_size: how many sequences one call of the model
    takes, by default a rank's whole share; batch_size = micro_batch_size × world × the number of micro-batches.
    position: sequences drawn so far by all ranks, which is all that must be kept to go on. vocab_size: what ids must be
    below, if that is known. Raises UserError for sizes that do not fit.
    """

    tokens: Tokens
    block_size: int
    batch_size: int
    order: str = "random"
    seed: int = 0
    rank: int = 0
    world: int = 1
    micro_batch_size: int | None = None
    device: torch.device | str = "cpu"
    position: int = 0
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise UserError(f"order={self.order!r}: must be one of {', '.join(ORDERS)}")
        if len(self.tokens) <= self.block_size:
            raise UserError(f"{len(self.tokens)} tokens: must be more than block_size={self.block_size}")
        if self.batch_size % self.world:
            raise UserError(f"batch_size={self.batch_size}: must be a multiple of the {self.world} ranks")
        if self._share % self._at_once:
            raise UserError(
                f"micro_batch_size={self._at_once}: must divide a rank's share of a batch, which is {self._share} "
                f"(batch_size={self.batch_size} over {self.world} ranks)"
            )
        size = 8 * max(self._at_once * (self.block_size + 1), self.batch_size)  # of ids, or of where sequences begin
        check_memory(size, "a batch's token ids", "lower --batch-size, or --micro-batch-size")

    @property
    def micro_steps(self) -> int:
        """Calls of the model for one batch."""
        return self._share // self._at_once

    @property
    def _share(self) -> int:
        """Sequences of a batch that are this rank's."""
        return self.batch_size // self.world

    @property
    def _at_once(self) -> int:
        """Sequences of a micro-batch: by default the whole share."""
        return self._share if self.micro_batch_size is None else self.micro_batch_size

    def draw(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's share of the next batch, a micro-batch at a time: inputs, and targets one token later.

        int64 [micro_batch_size, block_size] each, on the device. Raises UserError for an id outside the vocabulary.
        """
        starts = self._starts()[self.rank * self._share : (self.rank + 1) * self._share]  # [share]
        self.position += self.batch_size
        for first in range(0, self._share, self._at_once):
            windows = [self.tokens.read(start, self.block_size + 1) for start in starts[first : first + self._at_once]]
            ids = np.stack(windows)  # [micro_batch_size, T+1]
            if self.vocab_size is not None and ids.max() >= self.vocab_size:
                raise UserError(
                    f"the corpus holds the token id {ids.max()}, but its vocabulary has {self.vocab_size}: its files "
                    "are damaged; make it again with gpt.corpus"
                )
            yield self._place(torch.from_numpy(ids))

    def _starts(self) -> np.ndarray:
        """Return where each sequence of the next batch begins, over all ranks: [batch_size]."""
        if self.order == "sequential":
            blocks = (len(self.tokens) - 1) // self.block_size
            return (self.position + np.arange(self.batch_size)) % blocks * self.block_size
        position = 0 if self.order == "one" else self.position
        draw = np.random.default_rng([self.seed, position])
        return draw.integers(len(self.tokens) - self.block_size, size=self.batch_size)

    def _place(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        if torch.device(self.device).type == "cuda":  # pinned memory is copied while the GPU computes
            windows = windows.pin_memory().to(self.device, non_blocking=True)
        else:
            windows = windows.to(self.device)
        return windows[:, :-1], windows[:, 1:]
