"""Owns the language side's rooms: their messages, transitions and deadlines. Pure; returns actions.

Who owns a block, at each moment:

- *free*: nobody, the allocator may hand it out;
- from the offer (Init, Resume) on: **the encoder**, which may write it at any moment;
- from the encoder's Progress or Done for exactly that window on: **this side**, which copies the rows out and frees it
  (those messages are sent after the data call returned 0, and one window is written once);
- an embedding that came in one window, in contiguous blocks, may stay there as a **view**: its blocks are the
  result's, and after it the request's, until nothing refers to them any more (``view_released``). Views hold
  ``view_blocks`` blocks together at most, and none are made while a room waits, so the others always go round
  (core.views);
- a room that fails while it is offered: **quarantine** (core.quarantine), until one of the proofs that no write is to
  come: Progress or Done of that window, Drained, Failed with ``drained``, or the proof of the data path
  (datapath.base): that the writing process is gone, over a path with an exclusive lock, or that the epoch it was
  offered for was revoked.

A room that waits for blocks (core.offers) holds none: the rows it has were copied out first. So waiting can never be
circular.
"""

from __future__ import annotations

import math
from typing import Any

from sglang_mm_conn.core import accounts
from sglang_mm_conn.core.actions import Action, Ended, Send
from sglang_mm_conn.core.blocks import BlockAllocator
from sglang_mm_conn.core.errors import ConnError, ProtocolError
from sglang_mm_conn.core.layout import Geometry
from sglang_mm_conn.core.messages import Announce, Done, Drained, Failed, Progress
from sglang_mm_conn.core.offers import Offers, offer_message
from sglang_mm_conn.core.outcomes import SUCCEEDED, FailureCode, Outcome
from sglang_mm_conn.core.quarantine import QuarantineTable
from sglang_mm_conn.core.receiver_room import Peer, ReceiverRoom, RoomMessage, abort_message
from sglang_mm_conn.core.states import ReceiverState
from sglang_mm_conn.core.tombstones import Tombstones
from sglang_mm_conn.core.unclaimed import UnclaimedRooms
from sglang_mm_conn.core.views import Views

