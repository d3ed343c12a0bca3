"""The language side's rooms: claims, offers, resumes, quarantine. Pure; returns what is to be done as actions.

Who owns a block, at each moment:

- *free*: nobody, the allocator may hand it out;
- from the offer (Init, Resume) on: **the encoder**, which may write it at any moment;
- from the encoder's Progress or Done for exactly that window on: **this side**, which copies the rows out and frees it
  (those messages are sent after the data call returned 0, and one window is written once);
- an embedding that came in one window, in contiguous blocks, may stay there as a **view**: its blocks are the
  result's, and after it the request's, until nothing refers to them any more (``view_released``). Views hold
  ``view_blocks`` blocks together at most, and none are made while a room waits, so the others always go round;
- a room that fails while it is offered: **quarantine**, until one of the proofs that no write is to come: Progress or
  Done of that window, Drained, Failed with ``drained``, or the proof of the data path (datapath.base): that the
  writing process is gone, over a path with an exclusive lock, or that the epoch it was offered for was revoked.

A room that waits for blocks holds none: the rows it has were copied out first. So waiting can never be circular.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import Any

from sglang_mm_conn.core.actions import Action, CopyOut, Ended, Send
from sglang_mm_conn.core.blocks import BlockAllocator
from sglang_mm_conn.core.errors import ConnError, ProtocolError
from sglang_mm_conn.core.layout import Geometry
from sglang_mm_conn.core.messages import Abort, Announce, Done, Drained, Failed, Init, Progress, Resume, as_text
from sglang_mm_conn.core.states import RECEIVER_TRANSITIONS, Poll, ReceiverState, StateMachine
from sglang_mm_conn.core.tombstones import Outcome, Tombstones

# The encoder is told a deadline that lies this much before ours, so that the journey of the message and the answer
# cannot make the encoder's the later one.
DEADLINE_MARGIN_SECONDS = 1.0
DEADLINE_MARGIN_SHARE = 0.1
# An encode may outlive its room by its own timeout; a tombstone must outlive the encode.
TOMBSTONE_SECONDS = 3600.0
# Of one encoder process: one that announces nonsense leaves room for the others.
UNCLAIMED_LIMIT = 8192
# Keeps one offer far below the smallest limit of a control frame; what remains follows by resume.
MAX_OFFER_BLOCKS = 65536
# How often an Abort that was not answered is said again.
ABORT_AGAIN_SECONDS = 5.0
SUCCESS_CODE = 200

RoomMessage = Announce | Progress | Done | Failed | Drained


@dataclass(frozen=True)
class Peer:
    """One encoder process as this side knows it: its incarnation, our session to it, and the epoch it was given."""

    incarnation: str
    mooncake_session_id: str
    data_path: str  # its name, for logs
    exclusive_lock: bool  # whether the end of the process is proved by the lock on its writer slot
    epoch: int = 0


@dataclass(slots=True)
class ReceiverRoom:
    """One room. ``sent_tokens`` rows are confirmed *and* copied out."""

    room: str
    encoder: str
    deadline: float
    started: float
    required_dst_info_num: int
    machine: StateMachine[ReceiverState] = field(
        default_factory=lambda: StateMachine(RECEIVER_TRANSITIONS, ReceiverState.EXPECTED)
    )
    peer: Peer | None = None
    total_tokens: int = 0
    row_bytes: int = 0
    dtype: str = ""
    window: int = -1
    epoch: int = 0  # that the current window was offered for
    blocks: list[int] = field(default_factory=list)
    allocated_tokens: int = 0
    sent_tokens: int = 0
    metadata: bytes = b""
    elapsed: float = 0.0  # transfer time in seconds: from the embedding being there until its last row was copied
    last: bool = False
    view: bool = False  # the blocks may stay the result's
    outcome: Outcome | None = None
    ended: float = 0.0
    forgotten: bool = False

    @property
    def state(self) -> ReceiverState:
        return self.machine.state

    @property
    def resumes(self) -> int:
        return max(0, self.window)

    def poll(self) -> Poll:
        """Monotonic: Failed and Success are final, a resume does not lead back from Transferring."""
        if self.state is ReceiverState.FAILED:
            return Poll.Failed
        if self.state is ReceiverState.SUCCESS:
            return Poll.Success
        if self.state is ReceiverState.EXPECTED:
            return Poll.Bootstrapping
        if self.state is ReceiverState.QUEUED and self.window < 0:
            return Poll.WaitingForInput
        return Poll.Transferring


@dataclass(frozen=True)
class Quarantine:
    """Blocks of a failed room that its encoder may still write."""

    owner: tuple[str, int]
    peer: Peer
    blocks: tuple[int, ...]
    confirmed_tokens: int  # rows in all, once this window has landed
    since: float
    ask_again_at: float


@dataclass(frozen=True)
class Unclaimed:
    """An announcement (or failure) of a room that no request has claimed yet."""

    peer: Peer
    message: Announce | Failed
    until: float


class ReceiverCore:
    """All rooms of one language rank. Not thread-safe: its surroundings hold one lock around every call."""

    def __init__(
        self,
        allocator: BlockAllocator,
        geometry: Geometry,
        *,
        first_offer: int | None,
        claim_timeout: float,
        max_embedding_bytes: int,
        view_blocks: int = 0,
        view_least_bytes: int = 1,
    ) -> None:
        """``view_blocks``: most blocks that views hold; ``view_least_bytes``: smaller embeddings are copied out."""
        self.allocator = allocator
        self.geometry = geometry
        self.rooms: dict[str, ReceiverRoom] = {}
        self.quarantine: dict[str, Quarantine] = {}
        self.views: dict[str, tuple[tuple[str, int], tuple[int, ...]]] = {}  # room -> owner, blocks
        self.tombstones = Tombstones()
        self.unclaimed: dict[str, Unclaimed] = {}
        self._unclaimed_of: Counter[str] = Counter()  # encoder process -> its entries in ``unclaimed``
        self._peers: dict[str, Peer] = {}
        self._waiting: deque[ReceiverRoom] = deque()  # FIFO; rooms that ended meanwhile are skipped
        self._first_offer = first_offer
        self._claim_timeout = claim_timeout
        self._max_embedding_bytes = max_embedding_bytes
        self._view_blocks = view_blocks
        self._view_least_bytes = view_least_bytes
        self._next_deadline = math.inf  # no room that has not ended has an earlier one
        self._viewed = 0  # blocks of views, and of copies that may make one

    # -- what the request asks for -------------------------------------------------------------------------------

    def expect(
        self, room: str, encoder: str, deadline: float, now: float, required_dst_info_num: int = 1
    ) -> list[Action]:
        """A request waits for ``room`` from ``encoder``. Raises ConnError where the room was expected before."""
        outcome = self.tombstones.get(room)
        if room in self.rooms or (outcome is not None and outcome.code == SUCCESS_CODE):
            raise ConnError(f"room {room} was expected before")
        entry = ReceiverRoom(room, encoder, deadline, now, required_dst_info_num)
        self.rooms[room] = entry
        self._next_deadline = min(self._next_deadline, deadline)
        if outcome is not None:  # it failed, or was given up, before the request came
            return self._fail(entry, outcome.reason, outcome.code, now)
        unclaimed = self._drop_unclaimed(room)
        return [] if unclaimed is None else self.on_message(unclaimed.peer.incarnation, unclaimed.message, now)

    def abort(self, room: str, reason: str, code: int, now: float) -> list[Action]:
        """The request gives ``room`` up. Changes nothing where the room has ended or is unknown."""
        entry = self.rooms.get(room)
        return [] if entry is None else self._fail(entry, reason, code, now)

    def forget(self, room: str) -> None:
        """Drop the record of an ended room (its tombstone stays) as soon as nothing reads its blocks."""
        entry = self.rooms.get(room)
        if entry is not None and entry.machine.final:
            entry.forgotten = True
            if not entry.blocks:
                del self.rooms[room]

    # -- peers ---------------------------------------------------------------------------------------------------

    def peer_ready(self, peer: Peer, now: float) -> list[Action]:
        """``peer`` answered Registered: for the first time, or after a lost connection, when both resynchronize."""
        self._peers[peer.incarnation] = peer
        actions: list[Action] = []
        for entry in list(self.rooms.values()):
            if entry.peer is None or entry.peer.incarnation != peer.incarnation:
                continue
            if entry.peer.mooncake_session_id != peer.mooncake_session_id:
                actions += self._fail(entry, "the session to the encoder changed in mid-transfer", 502, now)
            else:
                entry.peer = peer
                actions += self._offer_again(entry, now)
        for room, held in self.quarantine.items():
            if held.peer.incarnation == peer.incarnation:
                actions.append(self._abort_message(held.peer, room, "asked again after a lost connection"))
        return actions

    def peer_lost(self, incarnation: str, reason: str, now: float) -> list[Action]:
        """The encoder process is gone or silent: its rooms fail. Offered blocks stay in quarantine."""
        self._peers.pop(incarnation, None)
        for room in [room for room, item in self.unclaimed.items() if item.peer.incarnation == incarnation]:
            self._drop_unclaimed(room)
        actions: list[Action] = []
        for entry in list(self.rooms.values()):
            if entry.peer is not None and entry.peer.incarnation == incarnation:
                actions += self._fail(entry, reason, 502, now, notify_peer=False)
        return actions

    def encoder_failed(self, encoder: str, reason: str, code: int, now: float) -> list[Action]:
        """No process of ``encoder`` can be used: rooms that it has not announced fail."""
        actions: list[Action] = []
        for entry in list(self.rooms.values()):
            if entry.encoder == encoder and entry.state is ReceiverState.EXPECTED:
                actions += self._fail(entry, reason, code, now)
        return actions

    def writer_gone(self, incarnation: str, now: float) -> list[Action]:
        """It is proven that the process ``incarnation`` does not exist any more (its lock is free)."""
        for room, held in list(self.quarantine.items()):
            if held.peer.incarnation == incarnation and held.peer.exclusive_lock:
                self._release_quarantined(room)
        return self._serve_waiting(now)

    def quarantined_peers(self) -> set[Peer]:
        """Peers that quarantined blocks wait for, each with the epoch that it may still write through."""
        return {held.peer for held in self.quarantine.values()}

    def in_doubt_since(self, mooncake_session_id: str) -> float | None:
        """When the session's oldest quarantine began; None where there is none."""
        return min(
            (held.since for held in self.quarantine.values() if held.peer.mooncake_session_id == mooncake_session_id),
            default=None,
        )

    def is_in_use(self, mooncake_session_id: str, epoch: int) -> bool:
        """Whether a healthy window is offered, or a peer may still be offered one, for an epoch up to ``epoch``."""
        return any(
            peer.mooncake_session_id == mooncake_session_id and peer.epoch <= epoch for peer in self._peers.values()
        ) or any(
            entry.state is ReceiverState.OFFERED
            and entry.peer is not None
            and entry.peer.mooncake_session_id == mooncake_session_id
            and entry.epoch <= epoch
            for entry in self.rooms.values()
        )

    def epoch_revoked(self, mooncake_session_id: str, epoch: int, now: float) -> list[Action]:
        """The epochs up to ``epoch`` were revoked for certain: nothing lands through them any more."""
        for room, held in list(self.quarantine.items()):
            if held.peer.mooncake_session_id == mooncake_session_id and held.peer.epoch <= epoch:
                self._release_quarantined(room)
        return self._serve_waiting(now)

    # -- messages ------------------------------------------------------------------------------------------------

    def on_message(self, incarnation: str, message: RoomMessage, now: float) -> list[Action]:
        """A message about a room. Late, early, repeated and contradictory ones are harmless.

        Raises ProtocolError where ``incarnation`` is not registered.
        """
        peer = self._peers.get(incarnation)
        if peer is None:
            raise ProtocolError(f"{type(message).__name__} from {incarnation}, which is not registered")
        entry = self.rooms.get(message.room)
        if entry is None or entry.machine.final:
            return self._on_ended(peer, message, now)
        if entry.peer is not None and entry.peer.incarnation != incarnation:
            # Two processes claim one room; only the one that was answered first is served. Its Drained is not answered.
            if not isinstance(message, Announce):
                return []
            return [self._abort_message(peer, message.room, "the room is served by another encoder process")]
        if isinstance(message, Announce):
            return self._on_announce(entry, peer, message, now)
        if isinstance(message, Failed):
            return self._on_failed(entry, peer, message, now)
        if entry.peer is None:
            if isinstance(message, Drained):
                return []  # the answer to an Abort of ours that no longer matters
            return self._fail(entry, f"{type(message).__name__} before Announce", 502, now)
        if isinstance(message, Drained):
            return self._fail(entry, "the encoder gave the room up without being asked", 502, now)
        return self._on_progress(entry, message, now)

    def _on_announce(self, entry: ReceiverRoom, peer: Peer, message: Announce, now: float) -> list[Action]:
        if entry.state is not ReceiverState.EXPECTED:
            same = (entry.total_tokens, entry.row_bytes, entry.dtype) == (
                message.total_tokens, message.row_bytes, message.dtype,
            )  # fmt: skip
            if not same:
                return self._fail(entry, "announced twice with different sizes", 502, now)
            return self._offer_again(entry, now)
        entry.peer = peer  # only the encoder that was sent the room's name can know it
        if message.row_bytes > self.geometry.block_bytes:
            return self._fail(
                entry,
                f"a row of {message.row_bytes} bytes does not fit a block of {self.geometry.block_bytes} bytes",
                500, now,
            )  # fmt: skip
        if message.total_tokens * message.row_bytes > self._max_embedding_bytes:
            return self._fail(
                entry,
                f"{message.total_tokens} rows of {message.row_bytes} bytes are more than "
                f"SGLANG_MM_CONN_MAX_EMBEDDING_BYTES={self._max_embedding_bytes}",
                413, now,
            )  # fmt: skip
        entry.total_tokens, entry.row_bytes, entry.dtype = message.total_tokens, message.row_bytes, message.dtype
        entry.machine.transition_to(ReceiverState.QUEUED)
        self._waiting.append(entry)
        return self._serve_waiting(now)

    def _on_failed(self, entry: ReceiverRoom, peer: Peer, message: Failed, now: float) -> list[Action]:
        entry.peer = entry.peer or peer
        actions = self._fail(entry, message.reason, message.code, now, notify_peer=False)
        if message.drained:
            self._release_quarantined(entry.room)
            actions += self._serve_waiting(now)
        return actions

    def _on_progress(self, entry: ReceiverRoom, message: Progress | Done, now: float) -> list[Action]:
        done = isinstance(message, Done)
        if isinstance(message, Progress) and message.refused:
            if message.refused_window != entry.window or entry.state is not ReceiverState.OFFERED:
                return []  # about an offer that was said twice and confirmed since
            return self._fail(entry, f"the encoder refused the offer: {message.refused}", 502, now)
        if message.window < entry.window or (
            message.window == entry.window and entry.state in (ReceiverState.COPYING, ReceiverState.QUEUED)
        ):
            return []  # the answer to a repeated offer, or a repeated confirmation: it changes nothing
        confirmed = entry.sent_tokens + entry.allocated_tokens
        claimed = message.total_tokens if isinstance(message, Done) else message.sent_tokens
        if (
            entry.state is not ReceiverState.OFFERED
            or message.window != entry.window
            or claimed != confirmed
            or done != (confirmed == entry.total_tokens)
        ):
            return self._fail(
                entry,
                f"{type(message).__name__} of window {message.window} with {claimed} rows, "
                f"but window {entry.window} offered rows {entry.sent_tokens} to {confirmed} of {entry.total_tokens}",
                502, now,
            )  # fmt: skip
        if entry.window == 0:
            entry.metadata = message.metadata
        entry.machine.transition_to(ReceiverState.COPYING)
        entry.last = done
        entry.view = done and entry.window == 0 and self._may_be_view(entry)
        if entry.view:
            self._viewed += len(entry.blocks)
        if isinstance(message, Done):
            entry.elapsed = message.elapsed - now  # completed when the rows have been copied
        return [
            CopyOut(
                room=entry.room,
                window=entry.window,
                blocks=tuple(entry.blocks),
                first_token=entry.sent_tokens,
                tokens=entry.allocated_tokens,
                row_bytes=entry.row_bytes,
                total_tokens=entry.total_tokens,
                dtype=entry.dtype,
                last=done,
                checksum=message.checksum if isinstance(message, Done) else None,
                view=entry.view,
            )
        ]

    def _may_be_view(self, entry: ReceiverRoom) -> bool:
        count, first = len(entry.blocks), entry.blocks[0]
        return (
            self._viewed + count <= self._view_blocks
            and entry.total_tokens * entry.row_bytes >= self._view_least_bytes
            and entry.blocks == list(range(first, first + count))
            and not any(other.state is ReceiverState.QUEUED for other in self._waiting)
        )

    def _on_ended(self, peer: Peer, message: RoomMessage, now: float) -> list[Action]:
        """About a room that nobody waits for: ended, or not claimed yet."""
        room = message.room
        held = self.quarantine.get(room)
        if held is not None and held.peer == peer:  # what is said about another session of this process proves nothing
            if (
                isinstance(message, Drained)
                or (isinstance(message, Failed) and message.drained)
                or (isinstance(message, Progress | Done) and self._says_landed(held, message))
            ):
                self._release_quarantined(room)
                return self._serve_waiting(now)
            return []
        if room in self.tombstones or room in self.rooms:
            outcome = self.tombstones.get(room)
            arrived = outcome is not None and outcome.code == SUCCESS_CODE
            # One that arrived is announced again to a rank that registers anew; the other ranks still need it.
            if isinstance(message, Announce) and not arrived:
                return [self._abort_message(peer, room, "nobody waits for this room any more")]
            return []
        if isinstance(message, Announce | Failed):
            self._drop_unclaimed(room)  # to the end: they are kept in the order of their time
            if self._unclaimed_of[peer.incarnation] < UNCLAIMED_LIMIT:
                if isinstance(message, Failed):
                    message = Failed(
                        room=room, reason=as_text(message.reason), code=message.code, drained=message.drained
                    )
                self.unclaimed[room] = Unclaimed(peer, message, now + self._claim_timeout)
                self._unclaimed_of[peer.incarnation] += 1
            elif isinstance(message, Announce):
                return [self._abort_message(peer, room, "too many rooms are announced that no request has claimed")]
        return []

    @staticmethod
    def _says_landed(held: Quarantine, message: Progress | Done) -> bool:
        """Whether exactly the window in quarantine is confirmed, and by a message that does not contradict itself."""
        if isinstance(message, Done):
            return (message.window, message.total_tokens) == (held.owner[1], held.confirmed_tokens)
        return not message.refused and (message.window, message.sent_tokens) == (held.owner[1], held.confirmed_tokens)

    def _drop_unclaimed(self, room: str) -> Unclaimed | None:
        unclaimed = self.unclaimed.pop(room, None)
        if unclaimed is not None:
            self._unclaimed_of[unclaimed.peer.incarnation] -= 1
            if not self._unclaimed_of[unclaimed.peer.incarnation]:
                del self._unclaimed_of[unclaimed.peer.incarnation]
        return unclaimed

    # -- the rows were copied out ---------------------------------------------------------------------------------

    def on_copied(self, room: str, window: int, error: str, now: float, *, view: bool = False) -> list[Action]:
        """The copier is done with the blocks of ``window``; ``error`` is empty where every row is in place.

        ``view``: it made a view of them, also where there is an error; they are free after ``view_released``.
        """
        entry = self.rooms[room]
        if window != entry.window or not entry.blocks:
            raise ConnError(f"room {room}: window {window} was copied, but {entry.window} is current")
        if view:
            if not entry.view:
                raise ConnError(f"room {room}: nobody allowed a view of its blocks")
            self.views[room] = (room, window), tuple(entry.blocks)
        else:
            self.allocator.release((room, window), entry.blocks)
            self._viewed -= len(entry.blocks) if entry.view else 0
        entry.blocks = []
        actions: list[Action] = []
        if entry.state is ReceiverState.COPYING:
            entry.sent_tokens += entry.allocated_tokens
            entry.allocated_tokens = 0
            if error:
                actions += self._fail(entry, error, 500, now)
            elif entry.last:
                entry.machine.transition_to(ReceiverState.SUCCESS)
                entry.elapsed += now
                entry.ended = now
                self.tombstones.put(room, Outcome("", SUCCESS_CODE), now + TOMBSTONE_SECONDS)
                actions.append(Ended(room, success=True))
            else:
                entry.machine.transition_to(ReceiverState.QUEUED)
                self._waiting.append(entry)
        elif entry.forgotten:
            del self.rooms[room]
        return actions + self._serve_waiting(now)

    def view_released(self, room: str, now: float) -> list[Action]:
        """Nothing refers to the view of ``room`` any more, and nothing ever will."""
        owner, blocks = self.views.pop(room)
        self.allocator.release(owner, blocks)
        self._viewed -= len(blocks)
        return self._serve_waiting(now)

    # -- time ----------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Action]:
        """Enforce deadlines, release announcements nobody claimed, forget old tombstones."""
        actions: list[Action] = []
        if now >= self._next_deadline:
            for entry in list(self.rooms.values()):
                if not entry.machine.final and now >= entry.deadline:
                    actions += self._fail(
                        entry,
                        f"not finished after {now - entry.started:.1f} s (state {entry.state.value}, "
                        f"{entry.sent_tokens} of {entry.total_tokens} rows)",
                        408, now,
                    )  # fmt: skip
            open_rooms = (entry for entry in self.rooms.values() if not entry.machine.final)
            self._next_deadline = min((entry.deadline for entry in open_rooms), default=math.inf)
        while self.unclaimed and now >= (item := next(iter(self.unclaimed.values()))).until:  # the oldest is the first
            room = item.message.room
            self._drop_unclaimed(room)
            if isinstance(item.message, Announce):
                reason = f"no request claimed the room within {self._claim_timeout:g} s"
                self.tombstones.put(room, Outcome(reason, 408), now + TOMBSTONE_SECONDS)
                actions.append(self._abort_message(item.peer, room, reason))
            else:
                outcome = Outcome(item.message.reason, item.message.code)
                self.tombstones.put(room, outcome, now + TOMBSTONE_SECONDS)
        for room, held in self.quarantine.items():
            if now >= held.ask_again_at and held.peer.incarnation in self._peers:
                self.quarantine[room] = replace(held, ask_again_at=now + ABORT_AGAIN_SECONDS)
                actions.append(self._abort_message(held.peer, room, "asked again: its blocks are in quarantine"))
        self.tombstones.sweep(now)
        self._waiting = deque(entry for entry in self._waiting if entry.state is ReceiverState.QUEUED)
        return actions

    # -- offers --------------------------------------------------------------------------------------------------

    def _serve_waiting(self, now: float) -> list[Action]:
        """Offer what is free to whoever has waited longest. The head takes what there is, so nobody starves."""
        actions: list[Action] = []
        while self._waiting and self.allocator.free_count:
            entry = self._waiting.popleft()
            if entry.state is not ReceiverState.QUEUED:
                continue
            tokens = entry.total_tokens - entry.sent_tokens
            if entry.window < 0 and self._first_offer is not None:
                tokens = min(tokens, self._first_offer)
            needed = self.geometry.blocks_for(tokens, entry.row_bytes)
            count = min(needed, self.allocator.free_count, MAX_OFFER_BLOCKS)
            blocks = self.allocator.allocate((entry.room, entry.window + 1), count)
            tokens = min(tokens, self.geometry.capacity(count, entry.row_bytes))
            actions.append(self.resume_transfer(entry, blocks, entry.sent_tokens, tokens, now))
        return actions

    def resume_transfer(
        self, entry: ReceiverRoom, embedding_indices: list[int], sent_tokens: int, allocated_tokens: int, now: float
    ) -> Send:
        """Offer the next window of a room that holds no blocks: Init for window 0, Resume for any later one."""
        if sent_tokens != entry.sent_tokens:
            raise ConnError(f"room {entry.room}: {sent_tokens} rows named, {entry.sent_tokens} are here")
        owner = (entry.room, entry.window + 1)
        if not self.allocator.holds(owner, embedding_indices):
            raise ConnError(f"blocks {embedding_indices[:8]}... are not held by (room, window) {owner}")
        most = self.geometry.capacity(len(embedding_indices), entry.row_bytes)
        if not 1 <= allocated_tokens <= min(most, entry.total_tokens - sent_tokens):
            raise ConnError(f"room {entry.room}: allocated_tokens={allocated_tokens}, but the blocks hold {most} rows")
        assert entry.peer is not None
        entry.machine.transition_to(ReceiverState.OFFERED)
        entry.window += 1
        entry.epoch = entry.peer.epoch
        entry.blocks = embedding_indices
        entry.allocated_tokens = allocated_tokens
        return self._offer(entry, now)

    def _offer(self, entry: ReceiverRoom, now: float) -> Send:
        assert entry.peer is not None
        left = entry.deadline - now
        left = max(0.0, left - min(DEADLINE_MARGIN_SECONDS, left * DEADLINE_MARGIN_SHARE))
        session = entry.peer.mooncake_session_id
        if entry.window == 0:
            return Send(
                entry.peer.incarnation,
                Init(
                    room=entry.room,
                    mooncake_session_id=session,
                    epoch=entry.epoch,
                    dst_embedding_indices=list(entry.blocks),
                    allocated_tokens=entry.allocated_tokens,
                    required_dst_info_num=entry.required_dst_info_num,
                    deadline=left,
                ),
            )
        return Send(
            entry.peer.incarnation,
            Resume(
                room=entry.room,
                mooncake_session_id=session,
                epoch=entry.epoch,
                window=entry.window,
                dst_embedding_indices=list(entry.blocks),
                sent_tokens=entry.sent_tokens,
                allocated_tokens=entry.allocated_tokens,
                deadline=left,
            ),
        )

    def _offer_again(self, entry: ReceiverRoom, now: float) -> list[Action]:
        """Repeat the current offer (the encoder answers a repeated one with the confirmed state)."""
        return [self._offer(entry, now)] if entry.state is ReceiverState.OFFERED else []

    # -- the end -------------------------------------------------------------------------------------------------

    def _fail(
        self, entry: ReceiverRoom, reason: str, code: int, now: float, *, notify_peer: bool = True
    ) -> list[Action]:
        if entry.machine.final:
            return []
        offered = entry.state is ReceiverState.OFFERED
        entry.machine.transition_to(ReceiverState.FAILED)
        entry.outcome = Outcome(reason, code)
        entry.ended = now
        self.tombstones.put(entry.room, entry.outcome, now + TOMBSTONE_SECONDS)
        actions: list[Action] = []
        if offered:
            assert entry.peer is not None
            owner = (entry.room, entry.window)
            self.allocator.quarantine(owner, entry.blocks)
            peer = replace(entry.peer, epoch=entry.epoch)
            confirmed = entry.sent_tokens + entry.allocated_tokens
            self.quarantine[entry.room] = Quarantine(
                owner, peer, tuple(entry.blocks), confirmed, now, now + ABORT_AGAIN_SECONDS
            )
            entry.blocks = []
        # Blocks of a window that is being copied are freed by on_copied: the copier still reads them.
        if notify_peer and entry.peer is not None and not entry.last:
            actions.append(self._abort_message(entry.peer, entry.room, reason))
        actions.append(Ended(entry.room, success=False, reason=reason, code=code))
        return actions

    def _release_quarantined(self, room: str) -> None:
        held = self.quarantine.pop(room, None)
        if held is not None:
            self.allocator.release_quarantined(held.owner, held.blocks)

    @staticmethod
    def _abort_message(peer: Peer, room: str, reason: str) -> Send:
        return Send(
            peer.incarnation,
            Abort(room=room, mooncake_session_id=peer.mooncake_session_id, reason=as_text(reason)),
        )

    def report(self) -> dict[str, Any]:
        """Blocks by who has them, rooms by state, announcements that no request has claimed."""
        return {
            "blocks": self.allocator.blocks,
            "free": self.allocator.free_count,
            "held": self.allocator.held_count,
            "views": sum(len(blocks) for _, blocks in self.views.values()),
            "quarantined": self.allocator.quarantined_count,
            "rooms": dict(Counter(entry.state.value for entry in self.rooms.values())),
            "unclaimed": len(self.unclaimed),
        }

    def check_integrity(self) -> None:
        """Raise unless every block is accounted for: free, an open window's or a view's, or quarantined on record."""
        self.allocator.check_integrity()
        viewed = sum(len(blocks) for _, blocks in self.views.values())
        held = viewed + sum(len(entry.blocks) for entry in self.rooms.values())
        granted = sum(len(entry.blocks) for entry in self.rooms.values() if entry.view)
        if self._viewed != viewed + granted or self._viewed > self._view_blocks:
            raise ConnError(f"{self._viewed} blocks counted as views, but {viewed} are and {granted} may become one")
        quarantined = sum(len(item.blocks) for item in self.quarantine.values())
        if held != self.allocator.held_count or quarantined != self.allocator.quarantined_count:
            raise ConnError(
                f"rooms hold {held} blocks, the allocator says {self.allocator.held_count}; "
                f"quarantine lists {quarantined}, the allocator says {self.allocator.quarantined_count}"
            )
