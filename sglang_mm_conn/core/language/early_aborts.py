"""Owns the Aborts of rooms that were given up before an encoder process announced them, so that none encodes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from sglang_mm_conn.core.actions import Action
from sglang_mm_conn.core.language.receiver_room import Peer, ReceiverRoom, abort_message

_LIMIT = 1024  # rooms; the oldest go first
SECONDS = 60.0


class EarlyAborts:
    """Which process has a room is known once it announces the room. Until then every process of the encoder may have
    it, so each gets the Abort; one that registers within a minute, for example because it was frozen, gets it then."""

    def __init__(self) -> None:
        self._rooms: deque[tuple[float, str, str, str]] = deque(maxlen=_LIMIT)  # until, room, encoder, reason

    def give_up(self, entry: ReceiverRoom, reason: str, peers: Iterable[Peer], now: float) -> list[Action]:
        """``entry`` has failed and no process has announced it. Returns the Aborts for those of ``peers`` that may."""
        self._rooms.append((now + SECONDS, entry.room, entry.encoder, reason))
        return [abort_message(peer, entry.room, reason) for peer in peers if entry.encoder in peer.urls]

    def registered(self, peer: Peer, now: float) -> list[Action]:
        """``peer`` is registered, perhaps again. Returns the Aborts that it may not have got; repeated ones do no
        harm."""
        while self._rooms and self._rooms[0][0] <= now:
            self._rooms.popleft()
        return [abort_message(peer, room, reason) for _, room, encoder, reason in self._rooms if encoder in peer.urls]
