"""Owns the views, embeddings that stay in their blocks, and the limit of blocks that all views together hold."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_mm_conn.core.blocks import BlockAllocator
from sglang_mm_conn.core.errors import ConnError
from sglang_mm_conn.core.language.receiver_room import ReceiverRoom


class Views:
    """The views by room. Blocks count toward the limit as soon as a copier may make a view of them."""

    def __init__(self, allocator: BlockAllocator, *, most_blocks: int, least_bytes: int) -> None:
        """``least_bytes``: smaller embeddings are copied out."""
        self._allocator = allocator
        self._most_blocks = most_blocks
        self._least_bytes = least_bytes
        self._views: dict[str, tuple[tuple[str, int], Sequence[int]]] = {}  # room -> owner, blocks
        self._counted = 0  # blocks of views, and of windows that a copier may make a view of

    def __contains__(self, room: str) -> bool:
        return room in self._views

    def __len__(self) -> int:
        return len(self._views)

    @property
    def blocks(self) -> int:
        """Blocks that views hold."""
        return sum(len(blocks) for _, blocks in self._views.values())

    def grant(self, entry: ReceiverRoom) -> bool:
        """Whether an embedding that came in one window may stay in its blocks. If so, its blocks count.

        Call it only while no room waits for blocks, because a view holds its blocks until its request has ended.
        """
        count, first = len(entry.blocks), entry.blocks[0]
        if (
            self._counted + count > self._most_blocks
            or entry.total_tokens * entry.row_bytes < self._least_bytes
            or entry.blocks != list(range(first, first + count))
        ):
            return False
        self._counted += count
        return True

    def renounce(self, blocks: Sequence[int]) -> None:
        """The copier was allowed to make a view and made none."""
        self._counted -= len(blocks)

    def put(self, entry: ReceiverRoom) -> None:
        """The copier made a view, which keeps the window's blocks. Raises ConnError if none was granted."""
        if not entry.view:
            raise ConnError(f"room {entry.room}: no view of its blocks was granted")
        self._views[entry.room] = (entry.room, entry.window), entry.blocks

    def release(self, room: str) -> None:
        """Free the blocks of the view: nothing refers to it any more."""
        owner, blocks = self._views.pop(room)
        self._allocator.release(owner, blocks)
        self._counted -= len(blocks)

    def check_integrity(self, granted: int) -> None:
        """Raise ConnError unless the count is right. ``granted``: blocks that a copier may make a view of."""
        if self._counted != self.blocks + granted or self._counted > self._most_blocks:
            raise ConnError(
                f"{self._counted} blocks counted as views, but {self.blocks} are in views and {granted} may become one "
                f"(limit {self._most_blocks})"
            )
