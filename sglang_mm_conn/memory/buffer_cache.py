"""Owns the cache of result memory, so that later results reuse pages that earlier ones have touched.

Filling fresh memory takes several times as long as copying to touched memory, since each first touch of a page is a
fault. (Huge pages do not help: they cost a quarter of that if the system has some ready, but four times as much if it
must make them.) Hazard: memory may be reused only when nothing refers to it any more. The proof is the lifetime of the
object that the tensor's storage was made from: every tensor, view, storage, NumPy array and DLPack capsule over the
memory keeps the storage alive, the storage keeps that object (a *lease*) alive, and the lease's finalizer returns the
memory.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable

import numpy as np
import torch

# The C library's allocator reuses touched memory for smaller sizes.
SMALLEST = 256 << 10


def lease(memory: np.ndarray, on_release: Callable[[], None]) -> torch.Tensor:
    """``memory`` (uint8, one dimension) as a tensor. Calls ``on_release`` once, when nothing refers to it any more.

    Hazard: ``on_release`` may run on any thread at any point, since the garbage collector may call it. It must take no
    lock that any thread holds while it allocates memory.
    """
    own = memory.view()  # a separate object that only the storage refers to
    weakref.finalize(own, on_release).atexit = False
    return torch.from_numpy(own)


def _size_class(nbytes: int) -> int:
    """``nbytes`` rounded up by at most a quarter, so that the memory fits later results of about the same size."""
    step = max(mmap.PAGESIZE, 1 << max(0, nbytes.bit_length() - 3))
    return -(-nbytes // step) * step


class BufferCache:
    """Provides memory for results, and caches it once the last tensor over it is gone. Thread-safe.

    It caches at most ``limit`` bytes, and returns the oldest memory beyond that to the system.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._returned: deque[mmap.mmap] = deque()  # finalizers append here: they must not wait for the lock
        self._idle: OrderedDict[int, mmap.mmap] = OrderedDict()  # oldest first, by id
        self._idle_bytes = 0

    @property
    def idle_bytes(self) -> int:
        """Bytes in the cache."""
        with self._lock:
            self._collect()
            return self._idle_bytes

    def tensor(self, nbytes: int) -> torch.Tensor:
        """``nbytes`` bytes (uint8, one dimension) of any content. They are reused once nothing refers to them."""
        if nbytes < SMALLEST or self._limit == 0:
            return torch.empty(nbytes, dtype=torch.uint8)
        size = _size_class(nbytes)
        with self._lock:
            self._collect()
            # Prefer the newest: its bytes may still be in a CPU cache.
            found = next((key for key in reversed(self._idle) if len(self._idle[key]) == size), None)
            if found is None:
                memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            else:
                memory = self._idle.pop(found)
                self._idle_bytes -= size
        returned = self._returned
        return lease(np.frombuffer(memory, dtype=np.uint8, count=nbytes), lambda: returned.append(memory))

    def trim(self) -> None:
        """Return memory above the limit to the system."""
        with self._lock:
            self._collect()

    def _collect(self) -> None:
        """Under the lock: cache the memory that finalizers have returned, up to the limit."""
        while self._returned:
            memory = self._returned.popleft()
            self._idle[id(memory)] = memory
            self._idle_bytes += len(memory)
        while self._idle_bytes > self._limit:
            _, memory = self._idle.popitem(last=False)
            self._idle_bytes -= len(memory)
