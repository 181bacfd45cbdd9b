"""The heap of a process that computes on a CPU, and whether it keeps what is freed."""

import ctypes
import os
from pathlib import Path

# mallopt's names for them, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_OTHER_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")
# Whether `keep_heap` has been granted what it asked for, which cannot be taken back.
_kept = False


def keep_heap() -> bool:
    """Asks glibc to keep large blocks that are freed, for the next of their size; returns whether it does.

    PyTorch frees the activations of an iteration and allocates as many in the next. glibc gives blocks of this size
    back to the operating system and fetches fresh pages, which takes longer than much of the arithmetic that fills
    them. It concerns the whole process and cannot be taken back, so commands call it, and no import does. What was set
    by the user is left: see `why_heap_is_left`.

    Example:
        >>> keep_heap() == (why_heap_is_left() is None)
        True
    """
    global _kept
    if why_heap_is_left() is not None:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No block has a mapping of its own, and the end of the heap is never trimmed.
    _kept = all([mallopt(_M_MMAP_MAX, 0) == 1, mallopt(_M_TRIM_THRESHOLD, -1) == 1])
    return _kept


def heap_in_force() -> str:
    """What is in force in this process: "kept", "not kept", or why `keep_heap` leaves it as the user has set it.

    Example:
        >>> heap_in_force() in ("kept", "not kept", why_heap_is_left())
        True
    """
    return "kept" if _kept else why_heap_is_left() or "not kept"


def why_heap_is_left() -> str | None:
    """Why `keep_heap` changes nothing in this process, None if it does: another C library or allocator, or a setting.

    Example:
        >>> os.environ["MALLOC_ARENA_MAX"] = "2"
        >>> why_heap_is_left()
        'MALLOC_ARENA_MAX is set'
        >>> del os.environ["MALLOC_ARENA_MAX"]
    """
    if "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return "the C library is not glibc"
    own = [name for name in sorted(os.environ) if name.startswith("MALLOC_")]
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        own.append("GLIBC_TUNABLES")
    if own:
        return f"{own[0]} is set"
    mapped = Path("/proc/self/maps")
    loaded = mapped.read_text() if mapped.is_file() else ""
    other = next((name for name in _OTHER_ALLOCATORS if name in loaded), None)
    return f"{other} is loaded" if other is not None else None
