"""Owns the messages that an encoder sends about its rooms, and the records from which it answers late ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from sglang_mm_conn.core.actions import Action, Send
from sglang_mm_conn.core.encoder.sender_room import RegisteredSession, SenderRoom, TransferEmbeddingInfo
from sglang_mm_conn.core.messages import Announce, Done, Failed, Message, Progress
from sglang_mm_conn.core.outcomes import FailureCode, Outcome, failure
from sglang_mm_conn.core.rooms import server_of
from sglang_mm_conn.core.states import WindowState
from sglang_mm_conn.core.texts import as_text
from sglang_mm_conn.core.tombstones import Tombstones

# Limits of the completions (and, by number, of the failures) that are kept, to be repeated if a connection lost one.
DONE_LIMIT = 1024
DONE_SECONDS = 60.0


def announcement(entry: SenderRoom, session: RegisteredSession) -> Send:
    return Send(
        session.peer,
        Announce(room=entry.room, total_tokens=entry.total_tokens, row_bytes=entry.row_bytes, dtype=entry.dtype),
    )


def status_reply(
    entry: SenderRoom, info: TransferEmbeddingInfo, session: RegisteredSession, refused: str, refused_window: int = 0
) -> Send:
    """The confirmed state of (room, session). Confirms a window, and answers a repeated or refused offer."""
    state = info.machine.state
    if state is WindowState.DONE and not refused:
        return Send(
            session.peer,
            Done(
                room=entry.room,
                window=info.window,
                total_tokens=entry.total_tokens,
                elapsed=entry.elapsed,
                metadata=entry.metadata if info.window == 0 else b"",
                checksum=entry.checksum,
            ),
        )
    confirmed = info.window if state in (WindowState.PARTIAL, WindowState.DONE) else info.window - 1
    return Send(
        session.peer,
        Progress(
            room=entry.room,
            window=confirmed,
            sent_tokens=info.sent_tokens,
            metadata=entry.metadata if confirmed == 0 and not refused else b"",
            refused=refused,
            refused_window=refused_window,
        ),
    )


def failed_message(room: str, outcome: Outcome, *, drained: bool) -> Failed:
    outcome = failure(outcome.reason, outcome.code)  # a room that succeeded is gone
    reason = as_text(outcome.reason) or "the room is finished"
    return Failed(room=room, reason=reason, code=outcome.code, drained=drained)


class Replies:
    """Completions, failures and writes in doubt of rooms whose record may be dropped."""

    def __init__(self, tombstones: Tombstones) -> None:
        self._tombstones = tombstones
        # (room, session) -> when to forget it, the Done to repeat after a lost connection
        self._done: OrderedDict[tuple[str, str], tuple[float, Message]] = OrderedDict()
        self._failures: OrderedDict[str, None] = OrderedDict()  # rooms; repeated to every session that registers
        # (room, session) -> epoch through which bytes may still land. Kept until that epoch is revoked: without its
        # entry here, the room would count as drained while bytes may still land in its blocks.
        self._in_doubt: dict[tuple[str, str], int] = {}

    # -- records --------------------------------------------------------------------------------------------------

    def done(self, room: str, session_id: str, answer: Message, now: float) -> None:
        """All rows are confirmed. Keep ``answer``, since the connection may lose it."""
        self._done[room, session_id] = (now + DONE_SECONDS, answer)
        while len(self._done) > DONE_LIMIT:
            self._done.popitem(last=False)

    def failed(self, room: str) -> None:
        self._failures[room] = None
        while len(self._failures) > DONE_LIMIT:
            self._failures.popitem(last=False)

    def doubt(self, room: str, session_id: str, epoch: int) -> None:
        """Bytes may still land through ``epoch``."""
        self._in_doubt[room, session_id] = epoch

    def is_in_doubt(self, room: str, session_id: str) -> bool:
        return (room, session_id) in self._in_doubt

    def epoch_retired(self, session_id: str, epoch: int) -> None:
        """No write through an epoch up to ``epoch`` lands any more."""
        for key in [key for key, one in self._in_doubt.items() if key[1] == session_id and one <= epoch]:
            del self._in_doubt[key]

    def sweep(self, now: float) -> None:
        """Forget expired completions."""
        while self._done and next(iter(self._done.values()))[0] <= now:
            self._done.popitem(last=False)

    # -- messages about finished rooms ----------------------------------------------------------------------------

    def to_offer_of_ended(self, room: str, session: RegisteredSession, entry: SenderRoom | None) -> Send:
        """The answer to an offer for a room that is finished or unknown."""
        done = self._done.get((room, session.mooncake_session_id))
        return Send(session.peer, self._outcome(room, session, entry) if done is None else done[1])

    def failures_for(self, session: RegisteredSession, rooms: Mapping[str, SenderRoom]) -> list[Action]:
        """The last failures of the server, as far as their outcome is known, for a session that registers."""
        return [
            Send(session.peer, self._outcome(room, session, rooms.get(room)))
            for room in self._failures
            if server_of(room) == session.server and room in self._tombstones
        ]

    def _outcome(self, room: str, session: RegisteredSession, entry: SenderRoom | None) -> Failed:
        if entry is not None and entry.outcome is not None:
            info = entry.transfer_infos.get(session.mooncake_session_id)
            return failed_message(room, entry.outcome, drained=info is None or info.drained)
        outcome = self._tombstones.get(room) or Outcome("the encoder does not know this room", FailureCode.UNKNOWN_ROOM)
        return failed_message(room, outcome, drained=not self.is_in_doubt(room, session.mooncake_session_id))
