"""Owns the Aborts of rooms that were given up before an encoder process announced them, so that none encodes them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from sglang_mm_conn.core.actions import Action
from sglang_mm_conn.core.language.receiver_room import Peer, ReceiverRoom, abort_message

_LIMIT = 1024  # rooms whose encoder is not registered; the oldest go first


class EarlyAborts:
    """Which process has a room is known once it announces the room. Until then every process of the encoder may have
    it, so each gets the Abort; one that is not registered, for example because it is frozen, gets it when it is."""

    def __init__(self) -> None:
        self._unsent: OrderedDict[str, tuple[str, str]] = OrderedDict()  # room -> encoder, reason

    def give_up(self, entry: ReceiverRoom, reason: str, peers: Iterable[Peer]) -> list[Action]:
        """``entry`` has failed and no process has announced it. Returns the Aborts for those of ``peers`` that may."""
        aborts: list[Action] = [abort_message(peer, entry.room, reason) for peer in peers if entry.encoder in peer.urls]
        if not aborts:
            self._unsent[entry.room] = (entry.encoder, reason)
            if len(self._unsent) > _LIMIT:
                self._unsent.popitem(last=False)
        return aborts

    def registered(self, peer: Peer) -> list[Action]:
        """``peer`` is registered. Returns the Aborts that it could not get before."""
        rooms = [(room, reason) for room, (encoder, reason) in self._unsent.items() if encoder in peer.urls]
        for room, _ in rooms:
            del self._unsent[room]
        return [abort_message(peer, room, reason) for room, reason in rooms]
