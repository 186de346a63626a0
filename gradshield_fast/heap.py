"""Freed memory that stays with the process: batch after batch needs the same pages."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Ask glibc not to give freed memory back to the system, and to take blocks below 32 MiB from what is free.

    A batch frees its activations one after another, and the next takes as many: given back in between, each page is
    cleared and mapped anew, which cost 5 % of a scored pass with norms on a CPU. For the whole process, so only a
    program asks for it; a library leaves its host's memory alone. The peak stays what it is, but it is held.

    Returns:
        Whether it was done; other C libraries are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt")):
        return False
    # both or neither: a threshold of one kind stops glibc from adjusting the other, which made a pass twice as long
    return bool(libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and libc.mallopt(_TRIM_THRESHOLD, _NEVER))
