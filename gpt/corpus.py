"""Text to learn from, and batches of it."""

import string
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpt.cli import UserError

DEFAULT_LIMIT = (
    4_000_000  # characters of the default corpus: the demo reads 1.5 million, and loading stays under a second
)
KEPT = frozenset(string.printable) - frozenset("\r\v\f")  # printable ASCII, newline and tab


@dataclass(frozen=True)
class Corpus:
    """A text and where it is from. dropped: how many characters were left out to keep the vocabulary small."""

    name: str
    text: str
    dropped: int = 0


def load_corpus(path: Path | None = None) -> Corpus:
    """The text file at `path` (UTF-8, every character kept), or by default the standard library's source.

    Raises UserError for a file that is missing, not a text file, or empty.
    """
    if path is None:
        return standard_library()
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text (byte {error.start}); give a plain text file, or convert it"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a text file with --corpus") from error
    if not text:
        raise UserError(f"{path}: is empty; give a text file with something in it")
    return Corpus(str(path), text)


def standard_library(limit: int = DEFAULT_LIMIT) -> Corpus:
    """The source of this Python's top-level standard modules, in the order of their names, `limit` characters at most.

    Only printable ASCII, newlines and tabs are kept: 97 characters at most. Raises UserError if Python has no sources.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    parts, size = [], 0
    for path in sorted(folder.glob("*.py")):
        if path.stem in sys.stdlib_module_names and size < limit:  # other files there are this machine's own
            parts.append(path.read_text(encoding="utf-8"))
            size += len(parts[-1])
    text = "".join(parts)[:limit]
    if not text:
        raise UserError(f"{folder}: this Python comes without sources; give a text file with --corpus")
    kept = "".join(filter(KEPT.__contains__, text))
    return Corpus(f"Python {sys.version_info[0]}.{sys.version_info[1]}'s standard library", kept, len(text) - len(kept))


def split(ids: Sequence[int], block_size: int, name: str) -> tuple[Tensor, Tensor]:
    """The first 90 % to train on and the rest to validate on, int64 each. name: of the corpus, for the message.

    Raises UserError if either part has not the block_size + 1 tokens that one sample takes.
    """
    cut = len(ids) * 9 // 10
    train, val = torch.tensor(ids[:cut]), torch.tensor(ids[cut:])
    if len(val) <= block_size:
        raise UserError(
            f"{name}: {len(ids)} tokens are too few for block_size={block_size}; "
            f"give at least {10 * block_size + 1}, or a smaller --block-size"
        )
    return train, val


def random_batches(
    ids: Tensor, block_size: int, batch_size: int, seed: int, device: torch.device | str = "cpu"
) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function whose each call draws the next batch: inputs and targets (the inputs one token later), int64 [B, T].

    ids: int64 [N], N > block_size. The draws depend on `seed` alone.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(ids) - block_size, (batch_size, 1), generator=generator)  # [B, 1]
        windows = ids[starts + torch.arange(block_size + 1)].to(device)  # [B, T+1]
        return windows[:, :-1], windows[:, 1:]  # [B, T] each

    return draw
