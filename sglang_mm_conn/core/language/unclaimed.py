"""Owns the Announce and Failed messages of unclaimed rooms, which no request expects yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sglang_mm_conn.core.language.receiver_room import Peer
from sglang_mm_conn.core.messages import Announce, Failed
from sglang_mm_conn.core.outcomes import FailureCode, Outcome
from sglang_mm_conn.core.texts import as_text

# The limit per encoder process. A process that announces nonsense leaves capacity for the others.
UNCLAIMED_LIMIT = 8192


@dataclass(frozen=True, slots=True)
class Unclaimed:
    """The last message about an unclaimed room.

    Attributes:
        peer: the encoder process that sent it.
        message: Announce or Failed.
        until: time at which the room can no longer be claimed.
    """

    peer: Peer
    message: Announce | Failed
    until: float


class UnclaimedRooms(Mapping[str, Unclaimed]):
    """The unclaimed rooms by name, the oldest first."""

    def __init__(self, claim_timeout: float) -> None:
        self._claim_timeout = claim_timeout
        self._rooms: dict[str, Unclaimed] = {}  # in the order of ``until``
        self._count: Counter[str] = Counter()  # rooms by encoder process

    def __getitem__(self, room: str) -> Unclaimed:
        return self._rooms[room]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rooms)

    def __len__(self) -> int:
        return len(self._rooms)

    def put(self, peer: Peer, message: Announce | Failed, now: float) -> bool:
        """Keep ``message`` instead of an older one. Returns False if its process already has too many rooms here."""
        room = message.room
        self.take(room)  # the new one goes to the end
        if self._count[peer.incarnation] >= UNCLAIMED_LIMIT:
            return False
        if isinstance(message, Failed):  # its reason may be long
            message = Failed(room=room, reason=as_text(message.reason), code=message.code, drained=message.drained)
        self._rooms[room] = Unclaimed(peer, message, now + self._claim_timeout)
        self._count[peer.incarnation] += 1
        return True

    def take(self, room: str) -> Unclaimed | None:
        """Remove and return the message about ``room``: a request claims it, or none can any more."""
        item = self._rooms.pop(room, None)
        if item is not None:
            self._count[item.peer.incarnation] -= 1
            if not self._count[item.peer.incarnation]:
                del self._count[item.peer.incarnation]
        return item

    def drop_process(self, incarnation: str) -> None:
        for room in [room for room, item in self._rooms.items() if item.peer.incarnation == incarnation]:
            self.take(room)

    def take_expired(self, now: float) -> list[tuple[Unclaimed, Outcome]]:
        """Remove the rooms that no request claimed in time. Returns each with its outcome for a later request."""
        expired = []
        while self._rooms and now >= (item := next(iter(self._rooms.values()))).until:  # the oldest is the first
            message = item.message
            self.take(message.room)
            if isinstance(message, Failed):
                outcome = Outcome(message.reason, message.code)
            else:
                outcome = Outcome(
                    f"no request claimed the room within {self._claim_timeout:g} s", FailureCode.TIMED_OUT
                )
            expired.append((item, outcome))
        return expired
