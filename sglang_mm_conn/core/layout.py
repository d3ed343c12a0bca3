"""Where the bytes of a window lie: blocks in allocation order, regions, merged extents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from sglang_mm_conn.core.errors import ProtocolError


@dataclass(frozen=True)
class Geometry:
    """The shape of a pool: ``regions`` regions of ``blocks_per_region`` blocks of ``block_bytes`` bytes."""

    block_bytes: int
    blocks_per_region: int
    regions: int

    @property
    def blocks(self) -> int:
        return self.blocks_per_region * self.regions

    @property
    def region_bytes(self) -> int:
        return self.blocks_per_region * self.block_bytes

    def capacity(self, block_count: int, row_bytes: int) -> int:
        """Rows of ``row_bytes`` that ``block_count`` blocks hold. Rows are packed: one may straddle two blocks."""
        return block_count * self.block_bytes // row_bytes

    def blocks_for(self, tokens: int, row_bytes: int) -> int:
        """Blocks needed for ``tokens`` rows of ``row_bytes``."""
        return -(-tokens * row_bytes // self.block_bytes)


class Extent(msgspec.Struct, frozen=True):
    """``length`` bytes at ``offset`` in region ``region``, which are bytes ``start``... of the embedding."""

    region: int
    offset: int
    length: int
    start: int


def window_extents(geometry: Geometry, blocks: Sequence[int], nbytes: int, first_byte: int = 0) -> list[Extent]:
    """The extents that a window of ``nbytes`` occupies, neighbouring blocks merged within a region. ``first_byte``:
    where in the embedding it begins.

    Token order is the order of ``blocks`` (allocation order), whatever their numbers are. Raises ProtocolError where
    a block does not exist, occurs twice, or the blocks hold less than ``nbytes``.
    """
    if len(set(blocks)) != len(blocks):
        raise ProtocolError(f"a block occurs twice in {list(blocks)[:8]}...")
    if nbytes > len(blocks) * geometry.block_bytes:
        raise ProtocolError(f"{nbytes} bytes do not fit {len(blocks)} blocks of {geometry.block_bytes}")
    if blocks and not (min(blocks) >= 0 and max(blocks) < geometry.blocks):
        wrong = next(block for block in blocks if not 0 <= block < geometry.blocks)
        raise ProtocolError(f"block {wrong} is not one of {geometry.blocks}")
    extents: list[Extent] = []
    per_region, block_bytes = geometry.blocks_per_region, geometry.block_bytes
    count = -(-nbytes // block_bytes)  # blocks that hold any of it
    first = 0
    while first < count:
        block = blocks[first]
        region, number = divmod(block, per_region)
        end = first + 1
        most = min(count, first + per_region - number)  # to the end of the region
        while end < most and blocks[end] == block + end - first:
            end += 1
        start = first * block_bytes
        length = min(end * block_bytes, nbytes) - start
        extents.append(Extent(region, number * block_bytes, length, first_byte + start))
        first = end
    return extents
