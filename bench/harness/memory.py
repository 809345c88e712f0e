"""Memory that nobody needs any more goes back to the machine: eight engines share it."""

import ctypes
import gc


def give_memory_back() -> None:
    """Free what only holds itself, as graphs that hold their weights do, and what malloc keeps for later."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc's own
        libc.malloc_trim(0)
