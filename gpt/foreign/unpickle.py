"""Read pickles, and files of torch.save, without running anything that they name."""

import io
import pickle
import pickletools
import re
import zipfile
from typing import Any, NoReturn

import torch

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # begins a file of torch.save from before it wrote zip archives
LEGACY_PICKLES = 5  # of its beginning, before the numbers themselves
# Values that people keep beside their weights, as numpy and pathlib pickle them: they are read as stand-ins, too.
PLAIN_CALLS = re.compile(r"(numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray)|pathlib\.[\w.]*Path)")


class StandIn:
    """Takes the place of an object whose class a file names: it has the object's attributes, and no code of it.

    path: the class's module and name, on the class of the stand-in.
    """

    path = ""

    def __new__(cls, *arguments: Any) -> "StandIn":
        """Return an empty one. Raises UnpicklingError for a call with arguments, of which only its code makes sense."""
        if arguments and not PLAIN_CALLS.fullmatch(cls.path):
            raise pickle.UnpicklingError(f"it calls {cls.path}")
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def load_torch(content: bytes) -> Any:
    """Return what a file of torch.save holds: tensors, plain values, and a `StandIn` for each object of a class.

    It is read by torch's own restricted unpickler, which knows no class but those of tensors; the stand-ins are inert.
    Raises UnpicklingError, which names it, for a file that calls anything else, and what torch.load raises for a file
    that is damaged.
    """
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        names = _classes_named(content)
        if not names:
            raise
    allowed: list[Any] = [(type("StandIn", (StandIn,), {"path": name}), name) for name in names]
    with torch.serialization.safe_globals(allowed):
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def load_plain(content: bytes) -> Any:
    """Return what a pickle holds if that is dicts, lists, tuples, sets, numbers and texts alone.

    Raises UnpicklingError, which names it, for one that holds anything else, and other errors for one that is damaged.
    """
    return _PlainUnpickler(io.BytesIO(content)).load()


def name_of_refused(error: pickle.UnpicklingError) -> str:
    """Return what the error says that a file calls, or what the error says at all."""
    found = re.search(r"(?:GLOBAL|it calls|it names) ([\w.]+)", str(error))
    return found[1] if found else str(error).splitlines()[0][:120]


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, key: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to something outside of it")


def _classes_named(content: bytes) -> set[str]:
    """Return the classes and functions that a file of torch.save names, torch's own ones included."""
    names = set()
    if content.startswith(LEGACY):
        stream, pickles = io.BytesIO(content), LEGACY_PICKLES
    else:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            [name] = [name for name in archive.namelist() if name.endswith("data.pkl")]
            stream, pickles = io.BytesIO(archive.read(name)), 1
    for _ in range(pickles):
        for opcode, argument, _place in pickletools.genops(stream):
            if opcode.name == "GLOBAL":
                names.add(str(argument).replace(" ", "."))
    return names
