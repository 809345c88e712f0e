"""Read nanoGPT's data: the characters in meta.pkl, and tokens in train.bin and val.bin."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from gpt.cli import UserError
from gpt.foreign.unpickle import load_plain
from gpt.tokenizer import CharTokenizer, GPT2Tokenizer

META, PARTS = "meta.pkl", ("train", "val")
DTYPE = np.dtype("<u2")  # of a token in a file


def find_meta(checkpoint: Path, dataset: Any = None) -> Path | None:
    """Find the meta.pkl of a checkpoint: beside it, or in data/DATASET of the repository that it was trained in.

    The repository is the folder above the checkpoint's own, as nanoGPT writes out-…/ckpt.pt, or the working directory.
    """
    places = [checkpoint.parent]
    if isinstance(dataset, str) and re.fullmatch(r"\w[\w.-]*", dataset):  # a path with `..` leads elsewhere
        places += [root / "data" / dataset for root in (checkpoint.resolve().parents[1], Path())]
    return next((place / META for place in places if (place / META).is_file()), None)


def tokenizer_of_meta(path: Path) -> CharTokenizer:
    """Return the tokenizer of a meta.pkl, by plain values alone: nothing in the file is run. Raises UserError."""
    try:
        itos = load_plain(path.read_bytes())["itos"]
        characters = [itos[index] for index in range(len(itos))]
    except MemoryError:
        raise
    except Exception as error:  # pickle raises many kinds for what is no pickle
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f"{path}: not nanoGPT's meta.pkl, a pickle of a dict with itos ({reason})") from error
    if not all(isinstance(each, str) and len(each) == 1 for each in characters):
        odd = next(each for each in characters if not isinstance(each, str) or len(each) != 1)
        raise UserError(f"{path}: has the token {str(odd)[:40]!r}, and can be read if each is one character")
    try:
        return CharTokenizer("".join(characters))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def is_token_folder(folder: Path) -> bool:
    """Return whether a folder holds train.bin and val.bin, as nanoGPT's prepare.py writes them."""
    return all((folder / f"{part}.bin").is_file() for part in PARTS)


def open_tokens(folder: Path) -> tuple[CharTokenizer | GPT2Tokenizer, dict[str, np.ndarray]]:
    """Map train.bin and val.bin of a folder into memory: uint16, by the characters of its meta.pkl, or else GPT-2's.

    Raises UserError for a file that is empty or cut, and for tokens beyond the vocabulary.
    """
    tokenizer = tokenizer_of_meta(folder / META) if (folder / META).exists() else GPT2Tokenizer()
    found: dict[str, np.ndarray] = {}
    for part in PARTS:
        path = folder / f"{part}.bin"
        size = path.stat().st_size
        if size == 0 or size % DTYPE.itemsize:
            raise UserError(f"{path}: has {size} bytes, no whole number of tokens of {DTYPE.itemsize}; make it again")
        found[part] = np.memmap(path, DTYPE, "r")
        if (most := int(found[part].max())) >= tokenizer.vocab_size:
            whose = f"its {META} has" if (folder / META).exists() else f"there is no {META}, and GPT-2 has"
            raise UserError(f"{path}: has the token {most}, and {whose} {tokenizer.vocab_size} of them")
    return tokenizer, found
