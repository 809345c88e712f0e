"""python -m gpt.corpus input.txt -o artifacts/corpus
python -m gpt.corpus texts/ --tokenizer characters
python -m gpt.corpus hf:fineweb-edu -o artifacts/fineweb-edu --max-tokens 1_000_000_000

Turn text into token files that training maps into memory. Killed half-way, the same command goes on.
"""

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is one line too
    from gpt.cli import run_main

    run_main("gpt.corpus")

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from gpt.arguments import parse_settings
from gpt.batches import Tokens
from gpt.cli import UserError
from gpt.documents import Document, Source, find_source, read_text, standard_library
from gpt.files import atomic_output, hold_output, sha256_file
from gpt.foreign.nanogpt import is_token_folder, open_tokens
from gpt.progress import progress_bar
from gpt.tokenizer import CharTokenizer, GPT2Tokenizer, TextTokenizer, tokenizer_from_json

KIND = "gpt-frontend corpus"
VERSION = 1
MANIFEST = "manifest.json"
PARTS = ("train", "val")
VAL_SHARE = 0.1
AT_ONCE = 4_000_000  # characters tokenised in one call: enough to keep all processors busy
TOKENIZERS = ("characters", "gpt2")
DTYPES = ("<u2", "<u4")


@dataclass(frozen=True)
class Shard:
    """Tells what tokens an array has. sha256: of its bytes, as they were when it was made.

    file: where it is, None for tokens that no file holds. size_bytes, changed_ns: the file's size, and the time of its
    last change, which nobody can set; 0 without a file.
    """

    sha256: str
    file: Path | None = None
    size_bytes: int = 0
    changed_ns: int = 0


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and to validate on, and the tokenizer that they are of.

    name: for messages. shards: of `train` and of `val`, what their arrays are.
    """

    name: str
    tokenizer: TextTokenizer
    train: Tokens
    val: Tokens
    shards: dict[str, list[Shard]]

    def identity(self) -> dict[str, list[list[Any]]]:
        """Return what tells this corpus from others, for `change_since`: plain values, which a checkpoint can keep."""
        return {
            part: [[shard.sha256, shard.size_bytes, shard.changed_ns] for shard in shards]
            for part, shards in self.shards.items()
        }

    def change_since(self, before: dict[str, list[list[Any]]], *, read: bool = True) -> str | None:
        """Say what has changed since the `identity` of before; None if nothing has.

        Only a token file whose size or time of change is not what it was is read and hashed anew, and with `read=False`
        none is: a corpus of any size that was left alone costs nothing.
        """
        for part, shards in self.shards.items():
            if [shard.sha256 for shard in shards] != [sha256 for sha256, *_ in before.get(part, [])]:
                return f"its tokens of {part} are others"
        rows = [
            (shard, row)
            for part, shards in self.shards.items()
            for shard, row in zip(shards, before.get(part, []), strict=True)
        ]
        touched = [shard for shard, row in rows if shard.file and [shard.size_bytes, shard.changed_ns] != row[1:]]
        return _find_edited(touched) if read and touched else None


@dataclass(frozen=True)
class CorpusConfig:
    """Turn text into token files that training maps into memory. Killed half-way, the same command goes on.

    Of a text the first part is trained on and the rest validates; of documents (JSONL, Parquet, a dataset) every
    tenth validates, by default, and of the first n of them the share of n, rounded down. Between two documents stands
    the tokenizer's end of text.
    Raises UserError (a ValueError) that names the field, its value and what is allowed.
    """

    source: tyro.conf.Positional[str]  # a file, a folder, or hf:NAME[:CONFIG][@REVISION]; .jsonl, .parquet, else text
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("artifacts/corpus")  # the folder to write
    tokenizer: Literal["gpt2", "characters"] = "gpt2"
    text_field: str = "text"  # where JSONL, Parquet and datasets have the text
    val_share: float = VAL_SHARE  # of the text or of the documents, to validate on
    shard_tokens: int = 100_000_000  # a file of tokens ends with the document that fills it; a killed run loses one
    max_tokens: int | None = None  # stop after so many in all; of a text, the share of them validates

    def __post_init__(self) -> None:
        if not 0 < self.val_share <= 0.5:
            raise UserError(f"val_share={self.val_share}: must be above 0 and at most 0.5")
        if self.shard_tokens < 1:
            raise UserError(f"shard_tokens={self.shard_tokens}: must be at least 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens}: must be at least 1")


def load_corpus(path: Path | str | None, tokenizer: str | None = None) -> Corpus:
    """Read a text file, tokenised here (by characters unless `tokenizer` is `gpt2`), or a folder of `build_corpus`.

    A folder may also be nanoGPT's, with train.bin and val.bin: its characters are those of its meta.pkl, without which
    the tokens are GPT-2's. None is Python's own sources. The first 90 % of a text's characters are trained on. Raises
    UserError for what cannot be read, or a folder of another tokenizer than the one asked for.
    """
    if path is not None and Path(path).is_dir():
        return open_corpus(Path(path), tokenizer)
    text, name = standard_library() if path is None else (read_text(path), str(path))
    coder: TextTokenizer = GPT2Tokenizer() if tokenizer == "gpt2" else CharTokenizer.of_text(text)
    train, val = (np.array(coder.encode(part), _dtype_of(coder)) for part in _cut(text, VAL_SHARE))
    shards = {part: [Shard(_sha256(ids))] for part, ids in zip(PARTS, (train, val), strict=True)}
    return Corpus(name, coder, Tokens([train]), Tokens([val]), shards)


def open_corpus(folder: Path, tokenizer: str | None = None) -> Corpus:
    """Map the corpus in a folder of `build_corpus`, or of nanoGPT's, into memory.

    nanoGPT's files are read once, for their hashes. Raises UserError, also for a half-made folder.
    """
    manifest = _read_manifest(folder)
    if manifest is None and is_token_folder(folder):
        corpus = _open_nanogpt(folder)
    elif manifest is None:
        raise UserError(f"{folder}: no corpus ({MANIFEST} is absent); make one with: python -m gpt.corpus TEXT -o …")
    elif not manifest["complete"]:
        raise UserError(f"{folder}: is half made; run the command that began it again, and it goes on")
    else:
        train, val = (Tokens([_map(folder, shard, manifest["dtype"]) for shard in manifest[part]]) for part in PARTS)
        shards = {part: [_shard(folder, shard) for shard in manifest[part]] for part in PARTS}
        corpus = Corpus(str(folder), _coder_of(folder, manifest), train, val, shards)
    found = "gpt2" if isinstance(corpus.tokenizer, GPT2Tokenizer) else "characters"
    if tokenizer not in (None, found):
        raise UserError(f"{folder}: was made with tokenizer {found!r}, not {tokenizer!r}; leave --tokenizer out")
    return corpus


def _open_nanogpt(folder: Path) -> Corpus:
    coder, tokens = open_tokens(folder)
    files = {part: {"file": f"{part}.bin", "sha256": sha256_file(folder / f"{part}.bin")} for part in PARTS}
    shards = {part: [_shard(folder, file)] for part, file in files.items()}
    return Corpus(str(folder), coder, Tokens([tokens["train"]]), Tokens([tokens["val"]]), shards)


def build_corpus(config: CorpusConfig) -> Corpus:
    """Write the folder that `config` describes, or go on with it, and open it. A complete one is verified instead.

    Raises UserError for a source that cannot be read, or a folder that holds something else or is being written.
    """
    with hold_output(config.output):
        return _build_held(config)


def _build_held(config: CorpusConfig) -> Corpus:
    source = find_source(config.source, config.text_field)
    request = _request_of(config, source)
    manifest, new = _read_manifest(config.output), not config.output.exists()
    if manifest is None:
        _check_empty(config.output)
        coder: TextTokenizer = GPT2Tokenizer() if config.tokenizer == "gpt2" else _characters_of(source)
        coder.encode("")  # a table that is not there is found before anything is written
        manifest = _new_manifest(request, coder)
        _write_manifest(config.output, manifest)  # from now on the folder is known for ours
    elif manifest["request"] != request:
        raise UserError(
            f"{config.output}: holds a corpus of another source or settings; choose another -o, or remove it"
        )
    if manifest["complete"]:
        verify_corpus(config.output)
    else:
        try:
            _build(config, source, manifest)
        except UserError:
            if not any(manifest[part] for part in PARTS):  # there is nothing that a second run could go on with
                (config.output / MANIFEST).unlink()
                with suppress(OSError):  # another's file is in there
                    if new:
                        config.output.rmdir()
            raise
    return open_corpus(config.output)


def verify_corpus(folder: Path) -> None:
    """Raise UserError, naming the file, unless every token file has the SHA-256 that the manifest says."""
    manifest = _read_manifest(folder) or {part: [] for part in PARTS}
    for shard in progress_bar([shard for part in PARTS for shard in manifest[part]], desc="verify", unit="file"):
        path = folder / shard["file"]
        if not path.exists() or sha256_file(path) != shard["sha256"]:
            raise UserError(f"{path}: is not as it was written; remove {folder} and make it again")


def _find_edited(shards: list[Shard]) -> str | None:
    """Say which token file no longer has its hash; None if all have."""
    for shard in progress_bar(shards, desc="verify", unit="file"):
        if shard.file and sha256_file(shard.file) != shard.sha256:
            return f"{shard.file} is not as it was written"
    return None


class _Shards:
    """A corpus being written: what its manifest counts is safe, what is pending is lost if the process dies."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.pending: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}
        for path in folder.glob(".*"):  # a killed run was writing it
            shutil.rmtree(path, ignore_errors=True)

    def add(self, part: str, ids: list[int], separator: list[int], room: int | None) -> None:
        """Append a document's ids behind a separator, as far as there is room."""
        begun = self.manifest[part] or self.pending[part]
        fitting = (separator + ids if begun else ids)[:room]
        if fitting:
            self.pending[part].append(np.array(fitting, self.manifest["dtype"]))

    def pending_tokens(self) -> int:
        return sum(len(ids) for part in PARTS for ids in self.pending[part])

    def tokens(self, part: str) -> int:
        """Count the tokens of a part, written or pending."""
        return sum(map(len, self.pending[part])) + sum(shard["tokens"] for shard in self.manifest[part])

    def all_tokens(self) -> int:
        return sum(map(self.tokens, PARTS))

    def write(self, documents: int) -> None:
        """Write what is pending as a file a part, then the manifest that counts them and the documents so far."""
        for part in PARTS:
            ids = np.concatenate([*self.pending[part], np.array([], self.manifest["dtype"])])
            self.pending[part].clear()
            if len(ids):
                path = self.folder / f"{part}-{len(self.manifest[part]):05d}.bin"
                with atomic_output(path) as scratch:
                    ids.tofile(scratch)
                self.manifest[part].append({"file": path.name, "tokens": len(ids), "sha256": _sha256(ids)})
        self.manifest["documents"] = documents
        _write_manifest(self.folder, self.manifest)


