"""Read text from a file, a folder, JSONL, Parquet, a Hugging Face dataset, or Python's own sources."""

import importlib.util
import json
import re
import string
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gpt.cli import UserError
from gpt.tokenizer import check_unicode

DEFAULT_LIMIT = 4_000_000  # characters of Python's sources: the demo reads 1.5 million, and loading is under a second
KEPT = frozenset(string.printable) - frozenset("\r\v\f")  # printable ASCII, newline and tab
CONTROL = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # characters of no text, but for one that strayed into it
CONTROL_SHARE = 0.01  # from which on a file is no text
HUGGING_FACE = re.compile(r"hf:(?P<path>[^:@]+)(:(?P<name>[^@]+))?(@(?P<revision>.+))?")
# OpenWebText's main branch is a script, which datasets 4 and later refuse; its Parquet copy is a branch of its own
NAMED = {
    "hf:openwebtext": "hf:Skylion007/openwebtext@refs/convert/parquet",
    "hf:fineweb-edu": "hf:HuggingFaceFW/fineweb-edu:sample-10BT",
}


class Document(NamedTuple):
    """A text and what it takes of its source. whole: it is one of many; else it is a text that can be cut in two."""

    text: str
    whole: bool
    size_bytes: float


@dataclass(frozen=True)
class Source:
    """Gives documents in an order that is always the same.

    name: as the user gave it. files: in the order in which they are read; none of a dataset that is streamed.
    text_field: where JSONL, Parquet and datasets have the text.
    """

    name: str
    files: tuple[Path, ...]
    text_field: str = "text"

    @property
    def size_bytes(self) -> int | None:
        """Bytes of all its files; None of a dataset that is streamed."""
        return sum(path.stat().st_size for path in self.files) if self.files else None

    def documents(self) -> Iterator[Document]:
        """Yield all of them, one at a time. Raises UserError for one that is not text."""
        if not self.files:
            yield from _stream(self.name, self.text_field)
        for path in self.files:
            try:
                yield from READERS.get(path.suffix, _read_text)(path, self.text_field)
            except OSError as error:
                reason = error.strerror or str(error).splitlines()[0][:120]  # pyarrow's own have no number
                raise UserError(f"{path}: cannot be read ({reason}); give a text file or a folder") from error


def find_source(name: str, text_field: str = "text") -> Source:
    """The source of that name: a path, or `hf:NAME[:CONFIG][@REVISION]` (`hf:openwebtext` and `hf:fineweb-edu` know
    theirs). Of a folder all files are read, in the order of their names; hidden ones are left out.

    Raises UserError for a path that is missing or an empty folder.
    """
    if name.startswith("hf:"):
        return Source(NAMED.get(name, name), (), text_field)
    path = Path(name)
    files: tuple[Path, ...] = (path,)
    if path.is_dir():
        files = tuple(sorted(each for each in path.rglob("*") if each.is_file() and not _is_hidden(each, path)))
        if not files:
            raise UserError(f"{path}: a folder without files; give one with text files, JSONL or Parquet in it")
    elif not path.exists():
        raise UserError(f"{path}: cannot be read (No such file or directory); give a text file or a folder")
    return Source(name, files, text_field)


def read_text(path: Path | str) -> str:
    """Read a text file (UTF-8), every character kept. Raises UserError if it is missing, not a text file, or empty.

    Numbers are often valid UTF-8, such as the tokens of a small vocabulary; what tells them is that they hold NUL, or
    other control characters in numbers.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text (byte {error.start}); give a plain text file, or convert it"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a text file") from error
    if not text:
        raise UserError(f"{path}: is empty; give a text file with something in it")
    controls = CONTROL.findall(text)
    if "\0" in controls or len(controls) > CONTROL_SHARE * len(text):
        first = controls[0] if "\0" not in controls else "\0"
        raise UserError(
            f"{path}: not text but bytes (it holds {first!r}, place {text.index(first)}); give a plain text file, or a "
            "folder of token files: of python -m gpt.corpus, or nanoGPT's with train.bin and val.bin"
        )
    return text


def standard_library(limit: int = DEFAULT_LIMIT) -> tuple[str, str]:
    """Read this Python's top-level standard modules, in the order of their names; return that and what to call it.

    limit: how many characters at most. Only printable ASCII, newlines and tabs are kept: 97 different ones at most.
    Raises UserError if Python has no sources.
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
    dropped = f" ({len(text) - len(kept):,} characters other than ASCII left out)"
    return kept, f"Python {sys.version_info[0]}.{sys.version_info[1]}'s standard library{dropped}"


def _read_text(path: Path, text_field: str) -> Iterator[Document]:
    yield Document(read_text(path), whole=False, size_bytes=path.stat().st_size)


def _read_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    """Yield a document a line; empty lines are none."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
                    raise UserError(f"{path}:{number}: not a line of JSON; mend it or leave it out") from error
                yield Document(_text_of(found, text_field, f"{path}:{number}"), True, len(line))


def _read_parquet(path: Path, text_field: str) -> Iterator[Document]:
    """Yield a document a row."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{path}: needs the package pyarrow; install it with: pip install pyarrow")
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a Parquet file ({str(error)[:80]}); fetch it again") from error
    if text_field not in file.schema_arrow.names:
        raise UserError(f"{path}: has no column {text_field!r} but {', '.join(file.schema_arrow.names)}: --text-field")
    row_bytes, row = path.stat().st_size / max(1, file.metadata.num_rows), 0
    batches = file.iter_batches(batch_size=1024, columns=[text_field])
    while True:
        try:
            if (batch := next(batches, None)) is None:
                return
            rows = batch.to_pylist()
        except (pyarrow.ArrowException, ValueError) as error:  # damaged pages, or bytes that are not UTF-8
            reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
            raise UserError(f"{path}: is damaged after row {row} ({reason}); fetch it again") from error
        for found in rows:
            row += 1
            yield Document(_text_of(found, text_field, f"{path}, row {row}"), True, row_bytes)


READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}  # by suffix; all other files are texts


def _stream(name: str, text_field: str) -> Iterator[Document]:
    """Yield the rows of a Hugging Face dataset's part `train`, as they come over the network."""
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"{name}: needs the package datasets; install it with: pip install datasets")
    if not (match := HUGGING_FACE.fullmatch(name)):
        raise UserError(f"{name}: must be hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG@REVISION")
    import datasets

    row = 0
    try:
        for found in datasets.load_dataset(**match.groupdict(), split="train", streaming=True):
            row += 1
            text = _text_of(found, text_field, f"{name}, row {row}")
            yield Document(text, True, len(text))
    except UserError:
        raise
    except Exception as error:  # any library may carry the bytes, and they change
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        raise UserError(f"{name}: {reason} (after {row} rows); mend it and run the same command to go on") from error


def _text_of(found: Any, text_field: str, where: str) -> str:
    text = found.get(text_field) if isinstance(found, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{where}: has no text under {text_field!r}; name its field with --text-field")
    check_unicode(text, where)
    return text


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)
