"""Memory for results that is used again: pages that were touched before cost nothing the next time.

Fresh memory is several times slower to fill than to copy: each first touch of a page is a fault. (Huge pages are no way
out: a quarter of that cost where the system has some ready, four times as much where it has to make them.) So memory
comes back when *nobody* refers to it any more, and not a moment earlier. The proof is the life of the object that the
tensor's storage was made of: every tensor, view, storage, NumPy array and DLPack capsule over the memory keeps the
storage alive, the storage keeps that object (a *lease*), and the lease's finalizer is what gives the memory back.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable

import numpy as np
import torch

# Below this the allocator of the C library has warm memory of its own.
SMALLEST = 256 << 10


def lease(memory: np.ndarray, on_release: Callable[[], None]) -> torch.Tensor:
    """``memory`` (uint8, one dimension) as a tensor; ``on_release`` is called once, when nothing refers to it any more.

    ``on_release`` may run on any thread and in the middle of anything (the garbage collector calls it too): it must
    take no lock that is held elsewhere while memory is allocated.
    """
    own = memory.view()  # an object of its own, which only the storage will refer to
    weakref.finalize(own, on_release).atexit = False
    return torch.from_numpy(own)


def _size_class(nbytes: int) -> int:
    """``nbytes`` rounded up by a quarter at most, so that memory fits later results of about the same size."""
    step = max(mmap.PAGESIZE, 1 << max(0, nbytes.bit_length() - 3))
    return -(-nbytes // step) * step


class BufferCache:
    """Hands out memory for results and takes it back when the last tensor over it is gone; thread-safe.

    At most ``limit`` bytes lie idle; beyond that the oldest go back to the system.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._returned: deque[mmap.mmap] = deque()  # by finalizers, which must not wait for the lock
        self._idle: OrderedDict[int, mmap.mmap] = OrderedDict()  # oldest first, by id
        self._idle_bytes = 0

    @property
    def idle_bytes(self) -> int:
        """Bytes that nobody uses and that are kept."""
        with self._lock:
            self._collect()
            return self._idle_bytes

    def tensor(self, nbytes: int) -> torch.Tensor:
        """``nbytes`` bytes (uint8, one dimension) with any content, the caller's until nothing refers to them."""
        if nbytes < SMALLEST or self._limit == 0:
            return torch.empty(nbytes, dtype=torch.uint8)
        size = _size_class(nbytes)
        with self._lock:
            self._collect()
            # The newest first: its pages may still be in a cache.
            found = next((key for key in reversed(self._idle) if len(self._idle[key]) == size), None)
            if found is None:
                memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            else:
                memory = self._idle.pop(found)
                self._idle_bytes -= size
        returned = self._returned
        return lease(np.frombuffer(memory, dtype=np.uint8, count=nbytes), lambda: returned.append(memory))

    def trim(self) -> None:
        """Give what is beyond the limit back to the system."""
        with self._lock:
            self._collect()

    def _collect(self) -> None:
        """Under the lock: take in what finalizers returned."""
        while self._returned:
            memory = self._returned.popleft()
            self._idle[id(memory)] = memory
            self._idle_bytes += len(memory)
        while self._idle_bytes > self._limit:
            _, memory = self._idle.popitem(last=False)
            self._idle_bytes -= len(memory)
