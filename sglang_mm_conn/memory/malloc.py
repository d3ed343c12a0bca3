"""The process's own heap: memory that a request frees stays there for the next one.

glibc gives what is free at the end of the heap back to the kernel as soon as it is more than twice the largest tensor
that was ever freed (of those below 32 MiB), and so after nearly every embedding; the next one gets the same memory
anew, with a page fault for every 4 KiB of it. ``bench servers`` counts them.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

# glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# The most that glibc's own adjustment would come to: larger memory is mapped for itself, and unmapped when it is freed.
# That adjustment ends with the first call here, and would leave its value of the moment.
_MMAP_THRESHOLD = 32 << 20
# With any of these, as variable or as tunable, somebody has decided already.
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")
_TUNABLES = ("trim_threshold", "mmap_threshold", "top_pad", "mmap_max")


def raise_trim_threshold(nbytes: int, environ: Mapping[str, str]) -> bool:
    """Let up to ``nbytes`` freed bytes stay at the end of this process's heap. Returns whether that is so now.

    More than ``nbytes`` at once go to the kernel all together. Memory of other threads than the first lies in arenas of
    64 MiB, which keep what they have (MALLOC_ARENA_MAX bounds their number). Nothing changes where ``nbytes`` is 0,
    where ``environ`` shows that somebody has decided otherwise, and where the process does not allocate with glibc.
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
    """glibc's, where the process allocates with glibc: allocators that are loaded before it have one that does nothing,
    or none."""
    try:
        glibc = ctypes.CDLL("libc.so.6")
        mallopt: Callable[[int, int], int] = glibc.mallopt
        used, own = (ctypes.cast(library.malloc, ctypes.c_void_p).value for library in (ctypes.CDLL(None), glibc))
    except (OSError, AttributeError):
        return None
    return mallopt if used == own else None
