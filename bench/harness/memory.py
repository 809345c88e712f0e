"""Returns unused memory to the operating system, as eight engines share one machine."""

import ctypes
import gc


def give_memory_back() -> None:
    """Collect reference cycles, such as graphs that hold their weights, and give malloc's free pages back."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc's own
        libc.malloc_trim(0)
