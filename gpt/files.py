"""Files that are either whole or absent, and their hashes. Standard library only."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gpt.cli import UserError


@contextmanager
def atomic_output(path: Path | str, *, directory: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, remove it if not.

    With `directory=True` the temporary path is an empty directory, and an old directory at `path` is replaced.
    Raises UserError when the place cannot be written (permissions, disk full, a parent that is a file).
    """
    path = Path(path)
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        part = scratch / path.name
        if directory:
            part.mkdir()
        yield part
        _replace(part, path, old=scratch / "old")
    except BrokenPipeError:
        raise  # the reader of what was printed in the block has gone: not this output's trouble
    except OSError as error:
        if scratch is not None and error.filename and not _is_within(error.filename, path.parent):
            raise  # some other file's trouble, not this output's
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another place with -o"
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def check_output(path: Path | str) -> None:
    """Raise, before long work, the UserError that `atomic_output(path)` would raise for the file after it."""
    if Path(path).is_dir():
        raise UserError(f"cannot write {path}: it is a directory; name a file with -o")
    with suppress(_Undo), atomic_output(path) as part:
        part.touch()
        raise _Undo


def sha256_file(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Undo(Exception):
    """Leaves `atomic_output` without an output."""


def _replace(part: Path, path: Path, old: Path) -> None:
    """Rename `part` to `path`; a directory there is moved to `old` first, and back if that fails."""
    if not part.is_dir() or not path.exists():
        os.replace(part, path)
        return
    os.rename(path, old)
    try:
        os.replace(part, path)
    except BaseException:
        os.rename(old, path)
        raise


def _is_within(path: str | bytes | int, folder: Path) -> bool:
    return isinstance(path, str) and Path(path).absolute().is_relative_to(folder.absolute())
