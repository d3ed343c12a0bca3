"""Owns the block allocator: which owner holds each block of the pool. Pure bookkeeping, not thread-safe.

A block is free, held by exactly one owner, or quarantined. A quarantined block belonged to a room that failed. A write
into it may be under way or still come, so it goes to no other owner until a proof that none will.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable, Sequence

from sglang_mm_conn.core.errors import AllocatorError


class BlockAllocator:
    """Hands out runs of contiguous blocks, since the data path writes a run in one call.

    It takes the shortest free run that is long enough. If none is, it takes the longest run, and the rest in the same
    way. Of runs of equal length it takes the lowest.
    """

    def __init__(self, blocks: int) -> None:
        if blocks < 1:
            raise AllocatorError(f"a pool needs at least one block, not {blocks}")
        self.blocks = blocks
        self._free_count = 0
        # The free runs, as long as possible: length by start, start by end, and sorted (length, start).
        self._lengths: dict[int, int] = {}
        self._starts: dict[int, int] = {}
        self._by_length: list[tuple[int, int]] = []
        self._held: dict[int, Hashable] = {}
        self._quarantined: dict[int, Hashable] = {}
        self._add_run(0, blocks)

    @property
    def free_count(self) -> int:
        return self._free_count

    @property
    def held_count(self) -> int:
        return len(self._held)

    @property
    def quarantined_count(self) -> int:
        return len(self._quarantined)

    def free_blocks(self) -> list[int]:
        """The free blocks, ascending."""
        return [block for start, length in sorted(self._lengths.items()) for block in range(start, start + length)]

    def allocate(self, owner: Hashable, count: int) -> list[int]:
        """Give ``owner`` ``count`` blocks in allocation order. Raises AllocatorError if fewer are free."""
        if not 1 <= count <= self._free_count:
            raise AllocatorError(f"{owner} requested {count} blocks, {self._free_count} are free")
        blocks: list[int] = []
        while (missing := count - len(blocks)) > 0:
            at = bisect_left(self._by_length, (missing, 0))
            if at == len(self._by_length):
                at = bisect_left(self._by_length, (self._by_length[-1][0], 0))
            length, start = self._by_length[at]
            self._remove_run(start)
            taken = min(length, missing)
            if taken < length:
                self._add_run(start + taken, length - taken)
            blocks.extend(range(start, start + taken))
        for block in blocks:
            self._held[block] = owner
        return blocks

    def holds(self, owner: Hashable, blocks: Sequence[int]) -> bool:
        """Whether ``owner`` holds every block of ``blocks``, and no block is listed twice."""
        return len(set(blocks)) == len(blocks) == list(map(self._held.get, blocks)).count(owner)

    def release(self, owner: Hashable, blocks: Sequence[int]) -> None:
        """Free blocks that ``owner`` holds. Raises AllocatorError, and frees none, unless it holds all of them."""
        self._check(self._held, owner, blocks)
        for block in blocks:
            del self._held[block]
        self._free(blocks)

    def quarantine(self, owner: Hashable, blocks: Sequence[int]) -> None:
        """Put blocks that ``owner`` holds into quarantine."""
        self._check(self._held, owner, blocks)
        for block in blocks:
            self._quarantined[block] = self._held.pop(block)

    def release_quarantined(self, owner: Hashable, blocks: Sequence[int]) -> None:
        """Free quarantined blocks of ``owner``. The caller has a proof that no write into them can land any more."""
        self._check(self._quarantined, owner, blocks)
        for block in blocks:
            del self._quarantined[block]
        self._free(blocks)

    def check_integrity(self) -> None:
        """Raise AllocatorError unless every block is in exactly one of: free, held, quarantined."""
        free = self.free_blocks()
        places = [*free, *self._held, *self._quarantined]
        if sorted(places) != list(range(self.blocks)):
            raise AllocatorError(
                f"{self.blocks} blocks, but {len(free)} free, {len(self._held)} held, "
                f"{len(self._quarantined)} quarantined ({len(set(places))} different)"
            )
        runs = self._lengths.items()
        if (
            self._free_count != len(free)
            or self._by_length != sorted((length, start) for start, length in runs)
            or self._starts != {start + length: start for start, length in runs}
            or any(start in self._starts for start in self._lengths)
        ):
            raise AllocatorError(f"the free runs {sorted(runs)} are inconsistent")

    def _free(self, blocks: Iterable[int]) -> None:
        start = length = 0
        for block in sorted(blocks):
            if block == start + length:
                length += 1
                continue
            if length:
                self._add_run(start, length)
            start, length = block, 1
        if length:
            self._add_run(start, length)

    def _add_run(self, start: int, length: int) -> None:
        """Add a run of blocks that become free. It merges with the free runs next to it."""
        end = start + length
        if (before := self._starts.get(start)) is not None:
            self._remove_run(before)
            start = before
        if end in self._lengths:
            end += self._remove_run(end)
        self._lengths[start] = end - start
        self._starts[end] = start
        insort(self._by_length, (end - start, start))
        self._free_count += end - start

    def _remove_run(self, start: int) -> int:
        """Remove the free run that begins at ``start``, and return its length."""
        length = self._lengths.pop(start)
        del self._starts[start + length]
        del self._by_length[bisect_left(self._by_length, (length, start))]
        self._free_count -= length
        return length

    @staticmethod
    def _check(table: dict[int, Hashable], owner: Hashable, blocks: Sequence[int]) -> None:
        if len(set(blocks)) != len(blocks):
            raise AllocatorError(f"{owner} listed a block twice")
        for block in blocks:
            if block not in table or table[block] != owner:
                raise AllocatorError(f"block {block} does not belong to {owner}")
