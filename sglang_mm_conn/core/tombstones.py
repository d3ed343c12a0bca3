"""Owns the tombstones: a bounded record of finished rooms, so that late messages get an answer and change nothing."""

from __future__ import annotations

from collections import OrderedDict

from sglang_mm_conn.core.outcomes import Outcome

# A tombstone keeps this much of a reason. A peer may send 4096 characters, and there are many tombstones.
_REASON_CHARACTERS = 200


class Tombstones:
    """Keeps the outcome of each finished room until it expires, at most ``limit`` of them (the oldest go first)."""

    def __init__(self, limit: int = 65536) -> None:
        self._limit = limit
        self._stones: OrderedDict[str, tuple[float, Outcome]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._stones)

    def __contains__(self, room: str) -> bool:
        return room in self._stones

    def put(self, room: str, outcome: Outcome, until: float) -> None:
        """Keep ``outcome`` until time ``until``. Replaces an older outcome of the same room."""
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
        """Forget expired ones, oldest first. One that expires late delays younger ones; ``limit`` bounds them."""
        while self._stones:
            room, (until, _) = next(iter(self._stones.items()))
            if until > now:
                return
            del self._stones[room]
