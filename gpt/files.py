"""Files that are either whole or absent, and their hashes. Standard library only."""

import ctypes
import datetime
import errno
import fcntl
import glob
import hashlib
import os
import re
import shlex
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from gpt.cli import UserError, disk_trouble, heed_interrupt

ARTIFACTS = Path("artifacts")  # every command writes here unless it is told another place


NEW, OLD = "new", "old"  # in a scratch folder: what is being written, and what it replaces
SCRATCH, LOCK = ".part", ".lock"  # the ends of the names of a scratch folder and a lock, which begin with a dot

_held: set[Path] = set()  # the outputs that this process holds


@contextmanager
def atomic_output(path: Path | str, *, directory: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, remove it if not.

    With `directory=True` the temporary path is an empty directory, and an old directory at `path` is replaced. Folders
    above `path` are made, and after a failure those go again. Where `path` is a link, what it points to is replaced.
    All of it is on the disk before it gets its name, so a loss of power leaves the old or the new, never a part.
    The output is held meanwhile, as by `hold_output`. Raises UserError when the place cannot be written (permissions,
    disk full, a parent that is a file), or another process is writing it; KeyboardInterrupt also where a library
    swallowed it in the block.
    """
    with atomic_outputs([path], directory=directory) as [part]:
        yield part


@contextmanager
def atomic_outputs(paths: Sequence[Path | str], *, directory: bool = False) -> Iterator[list[Path]]:
    """Yield temporary paths of several outputs in one folder, which appear together or not at all.

    As `atomic_output`, which is this for one. The old ones are moved away before the first new one gets its name, so
    that no reader finds an old one beside a new one; for that instant a reader finds some of them absent. If the
    process is killed then, the next one that writes there, or holds the first of them, completes the new ones.
    """
    targets = [_target(path) for path in paths]
    first, scratch = targets[0], None
    try:
        _check_kinds(paths, targets, directory)
        with hold_output(paths[0]):
            scratch = Path(tempfile.mkdtemp(prefix=f".{first.name}.", suffix=SCRATCH, dir=first.parent))
            try:
                (scratch / NEW).mkdir()
                parts = [scratch / NEW / target.name for target in targets]
                if directory:
                    for part in parts:
                        part.mkdir()
                with heed_interrupt():
                    yield parts
                _give_names(parts, targets, scratch)
            finally:
                _settle(scratch)
    except (BrokenPipeError, UserError):
        raise  # of BrokenPipeError: the reader of what was printed in the block has gone, not this output's trouble
    except Exception as error:
        trouble = error.strerror or str(error) if isinstance(error, OSError) else disk_trouble(error)
        name = error.filename if isinstance(error, OSError) else None
        if not trouble or (scratch is not None and name and not _is_within(name, first.parent)):
            raise  # some other file's trouble, not this output's
        raise UserError(
            f"cannot write {paths[0]}: {trouble}; free some space or choose another place with -o"
        ) from error


@contextmanager
def hold_output(path: Path | str) -> Iterator[None]:
    """Keep an output to this process in the block, a folder with all that is in it; remove what killed ones left there.

    The lock is a file beside the output, `.NAME.lock`, which says who holds it. It is gone after the block, and holds
    nobody up once its process is dead. Raises UserError, naming the holder, if another process holds it.
    """
    given, path = path, _target(path)
    lock, descriptor, new = path.parent / f".{path.name}{LOCK}", None, []
    held = any(each in _held for each in (path, *path.parents))  # by this process
    try:
        try:
            new = [folder for folder in path.parents if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = None if held else _lock(lock, given)
        except OSError as error:
            raise UserError(
                f"cannot write {given}: {error.strerror or error}; free some space or choose another place with -o"
            ) from error
        if descriptor is not None:
            _held.add(path)
            beside = path.parent.glob(f".{glob.escape(path.name)}.*{SCRATCH}")
            for scratch in (*beside, *path.glob(f".*{SCRATCH}")):
                if _leftover_of(scratch.name) == path.name or (scratch.parent == path and is_leftover(scratch)):
                    _settle(scratch)
        yield
    finally:
        if descriptor is not None:
            _held.discard(path)
            with suppress(OSError):
                lock.unlink()  # before it is let go: one who opened it meanwhile finds that it has no name
            os.close(descriptor)
        for folder in new:
            with suppress(OSError):  # it holds the output, or another's: it stays
                folder.rmdir()


def is_leftover(path: Path) -> bool:
    """Tell if a file is a lock, or a folder the scratch, of an output; killed processes leave them behind."""
    return _leftover_of(path.name) is not None


def cut_half_line(path: Path) -> None:
    """Cut what stands after the last whole line of a file, if it exists: a process was killed while it wrote there."""
    if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)


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

    wanted: `checkpoint`, `ONNX file` or `compiled model`. Checkpoints, compiled models and folders of Hugging
    Face's are known by their content, ONNX files by their name.
    """
    kind = None
    if (path / "model.json").is_file():
        kind = "compiled model", "compare it with: python -m bench"
    elif (path / "config.json").is_file():
        kind = "folder of Hugging Face's", f"export it first with: python -m export.onnx {path}"
    elif path.is_file() and _is_weights(path):
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


def _target(path: Path | str) -> Path:
    """Return the place that an output is written to: where a link points to, by a name without links."""
    path = Path(path)
    if os.path.islink(path) or path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent)) / path.name