# An encode may outlive its room by its own timeout; a tombstone must outlive the encode.
TOMBSTONE_SECONDS = 3600.0


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
        self.quarantine = QuarantineTable(allocator)
        self.views = Views(allocator, most_blocks=view_blocks, least_bytes=view_least_bytes)
        self.tombstones = Tombstones()
        self.unclaimed = UnclaimedRooms(claim_timeout)
        self.offers = Offers(allocator, geometry, first_offer=first_offer, max_embedding_bytes=max_embedding_bytes)
        self._peers: dict[str, Peer] = {}
        self._next_deadline = math.inf  # no room that has not ended has an earlier one

    # -- what the request asks for -------------------------------------------------------------------------------

    def expect(
        self, room: str, encoder: str, deadline: float, now: float, required_dst_info_num: int = 1
    ) -> list[Action]:
        """A request waits for ``room`` from ``encoder``. Raises ConnError where the room was expected before."""
        outcome = self.tombstones.get(room)
        if room in self.rooms or (outcome is not None and outcome.succeeded):
            raise ConnError(f"room {room} was expected before")
        entry = ReceiverRoom(room, encoder, deadline, now, required_dst_info_num)
        self.rooms[room] = entry
        self._next_deadline = min(self._next_deadline, deadline)
        if outcome is not None:  # it failed, or was given up, before the request came
            return self._fail(entry, outcome.reason, outcome.code, now)
        unclaimed = self.unclaimed.take(room)
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
                actions += self._fail(
                    entry, "the session to the encoder changed in mid-transfer", FailureCode.PEER_FAILED, now
                )
            else:
                entry.peer = peer
                actions += self._offer_again(entry, now)
        for asked, room in self.quarantine.of_process(peer.incarnation):
            actions.append(abort_message(asked, room, "asked again after a lost connection"))
        return actions

    def peer_lost(self, incarnation: str, reason: str, now: float) -> list[Action]:
        """The encoder process is gone or silent: its rooms fail. Offered blocks stay in quarantine."""
        self._peers.pop(incarnation, None)
        self.unclaimed.drop_process(incarnation)
        lost = [
            entry for entry in self.rooms.values() if entry.peer is not None and entry.peer.incarnation == incarnation
        ]
        return [
            action
            for entry in lost
            for action in self._fail(entry, reason, FailureCode.PEER_FAILED, now, notify_peer=False)
        ]

    def encoder_failed(self, encoder: str, reason: str, code: int, now: float) -> list[Action]:
        """No process of ``encoder`` can be used: rooms that it has not announced fail."""
        hopeless = [
            entry for entry in self.rooms.values() if entry.encoder == encoder and entry.state is ReceiverState.EXPECTED
        ]
        return [action for entry in hopeless for action in self._fail(entry, reason, code, now)]

    def writer_gone(self, incarnation: str, now: float) -> list[Action]:
        """It is proven that the process ``incarnation`` does not exist any more (its lock is free)."""
        return self._serve_waiting(now) if self.quarantine.writer_gone(incarnation) else []

    def quarantined_peers(self) -> set[Peer]:
        """Peers that quarantined blocks wait for, each with the epoch that it may still write through."""
        return self.quarantine.peers()

    def in_doubt_since(self, mooncake_session_id: str) -> float | None:
        """When the session's oldest quarantine began; None where there is none."""
        return self.quarantine.in_doubt_since(mooncake_session_id)

    def is_in_use(self, mooncake_session_id: str, epoch: int) -> bool:
        """Whether a healthy window is offered, or a peer may still be offered one, for an epoch up to ``epoch``."""
        return any(peer.writes_through(mooncake_session_id, epoch) for peer in self._peers.values()) or any(
            entry.state is ReceiverState.OFFERED
            and entry.peer is not None
            and entry.peer.mooncake_session_id == mooncake_session_id
            and entry.epoch <= epoch
            for entry in self.rooms.values()
        )

    def epoch_revoked(self, mooncake_session_id: str, epoch: int, now: float) -> list[Action]:
        """The epochs up to ``epoch`` were revoked for certain: nothing lands through them any more."""
        return self._serve_waiting(now) if self.quarantine.epoch_revoked(mooncake_session_id, epoch) else []

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
            return [abort_message(peer, message.room, "the room is served by another encoder process")]
        if isinstance(message, Announce):
            return self._on_announce(entry, peer, message, now)
        if isinstance(message, Failed):
            return self._on_failed(entry, peer, message, now)
        if entry.peer is None:
            if isinstance(message, Drained):
                return []  # the answer to an Abort of ours that no longer matters
            return self._fail(entry, f"{type(message).__name__} before Announce", FailureCode.PEER_FAILED, now)
        if isinstance(message, Drained):
            return self._fail(entry, "the encoder gave the room up without being asked", FailureCode.PEER_FAILED, now)
        return self._on_progress(entry, message, now)

    def _on_announce(self, entry: ReceiverRoom, peer: Peer, message: Announce, now: float) -> list[Action]:
        if entry.machine.state is not ReceiverState.EXPECTED:
            if not entry.same_size(message):
                return self._fail(entry, "announced twice with different sizes", FailureCode.PEER_FAILED, now)
            return self._offer_again(entry, now)
        entry.peer = peer  # only the encoder that was sent the room's name can know it
        too_large = self.offers.too_large(message)
        if too_large is not None:
            return self._fail(entry, too_large.reason, too_large.code, now)
        entry.total_tokens, entry.row_bytes, entry.dtype = message.total_tokens, message.row_bytes, message.dtype
        entry.machine.transition_to(ReceiverState.QUEUED)
        self.offers.waiting.append(entry)
        return self._serve_waiting(now)

    def _on_failed(self, entry: ReceiverRoom, peer: Peer, message: Failed, now: float) -> list[Action]:
        entry.peer = entry.peer or peer
        actions = self._fail(entry, message.reason, message.code, now, notify_peer=False)
        if message.drained and self.quarantine.release(entry.room):
            actions += self._serve_waiting(now)
        return actions

    def _on_progress(self, entry: ReceiverRoom, message: Progress | Done, now: float) -> list[Action]:
        if isinstance(message, Progress) and message.refused:
            if message.refused_window != entry.window or entry.state is not ReceiverState.OFFERED:
                return []  # about an offer that was said twice and confirmed since
            return self._fail(entry, f"the encoder refused the offer: {message.refused}", FailureCode.PEER_FAILED, now)
        if message.window < entry.window or (
            message.window == entry.window and entry.machine.state in (ReceiverState.COPYING, ReceiverState.QUEUED)
        ):
            return []  # the answer to a repeated offer, or a repeated confirmation: it changes nothing
        contradiction = entry.contradiction(message)
        if contradiction:
            return self._fail(entry, contradiction, FailureCode.PEER_FAILED, now)
        entry.machine.transition_to(ReceiverState.COPYING)
        entry.confirm(message, now)
        entry.view = entry.last and entry.window == 0 and not self.offers.anyone_waits() and self.views.grant(entry)
        return [entry.copy_out(message.checksum if isinstance(message, Done) else None)]

    def _on_ended(self, peer: Peer, message: RoomMessage, now: float) -> list[Action]:
        """About a room that nobody waits for: ended, or not claimed yet."""
        room = message.room
        if self.quarantine.waits_for(peer, room):
            return self._serve_waiting(now) if self.quarantine.on_message(message) else []
        if room in self.tombstones or room in self.rooms:
            outcome = self.tombstones.get(room)
            arrived = outcome is not None and outcome.succeeded
            # One that arrived is announced again to a rank that registers anew; the other ranks still need it.
            if isinstance(message, Announce) and not arrived:
                return [abort_message(peer, room, "nobody waits for this room any more")]
            return []
        if isinstance(message, Announce | Failed):
            kept = self.unclaimed.put(peer, message, now)
            if not kept and isinstance(message, Announce):
                return [abort_message(peer, room, "too many rooms are announced that no request has claimed")]
        return []

    # -- the rows were copied out ---------------------------------------------------------------------------------

    def on_copied(self, room: str, window: int, error: str, now: float, *, view: bool = False) -> list[Action]:
        """The copier is done with the blocks of ``window``; ``error`` is empty where every row is in place.

        ``view``: it made a view of them, also where there is an error; they are free after ``view_released``.
        """
        entry = self.rooms[room]
        if window != entry.window or not entry.blocks:
            raise ConnError(f"room {room}: window {window} was copied, but {entry.window} is current")
        if view:
            self.views.put(entry)
        else:
            self.allocator.release((room, window), entry.blocks)
            if entry.view:
                self.views.renounce(entry.blocks)
        entry.blocks = []
        actions: list[Action] = []
        if entry.machine.state is ReceiverState.COPYING:
            entry.sent_tokens += entry.allocated_tokens
            entry.allocated_tokens = 0
            if error:
                actions += self._fail(entry, error, FailureCode.INTERNAL, now)
            elif entry.last:
                entry.machine.transition_to(ReceiverState.SUCCESS)
                entry.elapsed += now
                entry.ended = now
                self.tombstones.put(room, SUCCEEDED, now + TOMBSTONE_SECONDS)
                actions.append(Ended(room, SUCCEEDED))
            else:
                entry.machine.transition_to(ReceiverState.QUEUED)
                self.offers.waiting.append(entry)
        elif entry.forgotten:
            del self.rooms[room]
        return actions + self._serve_waiting(now)

    def view_released(self, room: str, now: float) -> list[Action]:
        """Nothing refers to the view of ``room`` any more, and nothing ever will."""
        self.views.release(room)
        return self._serve_waiting(now)

    # -- time ----------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Action]:
        """Enforce deadlines, release announcements nobody claimed, forget old tombstones."""
        actions: list[Action] = []
        if now >= self._next_deadline:
            for entry in list(self.rooms.values()):
                if not entry.machine.final and now >= entry.deadline:
                    actions += self._fail(entry, entry.unfinished(now), FailureCode.TIMED_OUT, now)
            open_rooms = (entry for entry in self.rooms.values() if not entry.machine.final)
            self._next_deadline = min((entry.deadline for entry in open_rooms), default=math.inf)
        for item, outcome in self.unclaimed.take_expired(now):
            room = item.message.room
            self.tombstones.put(room, outcome, now + TOMBSTONE_SECONDS)
            if isinstance(item.message, Announce):
                actions.append(abort_message(item.peer, room, outcome.reason))
        for peer, room in self.quarantine.to_ask_again(now, self._peers):
            actions.append(abort_message(peer, room, "asked again: its blocks are in quarantine"))
        self.tombstones.sweep(now)
        self.offers.sweep()
        return actions

    # -- offers --------------------------------------------------------------------------------------------------

    def _serve_waiting(self, now: float) -> list[Action]:
        """Blocks are free, or a room waits anew: offer what there is."""
        actions: list[Action] = []
        while self.offers.waiting and (taken := self.offers.take()) is not None:
            entry, blocks, tokens = taken
            actions.append(self.resume_transfer(entry, blocks, entry.sent_tokens, tokens, now))
        return actions

    def resume_transfer(
        self, entry: ReceiverRoom, embedding_indices: list[int], sent_tokens: int, allocated_tokens: int, now: float
    ) -> Send:
        """Offer the next window of a room that holds no blocks: Init for window 0, Resume for any later one."""
        self.offers.check(entry, embedding_indices, sent_tokens, allocated_tokens)
        assert entry.peer is not None
        entry.machine.transition_to(ReceiverState.OFFERED)
        entry.window += 1
        entry.epoch = entry.peer.epoch
        entry.blocks = embedding_indices
        entry.allocated_tokens = allocated_tokens
        return offer_message(entry, now)

    def _offer_again(self, entry: ReceiverRoom, now: float) -> list[Action]:
        """Repeat the current offer (the encoder answers a repeated one with the confirmed state)."""
        return [offer_message(entry, now)] if entry.state is ReceiverState.OFFERED else []

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
            self.quarantine.put(entry, now)
            entry.blocks = []
        # Blocks of a window that is being copied are freed by on_copied: the copier still reads them.
        if notify_peer and entry.peer is not None and not entry.last:
            actions.append(abort_message(entry.peer, entry.room, reason))
        actions.append(Ended(entry.room, entry.outcome))
        return actions

    def report(self) -> dict[str, Any]:
        """Blocks by who has them, rooms by state, announcements that no request has claimed."""
        return accounts.report(self.allocator, self.rooms, self.views, self.unclaimed)

    def check_integrity(self) -> None:
        """Raise unless every block is accounted for: free, an open window's or a view's, or quarantined on record."""
        accounts.check_integrity(self.allocator, self.rooms, self.views, self.quarantine)