def _build(config: CorpusConfig, source: Source, manifest: dict[str, Any]) -> None:
    """Tokenise what the manifest does not count yet, shard by shard."""
    shards, coder = _Shards(config.output, manifest), _coder_of(config.output, manifest)
    separator, done, documents = _end_of_text(coder), manifest["documents"], source.documents()
    with progress_bar(total=source.size_bytes, unit="B", unit_scale=True, desc="corpus") as bar:
        for document in itertools.islice(documents, done):
            bar.update(document.size_bytes)
        for group in _grouped(documents, min(AT_ONCE, config.shard_tokens)):
            if config.max_tokens and shards.all_tokens() >= config.max_tokens:
                break
            pieces = [
                (document.whole, *piece)
                for number, document in enumerate(group, done)
                for piece in _pieces(document, number, config)
            ]
            for (whole, part, _), ids in zip(pieces, coder.encode_all([text for *_, text in pieces]), strict=True):
                shards.add(part, ids, separator, _room(config, shards, None if whole else part))
            done += len(group)
            if shards.pending_tokens() >= config.shard_tokens:
                shards.write(done)
            bar.update(sum(document.size_bytes for document in group))
            bar.set_postfix(documents=done, tokens=f"{shards.all_tokens():,}")
    shards.write(done)
    for part in PARTS:
        if not manifest[part]:
            raise UserError(f"{config.source}: its {done} documents leave nothing for {part}; change --val-share")
    _write_manifest(config.output, manifest | {"complete": True})


