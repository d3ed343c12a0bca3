"""Shared memory: the encoder copies rows straight from its tensor (host or GPU) into the language server's blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_mm_conn.core.errors import DataPathUnavailable
from sglang_mm_conn.core.layout import Extent
from sglang_mm_conn.core.messages import Register
from sglang_mm_conn.memory.device import Device
from sglang_mm_conn.memory.segment import HEADER_BYTES, AttachedSegment


class ShmLink:
    """A mapped segment. When ``write`` returns, nothing more will land."""

    name = "shm"

    def __init__(self, register: Register, device: Device) -> None:
        self.synchronous = device.synchronous
        self._device = device
        self._region_bytes = register.blocks_per_region * register.block_bytes
        payload = self._region_bytes * len(register.regions)
        self._segment = AttachedSegment(register.segment, register.nonce, payload, register.writer_slot)
        try:
            self._pool = torch.frombuffer(self._segment.data, dtype=torch.uint8)[HEADER_BYTES : HEADER_BYTES + payload]
            self._unpin = device.pin(self._pool)
        except BaseException:
            self._segment.close()  # it holds the writer's lock
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
    """Opens ShmLinks."""

    name = "shm"

    def __init__(self, device: Device | None = None) -> None:
        self._device = device or Device()

    def open(self, register: Register) -> ShmLink:
        if not register.segment:
            raise DataPathUnavailable("the language server offers no shared memory")
        return ShmLink(register, self._device)

    def close(self) -> None:
        """Nothing is held besides the links."""
