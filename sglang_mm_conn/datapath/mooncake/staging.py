"""Owns an encoder's staging memory: the registered memory from which Mooncake sends rows.

Measured properties of the engine (0.3.13) that determine this module:

- A write that waits for each batch leaves the network idle while it copies the next batch to staging memory. It takes
  1.3 times as long as the engine alone at 128 MiB, but 1.0 times with two batches in flight (for slots of 1 to 16 MiB).
- Hazard: after a non-zero return the engine may still read staging memory and its bytes may still land. So the memory
  of a failed batch is never reused.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Sequence

import torch

from sglang_mm_conn.core.errors import DataPathError
from sglang_mm_conn.core.layout import Extent
from sglang_mm_conn.memory.device import Device


class Staging:
    """Registered source memory in slots, one for each batch that can be under way, so that no thread waits for a slot.

    A slot belongs to one batch until that batch has returned 0. The slot of a failed batch is not returned, because the
    engine may still read it.
    """

    def __init__(self, slots: int, slot_bytes: int, device: Device | None = None, memory_device: str = "cpu") -> None:
        """``memory_device``: cpu for host memory, which is pinned if ``device`` is a GPU, or cuda for GPU memory.
        Raises MemoryUnavailable."""
        self._device = device or Device()
        self._unpin: Callable[[], None] = lambda: None
        if memory_device == "cpu":
            self.memory = torch.zeros(slots * slot_bytes, dtype=torch.uint8)
            # Hazard: if memory is unmapped while it is pinned, the GPU keeps a stale mapping of its addresses. So the
            # finalizer unpins it at the latest when nothing refers to this object any more.
            unpin = weakref.finalize(self, self._device.pin(self.memory))
            unpin.atexit = False
            self._unpin = unpin
        else:
            self.memory = self._device.empty(slots * slot_bytes, memory_device)
        self._free = list(self.memory.split(slot_bytes))
        self._lock = threading.Lock()

    def take(self) -> torch.Tensor:
        """Take a free slot. Raises DataPathError if failed writes have used up all slots."""
        with self._lock:
            if not self._free:
                raise DataPathError("the Mooncake engine is being retired after failed writes", in_doubt=False)
            return self._free.pop()

    def give_back(self, slot: torch.Tensor) -> None:
        with self._lock:
            self._free.append(slot)

    def fill(self, slot: torch.Tensor, source: torch.Tensor, slices: Sequence[Extent]) -> None:
        """Copy ``slices`` of ``source`` to the slot, one after the other. When this returns, all copies have completed:
        the engine does not wait for GPU streams before it reads the slot."""
        ends = list(itertools.accumulate(slice_.length for slice_ in slices))
        self._device.copy(
            (slot, end - slice_.length, source, slice_.start, slice_.length)
            for end, slice_ in zip(ends, slices, strict=True)
        )

    def close(self) -> None:
        """Unpin the memory. Call this only when the engine no longer reads it."""
        self._unpin()
