"""Owns the encoder side's rooms: their messages, transitions, windows and deadlines. Pure; returns actions.

A room goes to one or more language ranks, each with a session. Progress is kept per (room, session), so a resume of
one session never touches another's blocks. The rules of writing:

- A window is written at most once, between ``begin_write`` and ``on_written``.
- A failed or aborted room begins no further write. A write that is under way continues until its data call returns;
  only then is Drained sent. After a data call in doubt, Drained is never sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from sglang_mm_conn.core.actions import Action, Ended, Release, Send
from sglang_mm_conn.core.encoder.replies import Replies, announcement, failed_message, status_reply
from sglang_mm_conn.core.encoder.sender_room import RegisteredSession, SenderRoom, TransferEmbeddingInfo, WindowWrite
from sglang_mm_conn.core.encoder.write_slots import WriteSlots
from sglang_mm_conn.core.errors import ConnError, ProtocolError
from sglang_mm_conn.core.messages import Abort, Drained, Init, Progress, Resume
from sglang_mm_conn.core.outcomes import SUCCEEDED, FailureCode, Outcome, WriteResult, WriteStatus, failure
from sglang_mm_conn.core.rooms import server_of
from sglang_mm_conn.core.sharding import port_sum_queue_index
from sglang_mm_conn.core.states import SenderState, WindowState
from sglang_mm_conn.core.tombstones import Tombstones

# Longer than any request or encode that may still name the room.
TOMBSTONE_SECONDS = 3600.0


class SenderCore:
    """All rooms of one encoder process. Not thread-safe: the caller holds one lock around every call."""

    def __init__(self, *, queues: int, send_timeout: float, claim_timeout: float) -> None:
        self.rooms: dict[str, SenderRoom] = {}
        self.sessions: dict[str, RegisteredSession] = {}
        self.tombstones = Tombstones()
        self.replies = Replies(self.tombstones)
        self.write_slots = WriteSlots()
        self._next_check = math.inf  # no unfinished room is due earlier
        self._queues = queues
        self._send_timeout = send_timeout
        self._claim_timeout = claim_timeout

    # -- sessions ------------------------------------------------------------------------------------------------

    def register(self, session: RegisteredSession, now: float) -> list[Action]:
        """A session's memory is checked and attached. Announces the rooms of its server to it."""
        actions: list[Action] = []
        old = self.sessions.get(session.mooncake_session_id)
        if old is not None and old.incarnation != session.incarnation:
            actions += self.session_lost(session.mooncake_session_id, "the language server was restarted", now)
        self.sessions[session.mooncake_session_id] = session
        for entry in self.rooms.values():
            if entry.server != session.server or entry.machine.final:
                continue
            entry.unheard_since = None
            # Even if it has sent Init: the connection may have lost an Abort, and the Announce makes it repeat that.
            actions.append(announcement(entry, session))
        # Rooms may have failed before this rank registered, and a lost connection may have lost a Failed.
        return actions + self.replies.failures_for(session, self.rooms)

    def retire(self, mooncake_session_id: str, epoch: int) -> None:
        """The language rank revoked the epochs up to ``epoch``. Later offers for them are refused."""
        self.replies.epoch_retired(mooncake_session_id, epoch)
        session = self.sessions.get(mooncake_session_id)
        if session is not None:
            kept = tuple(one for one in session.epochs if one > epoch)
            self.sessions[mooncake_session_id] = replace(session, epochs=kept or (max(session.epochs),))

    def session_lost(self, mooncake_session_id: str, reason: str, now: float) -> list[Action]:
        """The language rank has ended or is silent, so the rooms for which it offered blocks fail."""
        if self.sessions.pop(mooncake_session_id, None) is None:
            return []
        actions: list[Action] = []
        for entry in list(self.rooms.values()):
            if mooncake_session_id in entry.transfer_infos:
                actions += self._fail(entry, reason, FailureCode.PEER_FAILED, now)
            elif not self._sessions_of(entry.server):
                entry.unheard_since = entry.unheard_since or now
                self._next_check = min(self._next_check, self._due(entry))
        return actions

    # -- calls of the encode -------------------------------------------------------------------------------------

    def announce(self, room: str, total_tokens: int, row_bytes: int, dtype: str, now: float) -> list[Action]:
        """The size of ``room`` is known. Raises ConnError if it was announced before with another size."""
        if total_tokens < 1 or row_bytes < 1:
            raise ConnError(f"room {room}: invalid size of {total_tokens} rows of {row_bytes} bytes")
        known = self.rooms.get(room)
        if known is not None:
            if (known.total_tokens, known.row_bytes, known.dtype) != (total_tokens, row_bytes, dtype):
                raise ConnError(f"room {room} was announced before with another size")
            return []
        outcome = self.tombstones.get(room)
        if outcome is not None:
            failed = failed_message(room, outcome, drained=True)
            return [Ended(room, Outcome(failed.reason, failed.code))]
        entry = SenderRoom(room, server_of(room), total_tokens, row_bytes, dtype, now + self._send_timeout, now)
        self.rooms[room] = entry
        sessions = self._sessions_of(entry.server)
        entry.unheard_since = None if sessions else now
        self._next_check = min(self._next_check, self._due(entry))
        return [announcement(entry, session) for session in sessions]

    def add_source(
        self, room: str, src_embedding_indices: Sequence[int], metadata: bytes, checksum: int | None, now: float
    ) -> list[Action]:
        """The embedding of ``room`` is ready. The room is queued as soon as it is complete."""
        entry = self.rooms.get(room)
        if entry is None or entry.machine.final:
            return []
        if entry.source is not None:
            raise ConnError(f"room {room} already has a source")
        entry.source, entry.metadata, entry.checksum = tuple(src_embedding_indices), metadata, checksum
        entry.source_at = now
        return self._advance(entry)

    def fail(self, room: str, reason: str, code: int, now: float) -> list[Action]:
        """The encode failed, before or after the room was announced."""
        entry = self.rooms.get(room)
        if entry is not None:
            return self._fail(entry, reason, code, now)
        if room in self.tombstones:
            return []
        server_of(room)  # raises before a tombstone is kept
        outcome = failure(reason, code)
        self.tombstones.put(room, outcome, now + TOMBSTONE_SECONDS)
        self.replies.failed(room)
        actions: list[Action] = [
            Send(session.peer, failed_message(room, outcome, drained=True))
            for session in self._sessions_of(server_of(room))
        ]
        return [*actions, Ended(room, outcome, f"server {server_of(room)}")]

    # -- messages ------------------------------------------------------------------------------------------------

    def on_message(self, peer: str, message: Init | Resume | Abort, now: float) -> list[Action]:
        """Handle a message about a room. Raises ProtocolError unless ``peer`` registered the session that it names."""
        session = self.sessions.get(message.mooncake_session_id)
        if session is None or session.peer != peer:
            raise ProtocolError(f"session {message.mooncake_session_id} is not registered by this peer")
        if isinstance(message, Abort):
            return self._on_abort(session, message, now)
        entry = self.rooms.get(message.room)
        if entry is None or entry.machine.final:
            return [self.replies.to_offer_of_ended(message.room, session, entry)]
        if session.server == entry.server:
            entry.deadline = min(entry.deadline, now + message.deadline)
            self._next_check = min(self._next_check, entry.deadline)
        if isinstance(message, Init):
            return self._on_init(entry, session, message, now)
        return self._on_resume(entry, session, message)

    def _on_init(self, entry: SenderRoom, session: RegisteredSession, message: Init, now: float) -> list[Action]:
        info = entry.transfer_infos.get(session.mooncake_session_id)
        if info is not None:
            repeated = info.window > 0 or info.same_offer(message)
            return [status_reply(entry, info, session, "" if repeated else "another Init came first")]
        refusal = entry.init_problem(session, message)
        if refusal:
            return [Send(session.peer, Progress(room=entry.room, window=-1, sent_tokens=0, refused=refusal))]
        entry.required_dst_info_num = message.required_dst_info_num
        entry.transfer_infos[session.mooncake_session_id] = TransferEmbeddingInfo(
            room=entry.room,
            mooncake_session_id=session.mooncake_session_id,
            required_dst_info_num=message.required_dst_info_num,
            dst_embedding_indices=list(message.dst_embedding_indices),
            allocated_tokens=message.allocated_tokens,
            epoch=message.epoch,
        )
        return self._advance(entry)

    def _on_resume(self, entry: SenderRoom, session: RegisteredSession, message: Resume) -> list[Action]:
        info = entry.transfer_infos.get(session.mooncake_session_id)
        if info is None:
            refused = Progress(
                room=entry.room, window=-1, sent_tokens=0, refused="Resume before Init", refused_window=message.window
            )
            return [Send(session.peer, refused)]
        if message.window == info.window and info.same_offer(message):
            return [status_reply(entry, info, session, "")]  # repeated: nothing changes
        if info.state is not WindowState.PARTIAL:
            refusal = f"window {info.window} is {info.state.value}"
        elif message.window != info.window + 1:
            refusal = f"window {message.window}, but window {info.window + 1} is next"
        elif message.sent_tokens != info.sent_tokens:
            refusal = f"sent_tokens={message.sent_tokens}, but {info.sent_tokens} rows are confirmed"
        else:
            refusal = entry.offer_problem(session, message, entry.total_tokens - info.sent_tokens)
        if refusal:
            return [status_reply(entry, info, session, refusal, message.window)]
        info.machine.transition_to(WindowState.OFFERED)
        info.window = message.window
        info.epoch = message.epoch
        info.dst_embedding_indices = list(message.dst_embedding_indices)
        info.allocated_tokens = message.allocated_tokens
        # Without new work for the same queue the transfer would hang for ever.
        return [entry.chunk()]

    def _on_abort(self, session: RegisteredSession, message: Abort, now: float) -> list[Action]:
        if session.server != server_of(message.room):  # unknown rooms too: this would fail them when announced
            raise ProtocolError(f"session of server {session.server} aborts room {message.room} of another server")
        entry = self.rooms.get(message.room)
        if entry is None:
            if self.replies.is_in_doubt(message.room, session.mooncake_session_id):
                return []
            if message.room not in self.tombstones:
                # The encode may not have announced the room yet. It fails when it does.
                self.tombstones.put(message.room, Outcome(message.reason, FailureCode.ABORTED), now + TOMBSTONE_SECONDS)
            return [Send(session.peer, Drained(room=message.room))]
        info = entry.transfer_infos.get(session.mooncake_session_id)
        actions: list[Action] = []
        # If a write is under way, on_written sends Drained when the data call has returned.
        if info is None or info.drained:
            if info is not None and not info.machine.final:
                info.machine.transition_to(WindowState.CLOSED)
            actions.append(Send(session.peer, Drained(room=entry.room)))
        return actions + self._fail(
            entry, f"aborted by the language server: {message.reason}", FailureCode.ABORTED, now, except_session=session
        )

    # -- writing -------------------------------------------------------------------------------------------------

    def begin_write(self, room: str) -> WindowWrite | None:
        """The write that the caller makes next; None if another thread serves the room or no window can be written.

        The caller reports the write with ``on_written`` and calls ``begin_write`` again until it returns None. So the
        windows of a room are written in order, and a window that is offered in the meantime is written, too.
        """
        entry = self.rooms.get(room)
        if entry is None or entry.busy or entry.state is not SenderState.TRANSFERRING:
            return None
        for session_id, info in entry.offers:
            session = self.sessions.get(session_id)
            if session is None or not self.write_slots.take(session, room):
                continue
            if info.src_embedding_indices is None:
                info.src_embedding_indices = entry.source
                info.total_tokens = entry.total_tokens
            info.machine.transition_to(WindowState.WRITING)
            entry.busy = True
            blocks = tuple(info.dst_embedding_indices)
            return WindowWrite(room, session, info.window, info.epoch, blocks, info.sent_tokens, info.allocated_tokens)
        return None

    def on_written(self, write: WindowWrite, result: WriteResult, now: float) -> list[Action]:
        """The data call of ``write`` has returned with ``result``."""
        entry = self.rooms[write.room]
        entry.busy = False
        session = self._current(write.session)
        info = entry.transfer_infos[session.mooncake_session_id]
        actions: list[Action]
        if result.status is not WriteStatus.LANDED:
            in_doubt = result.status is WriteStatus.IN_DOUBT
            info.machine.transition_to(WindowState.IN_DOUBT if in_doubt else WindowState.CLOSED)
            if in_doubt:
                self.replies.doubt(entry.room, session.mooncake_session_id, write.epoch)
            reason = f"{result.reason} (to {session.mooncake_session_id})"
            others = self._fail(entry, reason, FailureCode.PEER_FAILED, now, except_session=session)
            assert entry.outcome is not None
            actions = [Send(session.peer, failed_message(entry.room, entry.outcome, drained=not in_doubt)), *others]
        elif entry.machine.final:
            info.machine.transition_to(WindowState.CLOSED)
            actions = [Send(session.peer, Drained(room=entry.room))]
        else:
            info.sent_tokens += info.allocated_tokens
            entry.elapsed = max(0.0, now - entry.source_at)
            done = info.sent_tokens == entry.total_tokens
            info.machine.transition_to(WindowState.DONE if done else WindowState.PARTIAL)
            answer = status_reply(entry, info, session, "")
            actions = [answer]
            if done:
                self.replies.done(entry.room, session.mooncake_session_id, answer.message, now)
            if entry.complete and all(other.state is WindowState.DONE for other in entry.transfer_infos.values()):
                entry.machine.transition_to(SenderState.SUCCESS)
                entry.outcome = SUCCEEDED
                actions.append(Ended(entry.room, SUCCEEDED))
        actions += self._drop_if_over(entry, now)
        session_id = session.mooncake_session_id
        self.write_slots.give_back(session_id)
        return actions + self._next_deferred(session_id)

    def _next_deferred(self, session_id: str) -> list[Action]:
        """The session can take another write. Queue the chunk of the room that has waited longest for it."""
        entry = self.write_slots.next_room(session_id, self.rooms)
        return [] if entry is None else [entry.chunk()]

    # -- time ----------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Action]:
        """Enforce deadlines, wake rooms that wait for an idle session, forget old tombstones and completions."""
        actions: list[Action] = []
        if now >= self._next_check:
            for entry in list(self.rooms.values()):
                if not entry.machine.final and now >= entry.deadline:
                    actions += self._fail(entry, entry.unfinished(now), FailureCode.PEER_TIMED_OUT, now)
                elif now >= self._due(entry):
                    reason = f"language server {entry.server} has not been connected for {self._claim_timeout:g} s"
                    actions += self._fail(entry, reason, FailureCode.PEER_TIMED_OUT, now)
            open_rooms = (entry for entry in self.rooms.values() if not entry.machine.final)
            self._next_check = min(map(self._due, open_rooms), default=math.inf)
        for session_id in self.write_slots.idle(self.sessions):
            actions += self._next_deferred(session_id)
        self.tombstones.sweep(now)
        self.replies.sweep(now)
        return actions

    def _due(self, entry: SenderRoom) -> float:
        """Time at which ``entry`` fails unless it finishes or its language server connects."""
        if entry.unheard_since is None:
            return entry.deadline
        return min(entry.deadline, entry.unheard_since + self._claim_timeout)

    # -- helpers -------------------------------------------------------------------------------------------------

    def _sessions_of(self, server: str) -> list[RegisteredSession]:
        return [session for session in self.sessions.values() if session.server == server]

    def _current(self, session: RegisteredSession) -> RegisteredSession:
        """The newest registration of ``session``: its connection may have changed while a write was under way."""
        current = self.sessions.get(session.mooncake_session_id)
        return session if current is None or current.incarnation != session.incarnation else current

    def _advance(self, entry: SenderRoom) -> list[Action]:
        if not entry.complete:
            return []
        if entry.source is None:
            entry.machine.transition_to(SenderState.READY)
            return []
        entry.machine.transition_to(SenderState.TRANSFERRING)
        entry.queue_idx = port_sum_queue_index(entry.transfer_infos, self._queues)
        return [entry.chunk()]

    def _fail(
        self, entry: SenderRoom, reason: str, code: int, now: float, *, except_session: RegisteredSession | None = None
    ) -> list[Action]:
        if entry.machine.final:
            return []
        entry.machine.transition_to(SenderState.FAILED)
        entry.outcome = failure(reason, code)
        self.replies.failed(entry.room)
        actions: list[Action] = []
        for session in self._sessions_of(entry.server):
            if except_session is not None and session.mooncake_session_id == except_session.mooncake_session_id:
                continue
            info = entry.transfer_infos.get(session.mooncake_session_id)
            drained = info is None or info.drained
            # If a write is under way, on_written sends Drained when the data call has returned.
            actions.append(Send(session.peer, failed_message(entry.room, entry.outcome, drained=drained)))
        for info in entry.transfer_infos.values():
            if info.state in (WindowState.OFFERED, WindowState.PARTIAL):
                info.machine.transition_to(WindowState.CLOSED)
        peer = ",".join(entry.transfer_infos) or f"server {entry.server}"
        actions.append(Ended(entry.room, entry.outcome, peer))
        return actions + self._drop_if_over(entry, now)

    def _drop_if_over(self, entry: SenderRoom, now: float) -> list[Action]:
        """If the room is finished and none of its writes is under way, leave only its tombstone and free its source."""
        infos = entry.transfer_infos.values()
        if not entry.machine.final or any(info.state is WindowState.WRITING for info in infos):
            return []
        assert entry.outcome is not None
        self.tombstones.put(entry.room, entry.outcome, now + TOMBSTONE_SECONDS)
        return [] if self.rooms.pop(entry.room, None) is None else [Release(entry.room)]