def _room(config: CorpusConfig, shards: _Shards, part: str | None) -> int | None:
    """Return how many more tokens `max_tokens` allows, None for any number.

    part: of a text, whose parts have their shares of `max_tokens`; None for documents, which share all of it.
    """
    if config.max_tokens is None:
        return None
    if part is None:
        return config.max_tokens - shards.all_tokens()
    train = int(config.max_tokens * (1 - Fraction(str(config.val_share))))
    return (train if part == "train" else config.max_tokens - train) - shards.tokens(part)


def _pieces(document: Document, number: int, config: CorpusConfig) -> list[tuple[str, str]]:
    """Return the parts that the document with this number, counted from 0, belongs to, each with its text."""
    if document.whole:
        share = Fraction(str(config.val_share))  # as it was written: 0.3 has no exact float
        validates = int((number + 1) * share) > int(number * share)
        return [("val" if validates else "train", document.text)]
    return list(zip(PARTS, _cut(document.text, config.val_share), strict=True))


def _grouped(documents: Iterable[Document], characters: int) -> Iterator[list[Document]]:
    """Yield the documents in groups of so many characters or a little more."""
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def _request_of(config: CorpusConfig, source: Source) -> dict[str, Any]:
    """Return what a corpus is made of: a half-made one goes on only if none of this has changed."""
    files = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in source.files]
    return {
        "source": source.name,
        "files": len(files),
        "files_sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest(),  # hashes their names, sizes and times
        "tokenizer": config.tokenizer,
        "text_field": config.text_field,
        "val_share": config.val_share,
        "shard_tokens": config.shard_tokens,
        "max_tokens": config.max_tokens,
    }


