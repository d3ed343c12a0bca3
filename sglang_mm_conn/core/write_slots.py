"""Owns the turns to write to a session: how many data calls are under way, and which rooms wait for one to end."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping

from sglang_mm_conn.core.sender_room import RegisteredSession, SenderRoom
from sglang_mm_conn.core.states import SenderState, WindowState


class WriteSlots:
    """By session id. A destination that hangs must not hold every worker, so each has a limit."""

    def __init__(self) -> None:
        self.writes: Counter[str] = Counter()  # under way; no session without any
        self.deferred: dict[str, deque[str]] = {}  # rooms that wait for their turn

    def take(self, session: RegisteredSession, room: str) -> bool:
        """Whether a write to ``session`` may begin now; where not, ``room`` waits for its turn there."""
        session_id = session.mooncake_session_id
        if self.writes[session_id] >= session.most_writes:
            self.deferred.setdefault(session_id, deque()).append(room)
            return False
        self.writes[session_id] += 1
        return True

    def give_back(self, session_id: str) -> None:
        """A write has ended."""
        self.writes[session_id] -= 1
        if not self.writes[session_id]:
            del self.writes[session_id]

    def next_room(self, session_id: str, rooms: Mapping[str, SenderRoom]) -> SenderRoom | None:
        """The room that has waited longest and still has something to write there; its wait is over."""
        waiting = self.deferred.get(session_id)
        if waiting is None:
            return None
        while waiting:
            entry = rooms.get(waiting.popleft())
            if entry is None or entry.state is not SenderState.TRANSFERRING:
                continue
            if entry.transfer_infos[session_id].state is WindowState.OFFERED:
                return entry
        del self.deferred[session_id]
        return None

    def idle(self, sessions: Mapping[str, RegisteredSession]) -> list[str]:
        """Sessions that rooms wait for although they are free, or gone.

        Normally the end of a write passes the turn on; a room that was aborted in its turn wrote nothing.
        """
        return [
            session_id
            for session_id in self.deferred
            if (session := sessions.get(session_id)) is None or self.writes[session_id] < session.most_writes
        ]
