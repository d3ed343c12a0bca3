"""Staging memory: the registered memory of an encoder through which rows leave.

What was measured of the engine (0.3.13) and decides this module:

- a write that waits for each batch leaves the wire idle while it copies the next one to the staging memory: 1.3 times
  the engine's own time at 128 MiB, 1.0 with two batches on their way (slots of 1 to 16 MiB alike);
- after a non-zero return bytes may still land, read from here: the memory of a failed batch is not used again.
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
    """Registered source memory in slots, one for each batch that can be under way: nobody waits for a slot.

    A slot is one batch's until that batch has ended with 0; the slot of a failed one does not come back, for the
    engine may still read it.
    """

    def __init__(self, slots: int, slot_bytes: int, device: Device | None = None, memory_device: str = "cpu") -> None:
        """In host memory, pinned where there is a GPU, or in GPU memory (``memory_device``). Raises
        MemoryUnavailable."""
        self._device = device or Device()
        self._unpin: Callable[[], None] = lambda: None
        if memory_device == "cpu":
            self.memory = torch.zeros(slots * slot_bytes, dtype=torch.uint8)
            # Hazard: memory that is unmapped while it is pinned leaves the GPU a stale mapping of its addresses. So it
            # is unpinned at the latest when nobody refers to this any more.
            unpin = weakref.finalize(self, self._device.pin(self.memory))
            unpin.atexit = False
            self._unpin = unpin
        else:
            self.memory = self._device.empty(slots * slot_bytes, memory_device)
        self._free = list(self.memory.split(slot_bytes))
        self._lock = threading.Lock()

    def take(self) -> torch.Tensor:
        """Raises DataPathError where the writes that failed have used them up."""
        with self._lock:
            if not self._free:
                raise DataPathError("the Mooncake engine is being given up after failed writes", in_doubt=False)
            return self._free.pop()

    def give_back(self, slot: torch.Tensor) -> None:
        with self._lock:
            self._free.append(slot)

    def fill(self, slot: torch.Tensor, source: torch.Tensor, slices: Sequence[Extent]) -> None:
        """Copy ``slices`` of ``source`` to the slot, end to end. When this returns they are there for the engine, which
        knows no streams, to read."""
        ends = list(itertools.accumulate(slice_.length for slice_ in slices))
        self._device.copy(
            (slot, end - slice_.length, source, slice_.start, slice_.length)
            for end, slice_ in zip(ends, slices, strict=True)
        )

    def close(self) -> None:
        """Only when the engine does not read it any more."""
        self._unpin()
