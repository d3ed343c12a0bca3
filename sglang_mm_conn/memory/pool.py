"""Owns the language rank's pool: blocks in a few regions of host or GPU memory, and the copies out of them."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Sequence

import torch

from sglang_mm_conn.core.errors import MemoryUnavailable, ProtocolError
from sglang_mm_conn.core.layout import Geometry, window_extents
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.memory.buffer_cache import lease
from sglang_mm_conn.memory.device import Device
from sglang_mm_conn.memory.segment import HEADER_BYTES, Segment, free_bytes

logger = logging.getLogger(__name__)

DEFAULT_POOL_BYTES = 256 << 20


def pool_geometry(settings: Settings, widest_row_bytes: int, *, shared: bool) -> Geometry:
    """The pool's geometry under ``settings``, for a model whose widest row has ``widest_row_bytes``.

    The number of blocks is a multiple of the number of regions. It is rounded up if the user has set it, otherwise
    down.
    """
    block_bytes = settings.block_size * widest_row_bytes
    if settings.blocks is not None:
        regions = min(settings.regions, settings.blocks)
        return Geometry(block_bytes, -(-settings.blocks // regions), regions)
    limit = min(DEFAULT_POOL_BYTES, free_bytes() // 2) if shared else DEFAULT_POOL_BYTES
    blocks = max(settings.regions, limit // block_bytes)
    return Geometry(block_bytes, blocks // settings.regions, settings.regions)


class BlockPool:
    """``geometry.regions`` regions in a shared segment (``shared``), in anonymous memory, or in GPU memory
    (``memory_device``).

    Host memory is pinned if ``device`` is a GPU, so that copies between them run at full rate.

    ``regions[i]`` is a uint8 tensor over region i. core.language.receiver decides which process may use which block.
    """

    def __init__(
        self, geometry: Geometry, *, shared: bool, device: Device | None = None, memory_device: str = "cpu"
    ) -> None:
        """Raises MemoryUnavailable."""
        self.geometry = geometry
        self._device = device or Device()
        self.segment: Segment | None = None
        payload = geometry.region_bytes * geometry.regions
        if shared:
            self.segment = Segment(payload)
            whole = torch.frombuffer(self.segment.data, dtype=torch.uint8)[HEADER_BYTES : HEADER_BYTES + payload]
        elif memory_device == "cpu":
            whole = torch.frombuffer(_anonymous(payload), dtype=torch.uint8)
        else:
            whole = self._device.empty(payload, memory_device)
        self._unpin = self._device.pin(whole) if memory_device == "cpu" else lambda: None
        self.regions = list(whole.split(geometry.region_bytes))
        self._whole = whole
        self._on_gpu = memory_device != "cpu"
        logger.info(
            "Embedding pool: %d blocks of %d bytes in %d regions, %.1f MiB of %s memory",
            geometry.blocks, geometry.block_bytes, geometry.regions, payload / 2**20,
            "shared" if shared else "private" if memory_device == "cpu" else self._device.name,
        )  # fmt: skip

    def read(self, blocks: Sequence[int], target: torch.Tensor, nbytes: int, first_byte: int = 0) -> None:
        """Copy the ``nbytes`` bytes of a window from ``blocks`` to ``target`` (uint8, one dimension), at
        ``first_byte``.

        When this returns, the copy no longer reads the blocks.
        """
        if self._on_gpu:
            # Hazard: Mooncake's engine acknowledges a write over TCP once its cudaMemcpy from pageable memory has
            # returned, which may be before the bytes are in place. That copy runs on the default stream, the
            # connector's copies do not. So wait for the default stream first.
            self._device.drain()
        region_bytes = self.geometry.region_bytes
        self._device.copy(
            (target, extent.start, self._whole, extent.region * region_bytes + extent.offset, extent.length)
            for extent in window_extents(self.geometry, blocks, nbytes, first_byte)
        )

    def view(self, blocks: Sequence[int], nbytes: int, on_release: Callable[[], None]) -> torch.Tensor:
        """The first ``nbytes`` bytes of a window, without a copy (uint8, one dimension). ``blocks`` must be contiguous.
        Calls ``on_release`` when nothing refers to them any more (see memory.buffer_cache.lease).

        Hazard: only the lifetime of this tensor protects the blocks. So the pool must not be pinned for a device: a
        copy to the device could still be under way when the last tensor is released.
        """
        first, count = blocks[0], self.geometry.blocks_for(nbytes, 1)
        if list(blocks) != list(range(first, first + len(blocks))) or count > len(blocks):
            raise ProtocolError(f"{nbytes} bytes in blocks {list(blocks)[:8]}... are not contiguous")
        at = first * self.geometry.block_bytes
        return lease(self._whole[at : at + nbytes].numpy(), on_release)

    def close(self) -> None:
        self._unpin()
        if self.segment is not None:
            self.segment.close()


def _anonymous(nbytes: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    except OSError as error:
        raise MemoryUnavailable(
            f"cannot map {nbytes >> 20} MiB for the pool ({error.strerror}): lower SGLANG_EMBEDDING_CACHE_BUFFER_SIZE"
        ) from error
