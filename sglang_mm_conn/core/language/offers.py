"""Owns the queue of rooms that wait for blocks, and the size of each offer."""

from __future__ import annotations

from collections import deque

from sglang_mm_conn.core.actions import Send
from sglang_mm_conn.core.blocks import BlockAllocator
from sglang_mm_conn.core.errors import ConnError
from sglang_mm_conn.core.language.receiver_room import ReceiverRoom
from sglang_mm_conn.core.layout import Geometry
from sglang_mm_conn.core.messages import Announce, Init, Resume
from sglang_mm_conn.core.outcomes import FailureCode, Outcome
from sglang_mm_conn.core.states import ReceiverState

# An offer shortens the deadline that it carries by the share, but by no more than the seconds. The encoder counts from
# when the offer arrives, so without the margin its deadline could be later than this side's.
DEADLINE_MARGIN_SECONDS = 1.0
DEADLINE_MARGIN_SHARE = 0.1
# Keeps an offer far below the smallest allowed limit of a control frame. A resume offers the rest.
MAX_OFFER_BLOCKS = 65536


class Offers:
    """First come, first served. The first room takes whatever is free, so no room starves."""

    def __init__(
        self, allocator: BlockAllocator, geometry: Geometry, *, first_offer: int | None, max_embedding_bytes: int
    ) -> None:
        """``first_offer``: most rows of a room's window 0; None: no limit."""
        self._allocator = allocator
        self._geometry = geometry
        self._first_offer = first_offer
        self._max_embedding_bytes = max_embedding_bytes
        self.waiting: deque[ReceiverRoom] = deque()  # ``take`` skips rooms that are finished

    def too_large(self, message: Announce) -> Outcome | None:
        """The outcome of a room that is too large for any offer; None: offers can hold it."""
        if message.row_bytes > self._geometry.block_bytes:
            reason = f"a row of {message.row_bytes} bytes does not fit a block of {self._geometry.block_bytes} bytes"
            return Outcome(reason, FailureCode.INTERNAL)
        if message.total_tokens * message.row_bytes > self._max_embedding_bytes:
            code = FailureCode.TOO_LARGE
            reason = f"{message.total_tokens} rows of {message.row_bytes} bytes are more than "
            return Outcome(f"{reason}SGLANG_MM_CONN_MAX_EMBEDDING_BYTES={self._max_embedding_bytes}", code)
        return None

    def anyone_waits(self) -> bool:
        return bool(self.waiting) and any(entry.state is ReceiverState.QUEUED for entry in self.waiting)

    def sweep(self) -> None:
        """Remove rooms that finished while they waited."""
        self.waiting = deque(entry for entry in self.waiting if entry.state is ReceiverState.QUEUED)

    def take(self) -> tuple[ReceiverRoom, list[int], int] | None:
        """The room that has waited longest, the blocks allocated for its next window, and the rows to offer.

        None if no room waits or no block is free.
        """
        while self.waiting and self._allocator.free_count:
            entry = self.waiting.popleft()
            if entry.machine.state is not ReceiverState.QUEUED:
                continue
            tokens = entry.total_tokens - entry.sent_tokens
            if entry.window < 0 and self._first_offer is not None:
                tokens = min(tokens, self._first_offer)
            needed = self._geometry.blocks_for(tokens, entry.row_bytes)
            count = min(needed, self._allocator.free_count, MAX_OFFER_BLOCKS)
            blocks = self._allocator.allocate((entry.room, entry.window + 1), count)
            return entry, blocks, min(tokens, self._geometry.capacity(count, entry.row_bytes))
        return None

    def check(self, entry: ReceiverRoom, blocks: list[int], sent_tokens: int, allocated_tokens: int) -> None:
        """Raise ConnError unless this can be the room's next window."""
        if sent_tokens != entry.sent_tokens:
            raise ConnError(f"room {entry.room}: sent_tokens={sent_tokens}, but {entry.sent_tokens} are copied out")
        owner = (entry.room, entry.window + 1)
        if not self._allocator.holds(owner, blocks):
            raise ConnError(f"room {owner[0]} does not hold blocks {blocks[:8]}... for window {owner[1]}")
        most = self._geometry.capacity(len(blocks), entry.row_bytes)
        remaining = entry.total_tokens - sent_tokens
        if not 1 <= allocated_tokens <= min(most, remaining):
            raise ConnError(
                f"room {entry.room}: allocated_tokens={allocated_tokens}, but the blocks hold {most} rows "
                f"and {remaining} rows remain"
            )


def offer_message(entry: ReceiverRoom, now: float) -> Send:
    """The offer of the current window: Init for window 0, Resume for any later one."""
    assert entry.peer is not None
    left = entry.deadline - now
    left = max(0.0, left - min(DEADLINE_MARGIN_SECONDS, left * DEADLINE_MARGIN_SHARE))
    session = entry.peer.mooncake_session_id
    if entry.window == 0:
        return Send(
            entry.peer.incarnation,
            Init(
                room=entry.room,
                mooncake_session_id=session,
                epoch=entry.epoch,
                dst_embedding_indices=list(entry.blocks),
                allocated_tokens=entry.allocated_tokens,
                required_dst_info_num=entry.required_dst_info_num,
                deadline=left,
            ),
        )
    return Send(
        entry.peer.incarnation,
        Resume(
            room=entry.room,
            mooncake_session_id=session,
            epoch=entry.epoch,
            window=entry.window,
            dst_embedding_indices=list(entry.blocks),
            sent_tokens=entry.sent_tokens,
            allocated_tokens=entry.allocated_tokens,
            deadline=left,
        ),
    )
