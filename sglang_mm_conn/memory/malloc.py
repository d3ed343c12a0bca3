"""Owns the trim threshold of the process's heap, so that memory freed by one request stays for the next.

By default, glibc returns the free end of the heap to the kernel as soon as it exceeds twice the largest tensor that was
ever freed (among tensors below 32 MiB), so after nearly every embedding. The next embedding allocates that memory
again, with a page fault for every 4 KiB. ``bench servers`` counts the faults.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# The upper limit of glibc's dynamic threshold: larger memory gets a separate mapping, which is unmapped when it is
# freed. Any mallopt call stops glibc's adjustment and would freeze the threshold at its present value, so set the
# limit.
_MMAP_THRESHOLD = 32 << 20
# If any of these is set, as a variable or a tunable, the user has made this choice.
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")
_TUNABLES = ("trim_threshold", "mmap_threshold", "top_pad", "mmap_max")


def raise_trim_threshold(nbytes: int, environ: Mapping[str, str]) -> bool:
    """Keep up to ``nbytes`` freed bytes at the end of this process's heap. Returns whether this was set.

    If more are free, glibc returns all of them to the kernel. Threads other than the first allocate from arenas of
    64 MiB, which never shrink (MALLOC_ARENA_MAX limits their number). Nothing changes if ``nbytes`` is 0, if the user
    has set malloc options in ``environ``, or if the process does not allocate with glibc.
    """
    tunables = environ.get("GLIBC_TUNABLES", "")
    decided = [name for name in _VARIABLES if name in environ]
    decided += [name for name in _TUNABLES if f"glibc.malloc.{name}=" in tunables]
    if nbytes == 0 or decided:
        return False
    mallopt = _mallopt()
    if mallopt is None or not (mallopt(_M_TRIM_THRESHOLD, nbytes) and mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)):
        return False
    logger.info("Up to %d MiB of freed memory may stay in the heap", nbytes >> 20)
    return True


def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's mallopt, or None if the process uses another allocator. An allocator that is loaded before glibc may have
    a mallopt that does nothing, or none."""
    try:
        glibc = ctypes.CDLL("libc.so.6")
        mallopt: Callable[[int, int], int] = glibc.mallopt
        used, own = (ctypes.cast(library.malloc, ctypes.c_void_p).value for library in (ctypes.CDLL(None), glibc))
    except (OSError, AttributeError):
        return None
    return mallopt if used == own else None
