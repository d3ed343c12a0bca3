"""Owns the shared-memory path: the encoder copies rows directly from its tensor (host or GPU) into the blocks.

Its proof that no write lands any more (P2) is the lock on the writer slot: see memory.segment. It has a single epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sglang_mm_conn.core.errors import DataPathUnavailable
from sglang_mm_conn.core.layout import Extent, Geometry
from sglang_mm_conn.core.messages import Memory, ShmMemory
from sglang_mm_conn.core.sharding import session_at
from sglang_mm_conn.datapath.base import Description, Doubts, Revoking
from sglang_mm_conn.memory.device import Device
from sglang_mm_conn.memory.segment import HEADER_BYTES, AttachedSegment, Segment


class ShmLink:
    """Writes into a mapped segment. When ``write`` has returned, no further byte lands."""

    name = "shm"

    def __init__(self, memory: ShmMemory, geometry: Geometry, device: Device) -> None:
        self.synchronous = device.synchronous
        self._device = device
        self._region_bytes = geometry.region_bytes
        payload = geometry.region_bytes * geometry.regions
        self._segment = AttachedSegment(memory.segment, memory.nonce, payload, memory.writer_slot)
        try:
            self._pool = torch.frombuffer(self._segment.data, dtype=torch.uint8)[HEADER_BYTES : HEADER_BYTES + payload]
            self._unpin = device.pin(self._pool)
        except BaseException:
            self._segment.close()  # otherwise it keeps the lock on the writer slot
            raise

    def write(self, source: torch.Tensor, extents: Sequence[Extent]) -> None:
        self._device.copy(
            (self._pool, extent.region * self._region_bytes + extent.offset, source, extent.start, extent.length)
            for extent in extents
        )

    def close(self) -> None:
        self._unpin()
        del self._pool
        self._segment.close()


class ShmPath:
    """The encoder's half: opens ShmLinks."""

    name = "shm"

    def __init__(self, device: Device | None = None) -> None:
        self._device = device or Device()

    def open(self, memory: Memory, geometry: Geometry, incarnation: str) -> ShmLink:
        if not isinstance(memory, ShmMemory):
            raise DataPathUnavailable("the language server offers no shared memory")
        return ShmLink(memory, geometry, self._device)

    def close(self) -> None:
        """Nothing to release: only the links hold resources."""


class ShmReceivePath:
    """The language rank's half: describes its segment, and takes the locks of writers that are gone."""

    name = "shm"
    exclusive_lock = True
    retired_epoch = None

    def __init__(self, segment: Segment, host: str, reserve_port: Callable[[], tuple[int, Callable[[], None]]]) -> None:
        """``segment``: the pool keeps owning it. ``reserve_port``: the port for the session id; nothing listens on
        it."""
        self._segment = segment
        port, self._release_port = reserve_port()
        self.session_id = session_at(host, port)

    def start(self) -> None:
        """Nothing to do: the pool has created the segment."""

    def describe(self, slot: int) -> Description:
        segment = self._segment
        return Description(ShmMemory(segment=segment.name, nonce=segment.nonce, writer_slot=slot))

    def is_current(self, epoch: int) -> bool:
        return epoch == 0

    def prove_writer_gone(self, slot: int) -> bool:
        return self._segment.retire_writer(slot)

    def revocation(self, doubts: Doubts) -> Revoking | None:
        return None

    def close(self) -> None:
        self._release_port()