def _new_manifest(request: dict[str, Any], coder: TextTokenizer) -> dict[str, Any]:
    return {
        "kind": KIND,
        "version": VERSION,
        "complete": False,
        "request": request,
        "tokenizer": coder.to_json(),
        "dtype": _dtype_of(coder).str,
        "documents": 0,
        "train": [],
        "val": [],
    }


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a folder's manifest, None where there is none. Raises UserError for one that is not ours or is damaged."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read; remove {folder} and make it again") from error
    if not isinstance(manifest, dict) or (manifest.get("kind"), manifest.get("version")) != (KIND, VERSION):
        raise UserError(f"{path}: not a corpus of this version of the project; remove {folder} and make it again")
    if (wrong := _wrong_entry(manifest)) is not None:
        raise UserError(f"{path}: is damaged ({wrong}); remove {folder} and make it again")
    return manifest


def _wrong_entry(manifest: dict[str, Any]) -> str | None:
    """Say which entry of a manifest cannot be used; None if all can."""
    kinds = {"complete": bool, "request": dict, "tokenizer": dict, "documents": int, "train": list, "val": list}
    for name, kind in kinds.items():
        if type(manifest.get(name)) is not kind:
            return f"its {name} is {str(manifest.get(name))[:40]!r}"
    if manifest.get("dtype") not in DTYPES:
        return f"its dtype is {str(manifest.get('dtype'))[:40]!r}"
    for part in PARTS:
        for number, shard in enumerate(manifest[part]):
            match shard:
                case {"file": str(file), "tokens": int(tokens), "sha256": str(sha256)} if (
                    re.fullmatch(rf"{part}-\d+\.bin", file)  # so it is in this folder, not where `..` leads to
                    and 0 < tokens < 2**48
                    and re.fullmatch("[0-9a-f]{64}", sha256)
                ):
                    continue
            return f"file {number} of {part} is {str(shard)[:80]}"
    return None


