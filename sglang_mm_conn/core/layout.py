"""Owns the layout of a window: which bytes of which region it occupies. Blocks are in allocation order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from sglang_mm_conn.core.errors import ProtocolError


@dataclass(frozen=True)
class Geometry:
    """The shape of a pool.

    Attributes:
        block_bytes: bytes of a block.
        blocks_per_region: blocks of a region.
        regions: regions of the pool.
    """

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
        """Rows of ``row_bytes`` that ``block_count`` blocks hold. Rows are packed, so a row may lie in two blocks."""
        return block_count * self.block_bytes // row_bytes

    def blocks_for(self, tokens: int, row_bytes: int) -> int:
        """Blocks needed for ``tokens`` rows of ``row_bytes``."""
        return -(-tokens * row_bytes // self.block_bytes)


class Extent(msgspec.Struct, frozen=True):
    """Contiguous bytes of an embedding in a region.

    Attributes:
        region: its number.
        offset: the first byte in the region.
        length: bytes.
        start: the first byte in the embedding.
    """

    region: int
    offset: int
    length: int
    start: int


def window_extents(geometry: Geometry, blocks: Sequence[int], nbytes: int, first_byte: int = 0) -> list[Extent]:
    """The extents of a window of ``nbytes`` that begins at byte ``first_byte`` of the embedding.

    The rows follow the order of ``blocks`` (allocation order), not the order of the block numbers. Contiguous blocks
    of one region become one extent. Raises ProtocolError if a block does not exist or occurs twice, or if the blocks
    hold less than ``nbytes``.
    """
    if len(set(blocks)) != len(blocks):
        raise ProtocolError(f"a block occurs twice in {list(blocks)[:8]}...")
    if nbytes > len(blocks) * geometry.block_bytes:
        raise ProtocolError(f"{nbytes} bytes do not fit {len(blocks)} blocks of {geometry.block_bytes} bytes")
    if blocks and not (min(blocks) >= 0 and max(blocks) < geometry.blocks):
        wrong = next(block for block in blocks if not 0 <= block < geometry.blocks)
        raise ProtocolError(f"block {wrong} does not exist in a pool of {geometry.blocks} blocks")
    extents: list[Extent] = []
    per_region, block_bytes = geometry.blocks_per_region, geometry.block_bytes
    count = -(-nbytes // block_bytes)  # blocks that hold bytes of the window
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
