"""Owns the quarantine: blocks of failed rooms that an encoder may still write, until a proof frees them.

The proofs: Progress or Done of exactly that window; Drained; Failed with ``drained``; the end of the writing process
(only if the data path has an exclusive lock); the revocation of the engine epoch that the window was offered for.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace

from sglang_mm_conn.core.blocks import BlockAllocator
from sglang_mm_conn.core.language.receiver_room import Peer, ReceiverRoom, RoomMessage
from sglang_mm_conn.core.messages import Done, Drained, Failed, Progress

# An Abort that was not answered is repeated after this.
ABORT_AGAIN_SECONDS = 5.0


@dataclass(slots=True)
class Quarantine:
    """Blocks of a failed room that its encoder may still write.

    Attributes:
        owner: room and window.
        peer: the encoder process, with the engine epoch that the window was offered for.
        blocks: the window's blocks.
        confirmed_tokens: rows in all that a confirmation of this window has to name.
        since: time at which the room failed.
        ask_again_at: time to repeat the Abort.
    """

    owner: tuple[str, int]
    peer: Peer
    blocks: tuple[int, ...]
    confirmed_tokens: int
    since: float
    ask_again_at: float


class QuarantineTable(Mapping[str, Quarantine]):
    """The quarantines by room. A caller that frees blocks must then serve the rooms that wait for blocks."""

    def __init__(self, allocator: BlockAllocator) -> None:
        self._allocator = allocator
        self._held: dict[str, Quarantine] = {}

    def __getitem__(self, room: str) -> Quarantine:
        return self._held[room]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def put(self, entry: ReceiverRoom, now: float) -> None:
        """Put the blocks of the window that ``entry`` has offered into quarantine."""
        assert entry.peer is not None
        owner = (entry.room, entry.window)
        self._allocator.quarantine(owner, entry.blocks)
        # The peer may have registered a newer epoch since, but it writes this window through the offered epoch only.
        peer = replace(entry.peer, epoch=entry.epoch)
        confirmed = entry.sent_tokens + entry.allocated_tokens
        self._held[entry.room] = Quarantine(owner, peer, tuple(entry.blocks), confirmed, now, now + ABORT_AGAIN_SECONDS)

    def waits_for(self, peer: Peer, room: str) -> bool:
        """Whether a message of ``peer`` about ``room`` may be a proof: only if session and epoch are the same, too."""
        held = self._held.get(room)
        return held is not None and held.peer == peer

    def on_message(self, message: RoomMessage) -> bool:
        """Handle a message for which ``waits_for`` is true. Returns whether it is a proof and freed the blocks."""
        held = self._held[message.room]
        if isinstance(message, Drained):
            proven = True
        elif isinstance(message, Failed):
            proven = message.drained
        else:
            proven = isinstance(message, Progress | Done) and self._says_landed(held, message)
        return proven and self.release(message.room)

    @staticmethod
    def _says_landed(held: Quarantine, message: Progress | Done) -> bool:
        """Whether ``message`` confirms exactly the window in quarantine, with the right number of rows."""
        if isinstance(message, Done):
            return (message.window, message.total_tokens) == (held.owner[1], held.confirmed_tokens)
        return not message.refused and (message.window, message.sent_tokens) == (held.owner[1], held.confirmed_tokens)

    def release(self, room: str) -> bool:
        """Free the blocks of ``room``: no write into them will come. Returns whether there were any."""
        held = self._held.pop(room, None)
        if held is None:
            return False
        self._allocator.release_quarantined(held.owner, held.blocks)
        return True

    def writer_gone(self, incarnation: str) -> bool:
        """The process has ended. This frees its blocks only over a path with an exclusive lock.

        Without such a lock its writes may still land. Returns whether blocks are free again.
        """
        return self._release_where(lambda peer: peer.incarnation == incarnation and peer.exclusive_lock)

    def epoch_revoked(self, mooncake_session_id: str, epoch: int) -> bool:
        """No write through an epoch up to ``epoch`` lands any more. Returns whether blocks are free again."""
        return self._release_where(lambda peer: peer.writes_through(mooncake_session_id, epoch))

    def _release_where(self, proven: Callable[[Peer], bool]) -> bool:
        rooms = [room for room, held in self._held.items() if proven(held.peer)]
        for room in rooms:
            self.release(room)
        return bool(rooms)

    def peers(self) -> set[Peer]:
        """The peers that may still write quarantined blocks, each with the epoch that it may write through."""
        return {held.peer for held in self._held.values()}

    def in_doubt_since(self, mooncake_session_id: str) -> float | None:
        """Time at which the session's oldest quarantine began; None if it has none."""
        held_for_it = (held for held in self._held.values() if held.peer.mooncake_session_id == mooncake_session_id)
        return min((held.since for held in held_for_it), default=None)

    def of_process(self, incarnation: str) -> list[tuple[Peer, str]]:
        """(peer, room) of every quarantine of this process: for each an Abort has to be repeated."""
        return [(held.peer, room) for room, held in self._held.items() if held.peer.incarnation == incarnation]

    def to_ask_again(self, now: float, registered: Container[str]) -> list[tuple[Peer, str]]:
        """(peer, room) of every quarantine whose Abort has to be repeated now. Schedules the next repetition."""
        due = []
        for room, held in self._held.items():
            if now >= held.ask_again_at and held.peer.incarnation in registered:
                held.ask_again_at = now + ABORT_AGAIN_SECONDS
                due.append((held.peer, room))
        return due
