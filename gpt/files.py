"""Files that are either whole or absent, and their hashes. Standard library only."""

import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gpt.cli import UserError

ARTIFACTS = Path("artifacts")  # every command writes here unless it is told another place


@contextmanager
def atomic_output(path: Path | str, *, directory: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, remove it if not.

    With `directory=True` the temporary path is an empty directory, and an old directory at `path` is replaced. Folders
    above `path` are made, and after a failure those go again. Where `path` is a link, what it points to is replaced.
    All of it is on the disk before it gets its name, so a loss of power leaves the old or the new, never a part.
    Raises UserError when the place cannot be written (permissions, disk full, a parent that is a file).
    """
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path
    scratch = None
    new = [folder for folder in path.parents if not folder.exists()]
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
        for folder in new:
            with suppress(OSError):  # it holds the output, or another's: it stays
                folder.rmdir()


def find_input(path: Path) -> Path:
    """Find the file that a command reads: `path`, or artifacts/`path` where only that is there, which stderr is told.

    Every command writes to artifacts by default, so a name like ckpt.pt is most likely of a file in there.
    """
    inside = ARTIFACTS / path
    if path.is_absolute() or path.exists() or not inside.exists():
        return path
    print(f"{path} is not here: {inside} is taken", file=sys.stderr)
    return inside


def other_kind(path: Path, wanted: str) -> str | None:
    """Say what `path` is instead of what a command wants, and the command that takes it; None where it cannot be told.

    wanted: `checkpoint`, `ONNX file` or `compiled model`. Checkpoints of torch.save, compiled models and folders of
    Hugging Face's are known by their content, ONNX files by their name.
    """
    kind = None
    if (path / "model.json").is_file():
        kind = "compiled model", "compare it with: python -m bench"
    elif (path / "config.json").is_file():
        kind = "folder of Hugging Face's", f"make a checkpoint of it with: python -m gpt.pretrained {path}"
    elif path.is_file() and _is_torch_save(path):
        kind = "checkpoint", f"export it first with: python -m export.onnx {path}"
    elif path.is_file() and path.suffix == ".onnx":
        kind = "ONNX file", f"compile it with: python -m tvm_frontend.compile {path}"
    if kind is None or kind[0] == wanted:
        return None
    article = "an" if kind[0].startswith("O") else "a"
    return f"{article} {kind[0]}; {kind[1]}"


def beside(source: Path, name: str) -> Path:
    """Return where a command writes what it makes of `source`: beside it, or in artifacts if that is in this folder.

    So what is made of ./ckpt.pt is where the next command looks for it.
    """
    return (ARTIFACTS if source.parent == Path() else source.parent) / name


def check_not_an_input(output: Path | str, *inputs: Path | str) -> None:
    """Raise UserError if an output is one of a command's inputs, or a folder that holds one, by any name or link."""
    output = Path(output).resolve()
    for each in map(Path, inputs):
        if each.resolve().is_relative_to(output) or (output.exists() and each.exists() and output.samefile(each)):
            raise UserError(f"cannot write {output}: {each} is read from there; choose another place with -o")


def check_output(path: Path | str, *inputs: Path | str) -> None:
    """Raise, before long work, the UserError that `atomic_output(path)` would raise for the file after it.

    inputs: what the command reads, none of which it may write on.
    """
    check_not_an_input(path, *inputs)
    if Path(path).is_dir():
        raise UserError(f"cannot write {path}: it is a directory; name a file with -o")
    with suppress(_Undo), atomic_output(path) as part:
        part.touch()
        raise _Undo


def check_replaceable(output: Path | str, is_ours: Callable[[Path], bool], what: str) -> None:
    """Raise UserError if something is at `output`, by any name for it, that is no folder which a command may replace.

    is_ours: returns whether a folder is. what: it is, for the message.
    """
    place = Path(output).resolve()  # also through `..` of a folder that is not there yet
    if place.exists() and not is_ours(place):
        raise UserError(f"{output}: exists and is no {what}, so it is not replaced; choose another with -o")


def sha256_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Undo(Exception):
    """Leaves `atomic_output` without an output."""


def _replace(part: Path, path: Path, old: Path) -> None:
    """Rename `part` to `path`; a directory there is moved to `old` first, and back if that fails."""
    for each in (*part.rglob("*"), part):
        _flush(each)
    if not part.is_dir() or not path.exists():
        os.replace(part, path)
    else:
        os.rename(path, old)
        try:
            os.replace(part, path)
        except BaseException:
            os.rename(old, path)
            raise
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_within(path: str | bytes | int, folder: Path) -> bool:
    return isinstance(path, str) and Path(path).absolute().is_relative_to(folder.absolute())


def _is_torch_save(path: Path) -> bool:
    """Return whether a file is an archive as torch.save writes it."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False
