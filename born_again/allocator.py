"""Keeps the C library from giving memory back to the system between the steps of a training on a CPU.

The activations of a step are freed at its end and asked for again in the next one. glibc's malloc returns freed memory
at the top of its heap to the system, and the system clears every page again when it is next written: tens of thousands
of page faults a step, a fifth of the time of a small network. Told to keep what it has been given, it asks for none.
"""

from __future__ import annotations

import ctypes
import os

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = -1
# Where a block is so large, one more mapping is nothing beside what is done with it. Older versions take less.
_MMAP_FROM = (1 << 30, 1 << 25)
_SETTINGS_OF_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Tells glibc's malloc, for the rest of the process, to keep freed memory for the next request.

    For programs that do little else than train on a CPU: nothing in this package calls it by itself but what runs the
    scripts in examples/. The most memory that a process takes stays about the same, but what it took it keeps.
    Environment variables of malloc (see man mallopt) are left to have their way.

    Returns:
        Whether it was told; False with another C library, or where the user has settings of malloc.
    """
    if any(name in os.environ for name in _SETTINGS_OF_THE_USER):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc: musl, macOS, Windows
        return False
    if not any(mallopt(_M_MMAP_THRESHOLD, size) for size in _MMAP_FROM):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
