"""The block allocator: who holds each block of the pool. Pure bookkeeping, not thread-safe by itself.

A block is free, held by exactly one owner, or quarantined on behalf of one. Quarantined means: the owner is done with
it, but it is not yet proven that no write to it is under way or to come, so nobody else may have it.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence

from sglang_mm_conn.core.errors import AllocatorError


class BlockAllocator:
    """Hands out the lowest free blocks, so that windows tend to be runs that the data path can merge."""

    def __init__(self, blocks: int) -> None:
        if blocks < 1:
            raise AllocatorError(f"a pool needs at least one block, not {blocks}")
        self.blocks = blocks
        self._free = list(range(blocks))  # a heap; ascending order is one
        self._held: dict[int, Hashable] = {}
        self._quarantined: dict[int, Hashable] = {}

    @property
    def free_count(self) -> int:
        return len(self._free)

    @property
    def held_count(self) -> int:
        return len(self._held)

    @property
    def quarantined_count(self) -> int:
        return len(self._quarantined)

    def allocate(self, owner: Hashable, count: int) -> list[int]:
        """Give ``owner`` ``count`` blocks in allocation order. Raises AllocatorError where fewer are free."""
        if not 1 <= count <= len(self._free):
            raise AllocatorError(f"{count} blocks asked for by {owner}, {len(self._free)} free")
        blocks = [heapq.heappop(self._free) for _ in range(count)]
        for block in blocks:
            self._held[block] = owner
        return blocks

    def holds(self, owner: Hashable, blocks: Sequence[int]) -> bool:
        """Whether ``owner`` holds every one of ``blocks``, each named once."""
        return len(set(blocks)) == len(blocks) and all(self._held.get(block) == owner for block in blocks)

    def release(self, owner: Hashable, blocks: Sequence[int]) -> None:
        """Free blocks that ``owner`` holds. All or nothing: raises AllocatorError where it does not hold them all."""
        self._check(self._held, owner, blocks)
        for block in blocks:
            del self._held[block]
            heapq.heappush(self._free, block)

    def quarantine(self, owner: Hashable, blocks: Sequence[int]) -> None:
        """Take blocks away from ``owner`` without freeing them."""
        self._check(self._held, owner, blocks)
        for block in blocks:
            self._quarantined[block] = self._held.pop(block)

    def absolve(self, owner: Hashable, blocks: Sequence[int]) -> None:
        """Free quarantined blocks of ``owner``: it is proven that no write to them can land any more."""
        self._check(self._quarantined, owner, blocks)
        for block in blocks:
            del self._quarantined[block]
            heapq.heappush(self._free, block)

    def check_integrity(self) -> None:
        """Raise AllocatorError unless every block is in exactly one place."""
        places = [*self._free, *self._held, *self._quarantined]
        if sorted(places) != list(range(self.blocks)):
            raise AllocatorError(
                f"{self.blocks} blocks, but {len(self._free)} free, {len(self._held)} held, "
                f"{len(self._quarantined)} quarantined ({len(set(places))} different)"
            )

    @staticmethod
    def _check(table: dict[int, Hashable], owner: Hashable, blocks: Sequence[int]) -> None:
        if len(set(blocks)) != len(blocks):
            raise AllocatorError(f"{owner} named a block twice")
        for block in blocks:
            if block not in table or table[block] != owner:
                raise AllocatorError(f"block {block} is not {owner}'s")
