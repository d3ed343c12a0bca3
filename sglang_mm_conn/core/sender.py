"""Owns the encoder side's rooms: their messages, transitions, windows and deadlines. Pure; returns actions.

One room serves one or more language ranks, each through its session. Progress is kept per (room, session): a resume
of one session never touches another's blocks. What may be written, and when:

- a window is written at most once, between ``begin_write`` and ``on_written``;
- a failed or aborted room begins no further write; one that is under way goes on until its data call returns, and
  only then is Drained said. After a data call that leaves the matter in doubt, Drained is never said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from sglang_mm_conn.core.actions import Action, Ended, Release, Send
from sglang_mm_conn.core.errors import ConnError, ProtocolError
from sglang_mm_conn.core.messages import Abort, Drained, Init, Progress, Resume
from sglang_mm_conn.core.outcomes import SUCCEEDED, FailureCode, Outcome, WriteResult, WriteStatus
from sglang_mm_conn.core.replies import Replies, announcement, failed_message, status_reply
from sglang_mm_conn.core.rooms import server_of
from sglang_mm_conn.core.sender_room import RegisteredSession, SenderRoom, TransferEmbeddingInfo, WindowWrite
from sglang_mm_conn.core.sharding import port_sum_queue_index
from sglang_mm_conn.core.states import SenderState, WindowState
from sglang_mm_conn.core.tombstones import Tombstones
from sglang_mm_conn.core.write_slots import WriteSlots

# A tombstone must outlive the requests and encodes that may still name its room.
TOMBSTONE_SECONDS = 3600.0


class SenderCore:
    """All rooms of one encoder process. Not thread-safe: its surroundings hold one lock around every call."""

    def __init__(self, *, queues: int, send_timeout: float, claim_timeout: float) -> None:
        self.rooms: dict[str, SenderRoom] = {}
        self.sessions: dict[str, RegisteredSession] = {}
        self.tombstones = Tombstones()
        self.replies = Replies(self.tombstones)
        self.write_slots = WriteSlots()
        self._next_check = math.inf  # no room that has not ended is due before
        self._queues = queues
        self._send_timeout = send_timeout
        self._claim_timeout = claim_timeout

    # -- sessions ------------------------------------------------------------------------------------------------

    def register(self, session: RegisteredSession, now: float) -> list[Action]:
        """A session's memory was checked and attached. Announces to it the rooms of its server."""
        actions: list[Action] = []
        old = self.sessions.get(session.mooncake_session_id)
        if old is not None and old.incarnation != session.incarnation:
            actions += self.session_lost(session.mooncake_session_id, "the language server was restarted", now)
        self.sessions[session.mooncake_session_id] = session
        for entry in self.rooms.values():
            if entry.server != session.server or entry.machine.final:
                continue
            entry.unheard_since = None
            # Also where it has said Init: an Abort may have been lost with the connection, this is what it answers.
            actions.append(announcement(entry, session))
        # They may have failed before this rank was here, or on a connection that was lost.
        return actions + self.replies.failures_for(session, self.rooms)

    def retire(self, mooncake_session_id: str, epoch: int) -> None:
        """The language rank revoked the epochs up to ``epoch``: no window is taken for them any more."""
        self.replies.epoch_retired(mooncake_session_id, epoch)
        session = self.sessions.get(mooncake_session_id)
        if session is not None:
            kept = tuple(one for one in session.epochs if one > epoch)
            self.sessions[mooncake_session_id] = replace(session, epochs=kept or (max(session.epochs),))

    def session_lost(self, mooncake_session_id: str, reason: str, now: float) -> list[Action]:
        """The language rank is gone or silent: its rooms fail."""
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

    # -- what the encode asks for --------------------------------------------------------------------------------

    def announce(self, room: str, total_tokens: int, row_bytes: int, dtype: str, now: float) -> list[Action]:
        """The size of ``room`` is known. Raises ConnError where it was announced before with another size."""
        if total_tokens < 1 or row_bytes < 1:
            raise ConnError(f"room {room}: an embedding of {total_tokens} rows of {row_bytes} bytes cannot be sent")
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
        """The embedding of ``room`` is there. Queues it as soon as the room is complete."""
        entry = self.rooms.get(room)
        if entry is None or entry.machine.final:
            return []
        if entry.source is not None:
            raise ConnError(f"room {room} has a source already")
        entry.source, entry.metadata, entry.checksum = tuple(src_embedding_indices), metadata, checksum
        entry.source_at = now
        return self._advance(entry)

    def fail(self, room: str, reason: str, code: int, now: float) -> list[Action]:
        """The encode failed, before or after its size was announced."""
        entry = self.rooms.get(room)
        if entry is not None:
            return self._fail(entry, reason, code, now)
        if room in self.tombstones:
            return []
        server_of(room)  # raises before anything is remembered
        outcome = Outcome(reason, code)
        self.tombstones.put(room, outcome, now + TOMBSTONE_SECONDS)
        self.replies.failed(room)
        actions: list[Action] = [
            Send(session.peer, failed_message(room, outcome, drained=True))
            for session in self._sessions_of(server_of(room))
        ]
        return [*actions, Ended(room, Outcome(reason, code), f"server {server_of(room)}")]

    # -- messages ------------------------------------------------------------------------------------------------

    def on_message(self, peer: str, message: Init | Resume | Abort, now: float) -> list[Action]:
        """A message about a room. Raises ProtocolError where ``peer`` does not speak for the session it names."""
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
                room=entry.room, window=-1, sent_tokens=0, refused="no Init before", refused_window=message.window
            )
            return [Send(session.peer, refused)]
        if message.window == info.window and info.same_offer(message):
            return [status_reply(entry, info, session, "")]  # repeated: it changes nothing
        if info.state is not WindowState.PARTIAL:
            refusal = f"window {info.window} is {info.state.value}"
        elif message.window != info.window + 1:
            refusal = f"window {message.window} named, {info.window + 1} is next"
        elif message.sent_tokens != info.sent_tokens:
            refusal = f"sent_tokens={message.sent_tokens} named, {info.sent_tokens} are confirmed"
        else:
            refusal = entry.offer_problem(session, message, entry.total_tokens - info.sent_tokens)
        if refusal:
            return [status_reply(entry, info, session, refusal, message.window)]
        info.machine.transition_to(WindowState.OFFERED)
        info.window = message.window
        info.epoch = message.epoch
        info.dst_embedding_indices = list(message.dst_embedding_indices)
        info.allocated_tokens = message.allocated_tokens
        # The seed's bug: without new work for the same queue the transfer would hang for ever.
        return [entry.chunk()]

    def _on_abort(self, session: RegisteredSession, message: Abort, now: float) -> list[Action]:
        if session.server != server_of(message.room):  # also before it is announced: an abort would end it at once
            raise ProtocolError(f"session of server {session.server} aborts room {message.room}")
        entry = self.rooms.get(message.room)
        if entry is None:
            if self.replies.is_in_doubt(message.room, session.mooncake_session_id):
                return []
            if message.room not in self.tombstones:
                # The encode may still be on its way here: it ends as soon as it announces.
                self.tombstones.put(message.room, Outcome(message.reason, FailureCode.ABORTED), now + TOMBSTONE_SECONDS)
            return [Send(session.peer, Drained(room=message.room))]
        info = entry.transfer_infos.get(session.mooncake_session_id)
        actions: list[Action] = []
        # Where a write is under way, Drained follows when the data call has returned.
        if info is None or info.drained:
            if info is not None and not info.machine.final:
                info.machine.transition_to(WindowState.CLOSED)
            actions.append(Send(session.peer, Drained(room=entry.room)))
        return actions + self._fail(
            entry, f"aborted by the language server: {message.reason}", FailureCode.ABORTED, now, except_session=session
        )

    # -- writing -------------------------------------------------------------------------------------------------

    def begin_write(self, room: str) -> WindowWrite | None:
        """What the caller shall write now; None where another thread serves the room or nothing is offered.

        The caller reports the write with ``on_written`` and calls ``begin_write`` again, until it answers None: so
        the windows of one room are written in order, and one offered in the meantime is not forgotten.
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
        """The data call of ``write`` returned with ``result``."""
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
            others = self._fail(
                entry,
                f"{result.reason} (to {session.mooncake_session_id})",
                FailureCode.PEER_FAILED,
                now,
                except_session=session,
            )
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
        """The session is free for another write: the longest waiting room's chunk is queued again."""
        entry = self.write_slots.next_room(session_id, self.rooms)
        return [] if entry is None else [entry.chunk()]

    # -- time ----------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Action]:
        """Enforce deadlines, forget old tombstones."""
        actions: list[Action] = []
        if now >= self._next_check:
            for entry in list(self.rooms.values()):
                if not entry.machine.final and now >= entry.deadline:
                    actions += self._fail(entry, entry.unfinished(now), FailureCode.PEER_TIMED_OUT, now)
                elif now >= self._due(entry):
                    reason = f"language server {entry.server} has not been here for {self._claim_timeout:g} s"
                    actions += self._fail(entry, reason, FailureCode.PEER_TIMED_OUT, now)
            open_rooms = (entry for entry in self.rooms.values() if not entry.machine.final)
            self._next_check = min(map(self._due, open_rooms), default=math.inf)
        for session_id in self.write_slots.idle(self.sessions):
            actions += self._next_deferred(session_id)
        self.tombstones.sweep(now)
        self.replies.sweep(now)
        return actions

    def _due(self, entry: SenderRoom) -> float:
        """When ``entry`` has to end, as things are."""
        if entry.unheard_since is None:
            return entry.deadline
        return min(entry.deadline, entry.unheard_since + self._claim_timeout)

    # -- helpers -------------------------------------------------------------------------------------------------

    def _sessions_of(self, server: str) -> list[RegisteredSession]:
        return [session for session in self.sessions.values() if session.server == server]

    def _current(self, session: RegisteredSession) -> RegisteredSession:
        """``session`` as it speaks now: its connection may have been replaced while a write was under way."""
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
        entry.outcome = Outcome(reason, code)
        self.replies.failed(entry.room)
        actions: list[Action] = []
        for session in self._sessions_of(entry.server):
            if except_session is not None and session.mooncake_session_id == except_session.mooncake_session_id:
                continue
            info = entry.transfer_infos.get(session.mooncake_session_id)
            drained = info is None or info.drained
            # One whose write is under way hears Drained when its data call returns.
            actions.append(Send(session.peer, failed_message(entry.room, entry.outcome, drained=drained)))
        for info in entry.transfer_infos.values():
            if info.state in (WindowState.OFFERED, WindowState.PARTIAL):
                info.machine.transition_to(WindowState.CLOSED)
        peer = ",".join(entry.transfer_infos) or f"server {entry.server}"
        actions.append(Ended(entry.room, entry.outcome, peer))
        return actions + self._drop_if_over(entry, now)

    def _drop_if_over(self, entry: SenderRoom, now: float) -> list[Action]:
        """Replace an ended room by its tombstone, and release its source, once no write of it is under way."""
        infos = entry.transfer_infos.values()
        if not entry.machine.final or any(info.state is WindowState.WRITING for info in infos):
            return []
        assert entry.outcome is not None
        self.tombstones.put(entry.room, entry.outcome, now + TOMBSTONE_SECONDS)
        return [] if self.rooms.pop(entry.room, None) is None else [Release(entry.room)]
