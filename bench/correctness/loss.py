"""Measures the loss on a held-out text, to show the cost of fewer bits in the measure that the model was trained by."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.models.artifacts import Artifacts
from gpt.cli import UserError

TOKENS = 8192  # about so many of the text are read
ROWS = 128  # of logits in float64 at a time: all of GPT-2's would be 400 MB


@dataclass(frozen=True)
class HeldOut:
    """A text that the model was not trained on.

    windows: int64 [N, T + 1], of which the first T tokens are the input and the last T the targets; None if there is no
    text. words: its description, or why there is none.
    """

    windows: np.ndarray | None
    words: str


def find_held_out(artifacts: Artifacts, text: Path | None) -> HeldOut:
    """Read windows of block_size tokens from what training keeps back: the last tenth of a text, `val` of a corpus.

    text: a file or a folder of `gpt.corpus`; by default Python's own sources, if the model's tokenizer is theirs.
    Raises UserError for a text that cannot be read, is too short, or has characters that the model does not know, and
    for one that would not be read, as the model has no loss.
    """
    from gpt.checkpoint import load_checkpoint
    from gpt.corpus import VAL_SHARE, load_corpus, open_corpus
    from gpt.documents import read_text
    from gpt.tokenizer import NoTokenizer, tokenizer_from_json

    if not artifacts.checkpoint.exists():
        return _none("no checkpoint, so no tokenizer: no loss", text)
    checkpoint = load_checkpoint(artifacts.checkpoint)
    tokenizer = tokenizer_from_json(checkpoint.tokenizer)
    if isinstance(tokenizer, NoTokenizer) or not checkpoint.step:
        return _none("no trained model: no loss", text)
    if text is None:
        corpus = load_corpus(None)
        if corpus.tokenizer != tokenizer:
            return HeldOut(None, "what the model was trained on is not known: no loss; --text gives a text")
        tokens, name = corpus.val.read(0, len(corpus.val)), "the last tenth of Python's own sources"
    elif text.is_dir():
        corpus = open_corpus(text)
        if corpus.tokenizer != tokenizer:
            raise UserError(f"{text}: has another tokenizer than the model")
        tokens, name = corpus.val.read(0, len(corpus.val)), f"the validation part of {text}"
    else:
        content = read_text(text)
        kept_back = content[int(len(content) * (1 - VAL_SHARE)) :]
        tokens, name = np.array(tokenizer.encode(kept_back), np.int64), f"the last tenth of {text}"
    T = checkpoint.config.block_size
    if len(tokens) <= T:
        raise UserError(f"{name} has {len(tokens)} tokens, and block_size={T} and one more are needed; see --text")
    windows = windows_of(tokens, T)
    return HeldOut(windows, f"{name}, {windows[:, 1:].size:,} tokens in {len(windows)} windows of {T}")


def _none(why: str, text: Path | None) -> HeldOut:
    """Describe that there is no loss. Raises UserError if a text was asked for."""
    if text is not None:
        raise UserError(f"--text {text}: would not be read: {why}; leave it out, or compare a model that was trained")
    return HeldOut(None, why)


def windows_of(tokens: np.ndarray, T: int) -> np.ndarray:
    """Cut about TOKENS tokens into windows, int64 [N, T + 1], which are spread evenly and do not overlap."""
    fitting = (len(tokens) - 1) // T
    count = min(fitting, max(1, TOKENS // T))
    starts = np.arange(count) * fitting // count * T
    return np.stack([tokens[start : start + T + 1] for start in starts])


def nats_of(logits: np.ndarray, targets: np.ndarray) -> float:
    """Compute the mean cross-entropy in float64, in nats per token, of logits [T, V] against targets int64 [T]."""
    total = 0.0
    for start in range(0, len(targets), ROWS):
        rows = logits[start : start + ROWS].astype(np.float64)  # [rows, V]
        right = np.take_along_axis(rows, targets[start : start + ROWS, None], -1)[:, 0]  # [rows]
        largest = rows.max(-1)
        total += float((largest + np.log(np.exp(rows - largest[:, None]).sum(-1)) - right).sum())
    return total / len(targets)