def _coder_of(folder: Path, manifest: dict[str, Any]) -> TextTokenizer:
    """Return the tokenizer of a manifest. Raises UserError for one that is not ours, or that knows no text."""
    coder = tokenizer_from_json(manifest["tokenizer"])
    if not isinstance(coder, CharTokenizer | GPT2Tokenizer):
        raise UserError(f"{folder / MANIFEST}: names no tokenizer; remove {folder} and make it again")
    return coder


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    with atomic_output(folder / MANIFEST) as part:
        part.write_text(json.dumps(manifest, indent=1) + "\n")


def _shard(folder: Path, shard: dict[str, Any]) -> Shard:
    """Return what a file of a manifest is, and its size and time of change as they are now."""
    found = (folder / shard["file"]).stat()
    return Shard(shard["sha256"], folder / shard["file"], found.st_size, found.st_ctime_ns)


def _map(folder: Path, shard: dict[str, Any], dtype: str) -> np.ndarray:
    path, count = folder / shard["file"], shard["tokens"]
    if not path.exists() or path.stat().st_size != count * np.dtype(dtype).itemsize:
        raise UserError(f"{path}: is absent or not {count:,} tokens long; remove {folder} and make it again")
    return np.memmap(path, dtype, "r")


def _check_empty(folder: Path) -> None:
    """Raise UserError for a place that holds something else than a corpus."""
    if folder.exists() and (not folder.is_dir() or any(not each.name.startswith(".") for each in folder.iterdir())):
        raise UserError(f"{folder}: holds something else than a corpus; choose another place with -o")


def _characters_of(source: Source) -> CharTokenizer:
    """Return the tokenizer of all characters in a source, which takes a reading of its own."""
    found: set[str] = set()
    with progress_bar(total=source.size_bytes, unit="B", unit_scale=True, desc="characters") as bar:
        for document in source.documents():
            found.update(document.text)
            bar.update(document.size_bytes)
    return CharTokenizer("".join(sorted(found)))


def _cut(text: str, val_share: float) -> tuple[str, str]:
    """Cut a text into its beginning to train on and its end to validate on."""
    cut = int(len(text) * (1 - Fraction(str(val_share))))
    return text[:cut], text[cut:]


def _end_of_text(coder: TextTokenizer) -> list[int]:
    """Return what stands between two documents: GPT-2's end of text; among characters a new line, if there is one."""
    if isinstance(coder, GPT2Tokenizer):
        return [coder.end_of_text]
    return coder.encode("\n") if "\n" in coder.characters else []


def _sha256(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.data).hexdigest()


def _dtype_of(coder: TextTokenizer) -> np.dtype:
    """Return the dtype of a token: two bytes where they are enough; little-endian on any machine."""
    return np.dtype(DTYPES[0] if coder.vocab_size <= 2**16 else DTYPES[1])


def main() -> None:
    """Parse the command line, write the corpus and say what is in it."""
    corpus = build_corpus(parse_settings(CorpusConfig, prog="python -m gpt.corpus"))
    print(f"corpus: {corpus.name}, {corpus.tokenizer.vocab_size:,} different tokens")
    if isinstance(corpus.tokenizer, GPT2Tokenizer):
        print(f"byte pairs: {corpus.tokenizer.table}")
    print(f"train: {len(corpus.train):,} tokens\nval: {len(corpus.val):,} tokens")
