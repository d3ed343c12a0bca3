"""Owns the limit of concurrent data calls per session, and the rooms that wait until one returns."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping

from sglang_mm_conn.core.encoder.sender_room import RegisteredSession, SenderRoom
from sglang_mm_conn.core.states import SenderState, WindowState


class WriteSlots:
    """Writes and waiting rooms by session id. Each session has a limit, so one that hangs never holds every worker."""

    def __init__(self) -> None:
        self.writes: Counter[str] = Counter()  # data calls under way; sessions without any have no entry
        self.deferred: dict[str, deque[str]] = {}  # rooms that wait, longest first

    def take(self, session: RegisteredSession, room: str) -> bool:
        """Whether a write to ``session`` may begin now. If not, ``room`` waits for one to return."""
        session_id = session.mooncake_session_id
        if self.writes[session_id] >= session.most_writes:
            self.deferred.setdefault(session_id, deque()).append(room)
            return False
        self.writes[session_id] += 1
        return True

    def give_back(self, session_id: str) -> None:
        """A write has returned."""
        self.writes[session_id] -= 1
        if not self.writes[session_id]:
            del self.writes[session_id]

    def next_room(self, session_id: str, rooms: Mapping[str, SenderRoom]) -> SenderRoom | None:
        """Remove and return the room that has waited longest and still has a window to write; None if there is none."""
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
        """Sessions that rooms wait for although the session has capacity, or is lost.

        Usually the end of a write queues the next room. But if that room was aborted in the meantime, it wrote nothing,
        so no end of a write follows and the rooms behind it still wait.
        """
        return [
            session_id
            for session_id in self.deferred
            if (session := sessions.get(session_id)) is None or self.writes[session_id] < session.most_writes
        ]
