"""Find the device that a model runs on, or take the one that the user names; say plainly where memory ends."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gpt.cli import UserError

KINDS = ("cuda", "mps", "cpu")  # in the order in which `auto` looks
# What torch and numpy say of an allocation that fails, on a CPU and on a GPU; and of one whose size has no 64 bits.
ASKED = re.compile(r"(?:tried to|unable to) allocate ([\d.]+ ?\w+)", re.IGNORECASE)
BEYOND = re.compile(r"size calculation overflowed|array is too big|maximum allowed dimension", re.IGNORECASE)


def find_device(name: str = "auto") -> torch.device:
    """Return the device of that name (`cuda`, `cuda:1`, `mps`, `cpu`), or for `auto` the first of cuda, mps, cpu here.

    Raises UserError for a name that torch does not know or a device that is not here.
    """
    here = devices_here()
    if name == "auto":
        return torch.device(here[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in KINDS:
        raise UserError(f"--device {name}: must be auto, {', '.join(KINDS)}, or one of several GPUs as cuda:1")
    if device.type not in here:
        raise UserError(f"--device {name}: torch sees none here; it sees {', '.join(here)}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA GPUs here, counted from 0")
    return device


def devices_here() -> list[str]:
    """Return the kinds of device that torch can use here, the fastest first."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [kind for kind in KINDS if found[kind]]


@contextmanager
def explain_memory(advice: str) -> Iterator[None]:
    """Raise UserError, with how much memory was asked for and the advice, where an allocation in the block fails."""
    try:
        yield
    except (MemoryError, RuntimeError, ValueError) as error:
        asked, beyond = ASKED.search(str(error)), BEYOND.search(str(error))
        if isinstance(error, UserError) or not (asked or beyond or isinstance(error, MemoryError)):
            raise
        size = f"{asked[1]} were" if asked else "more than any machine has was" if beyond else "more than is free was"
        raise UserError(f"not enough memory: {size} asked for at once; {advice}") from error


def check_memory(size_bytes: int, what: str, advice: str) -> None:
    """Raise UserError for more than all of this machine's memory.

    A system that lends out more than it has does not fail such an allocation, but ends the process that fills it.
    """
    here_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size_bytes > here_bytes:
        raise UserError(
            f"not enough memory: {what} take {size_bytes:,} bytes, and this machine has {here_bytes:,}; {advice}"
        )