def _check_kinds(paths: Sequence[Path | str], targets: list[Path], directory: bool) -> None:
    """Raise UserError for a folder where a file is to be or the other way round, and for files in several folders."""
    for path, target in zip(paths, targets, strict=True):
        if target.exists() and target.is_dir() != directory:
            found, wanted = ("file", "folder") if directory else ("directory", "file")
            raise UserError(f"cannot write {path}: it is a {found}; name a {wanted} with -o")
        if target.parent != targets[0].parent:
            raise UserError(f"cannot write {path}: it appears together with {paths[0]}; link to one folder, or to none")


def _lock(lock: Path, path: Path | str) -> int:
    """Lock a file, made if need be, and write into it who does; return its descriptor. Raises UserError, OSError."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
                break
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise UserError(
                f"cannot write {path}: {holder} is writing it; wait for its end, or choose another place with -o"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the one who held it has removed it, and a new one may be there
    since = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    command = " ".join(shlex.join(sys.orig_argv).split())[:400]
    with suppress(OSError):  # a disk that is full is told where the output is written
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename} ({command}; since {since})".encode(), 0)
    return descriptor


def _leftover_of(name: str) -> str | None:
    """Return the name of the output that a lock's or scratch folder's name is of, None for any other name."""
    found = re.fullmatch(rf"\.(.+)(?:\.[a-z0-9_]{{8}}{re.escape(SCRATCH)}|{re.escape(LOCK)})", name, re.DOTALL)
    return found and found[1]


def _give_names(parts: list[Path], targets: list[Path], scratch: Path) -> None:
    """Rename each part to its target, once all of them are on the disk."""
    for part in parts:
        for each in (*part.rglob("*"), part):
            flush(each)
    if len(parts) == 1 and not (parts[0].is_dir() and targets[0].exists()):
        os.replace(parts[0], targets[0])
    elif len(parts) > 1 or not _exchange(parts[0], targets[0]):
        new, old, folder = scratch / NEW, scratch / OLD, scratch.parent
        old.mkdir()  # as long as it is there, a process that finds the folder completes the work: see `_settle`
        try:
            _replace_in_turn(new, old, folder)
        except BaseException:
            _undo([part.name for part in parts], new, old, folder)
            raise
    flush(targets[0].parent)


def _exchange(first: Path, second: Path) -> bool:
    """Let two files or folders change names at one instant; return False where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    if libc.renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def _replace_in_turn(new: Path, old: Path, folder: Path) -> None:
    """Move all that is in `new` to `folder`, and what is there under the same names to `old` before."""
    names = [part.name for part in new.iterdir()]
    for name in names:
        if (folder / name).exists():
            os.rename(folder / name, old / name)
    for name in names:
        os.replace(new / name, folder / name)


def _undo(names: Iterable[str], new: Path, old: Path, folder: Path) -> None:
    """Undo what `_replace_in_turn` has done of its work."""
    for name in names:
        if not (new / name).exists():
            os.replace(folder / name, new / name)
    for each in list(old.iterdir()):
        os.replace(each, folder / each.name)
    old.rmdir()


def _settle(scratch: Path) -> None:
    """Remove a scratch folder; what a killed process had begun to give names gets all of them first."""
    try:
        if (scratch / OLD).is_dir() and (scratch / NEW).is_dir():
            _replace_in_turn(scratch / NEW, scratch / OLD, scratch.parent)
    except OSError:
        return  # it is tried again by the next one
    shutil.rmtree(scratch, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_within(path: str | bytes | int, folder: Path) -> bool:
    return isinstance(path, str) and Path(path).absolute().is_relative_to(folder.absolute())


def _is_weights(path: Path) -> bool:
    """Return whether a file is an archive as torch.save writes it, or one of safetensors."""
    with path.open("rb") as file:
        if (begin := file.read(9))[8:] == b"{" and int.from_bytes(begin[:8], "little") < path.stat().st_size:
            return True
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False
