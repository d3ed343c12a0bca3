"""A bounded memory of rooms that ended, so that late messages about them are answered and change nothing."""

from __future__ import annotations

from collections import OrderedDict

from sglang_mm_conn.core.outcomes import Outcome

# Of a reason that a tombstone keeps: a peer may say as much as 4096 characters, and there are many tombstones.
_REASON_CHARACTERS = 200


class Tombstones:
    """Keeps the outcome on each ended room until its time, at most ``limit`` of them (oldest go first)."""

    def __init__(self, limit: int = 65536) -> None:
        self._limit = limit
        self._stones: OrderedDict[str, tuple[float, Outcome]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._stones)

    def __contains__(self, room: str) -> bool:
        return room in self._stones

    def put(self, room: str, outcome: Outcome, until: float) -> None:
        """Remember ``outcome`` until time ``until``; replaces an older outcome on the same room."""
        if len(outcome.reason) > _REASON_CHARACTERS:
            outcome = Outcome(outcome.reason[:_REASON_CHARACTERS], outcome.code)
        self._stones[room] = (until, outcome)
        self._stones.move_to_end(room)
        while len(self._stones) > self._limit:
            self._stones.popitem(last=False)

    def get(self, room: str) -> Outcome | None:
        stone = self._stones.get(room)
        return None if stone is None else stone[1]

    def sweep(self, now: float) -> None:
        """Forget what has expired, oldest first. One with a late expiry delays younger ones, the limit bounds them."""
        while self._stones:
            room, (until, _) = next(iter(self._stones.items()))
            if until > now:
                return
            del self._stones[room]
