"""The process's own heap: memory that a request frees stays there for the next one.

glibc gives what is free at the end of the heap back to the kernel as soon as it is more than twice its largest tensor
so far, and so after nearly every embedding; the next one gets the same memory anew, with a page fault for every 4 KiB
of it. ``bench servers`` counts them.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping

logger = logging.getLogger(__name__)

# glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# What glibc's own adjustment ends with at most: larger memory is mapped for itself, and unmapped when it is freed. That
# adjustment ends with the first call of mallopt, and would leave its value of the moment.
_MMAP_THRESHOLD = 32 << 20
# With any of these somebody has decided already.
_DECIDED = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed(nbytes: int, environ: Mapping[str, str]) -> bool:
    """Let up to ``nbytes`` freed bytes stay at the end of this process's heap. Returns whether that is so now.

    Nothing changes where ``nbytes`` is 0, where ``environ`` shows that the allocator was tuned for this process, or
    where the C library has no such setting (musl).
    """
    if nbytes == 0 or any(name in environ for name in _DECIDED) or "glibc.malloc." in environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, nbytes)):
        return False
    logger.info("Up to %d MiB of freed memory stay in this process's heap", nbytes >> 20)
    return True
