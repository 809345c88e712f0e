"""Text to token ids and back. No torch here, so that a compiled model can speak without it."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gpt.cli import UserError
from gpt.config import GPTConfig


@dataclass(frozen=True)
class CharTokenizer:
    """One id a character: its place in `characters`, which are sorted and differ from each other."""

    characters: str

    def __post_init__(self) -> None:
        if not self.characters or list(self.characters) != sorted(set(self.characters)):
            raise UserError(f"characters={self.characters!r}: must be at least one, sorted, and no two the same")

    @classmethod
    def of_text(cls, text: str) -> "CharTokenizer":
        """The tokenizer of exactly the characters that occur in `text`. Raises UserError if it is empty."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        """How many ids there are; they are 0 … vocab_size - 1."""
        return len(self.characters)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {character: index for index, character in enumerate(self.characters)}

    def encode(self, text: str) -> list[int]:
        """The ids of a text, one a character. Raises UserError that names the first character not in the vocabulary."""
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise UserError(
                f"the character {character!r} (place {text.index(character)}) is not among the {self.vocab_size} that "
                "the model was trained on; leave it out"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids. Raises UserError for an id outside 0 … vocab_size - 1."""
        ids = list(ids)
        if bad := [index for index in ids if not 0 <= index < self.vocab_size]:
            raise UserError(f"token id {bad[0]}: must be in 0 … {self.vocab_size - 1}")
        return "".join(self.characters[index] for index in ids)

    def to_json(self) -> dict[str, Any]:
        """What `tokenizer_from_json` reads back."""
        return {"kind": "characters", "characters": self.characters}


@dataclass(frozen=True)
class NoTokenizer:
    """Of a model with random weights, which knows ids and no text. `encode` and `decode` raise UserError."""

    def encode(self, text: str) -> list[int]:
        """Raises UserError."""
        raise UserError("this model has random weights and no tokenizer; train one with: python -m gpt.train")

    def decode(self, ids: Iterable[int]) -> str:
        """Raises UserError."""
        return self.encode("")

    def to_json(self) -> dict[str, Any]:
        """What `tokenizer_from_json` reads back."""
        return {"kind": "none"}


Tokenizer = CharTokenizer | NoTokenizer


def tokenizer_from_json(found: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_json` described. Raises UserError for a description that is not one of ours."""
    match found:
        case {"kind": "characters", "characters": str(characters)}:
            return CharTokenizer(characters)
        case {"kind": "none"}:
            return NoTokenizer()
    raise UserError(f"{str(found)[:80]}: not a tokenizer of ours; its kind must be 'characters' or 'none'")


def check_ids(ids: Any, config: GPTConfig) -> None:
    """Raise UserError unless `ids`, a list or array of any shape, has at least one id and all are whole and in [0, V).

    For the doors where users enter ids: a kernel that gathers rows of the embedding does not look.
    """
    ids = np.asarray(ids)
    if ids.size == 0:
        raise UserError("no token ids: a model needs at least one to start from")
    if ids.dtype.kind not in "iu":
        raise UserError(f"token ids of dtype {ids.dtype}: must be whole numbers")
    bad = ids[(ids < 0) | (ids >= config.vocab_size)]
    if bad.size:
        raise UserError(f"token id {bad[0]}: must be in 0 … {config.vocab_size - 1} (vocab_size={config.vocab_size})")
