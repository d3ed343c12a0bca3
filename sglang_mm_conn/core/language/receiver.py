"""Owns the language side's rooms: their messages, transitions and deadlines. Pure; returns actions.

The owner of a block:

- free: the allocator.
- offered (Init or Resume was sent): **the encoder**. It may write the block at any moment.
- confirmed (Progress or Done of exactly this window has arrived): **this side**. It copies the rows out and frees the
  block. The encoder confirms a window after its data call has returned 0, and writes it once.
- left as a **view** (the embedding came in one window of contiguous blocks): the result, later the request, until
  nothing refers to the block any more (``view_released``). All views together hold at most ``view_blocks`` blocks, and
  none is made while a room waits, so the other blocks keep circulating (core.language.views).
- offered when its room failed: **quarantine**, until a proof that no write will come (core.language.quarantine,
  datapath.base).

A room that waits for blocks (core.language.offers) holds none, because its rows were copied out first. So rooms never
wait for one another in a circle.
"""

from __future__ import annotations

import math
from typing import Any

from sglang_mm_conn.core.actions import Action, Ended, Send
from sglang_mm_conn.core.blocks import BlockAllocator
from sglang_mm_conn.core.errors import ConnError, ProtocolError
from sglang_mm_conn.core.language import accounts
from sglang_mm_conn.core.language.early_aborts import EarlyAborts
from sglang_mm_conn.core.language.offers import Offers, offer_message
from sglang_mm_conn.core.language.quarantine import QuarantineTable
from sglang_mm_conn.core.language.receiver_room import Peer, ReceiverRoom, RoomMessage, abort_message
from sglang_mm_conn.core.language.unclaimed import UnclaimedRooms
from sglang_mm_conn.core.language.views import Views
from sglang_mm_conn.core.layout import Geometry
from sglang_mm_conn.core.messages import Announce, Done, Drained, Failed, Progress
from sglang_mm_conn.core.outcomes import SUCCEEDED, FailureCode, failure
from sglang_mm_conn.core.states import ReceiverState
from sglang_mm_conn.core.tombstones import Tombstones

# Longer than any encode: an encode may run on after its room has failed, and a late Announce must find the tombstone.
TOMBSTONE_SECONDS = 3600.0


class ReceiverCore:
    """All rooms of one language rank. Not thread-safe: the caller holds one lock around every call."""

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
        self._early_aborts = EarlyAborts()
        self._next_deadline = math.inf  # no unfinished room has an earlier one

    # -- calls for a request -------------------------------------------------------------------------------------

    def expect(
        self, room: str, encoder: str, deadline: float, now: float, required_dst_info_num: int = 1
    ) -> list[Action]:
        """A request waits for ``room`` from ``encoder``. Raises ConnError if the room was expected before."""
        outcome = self.tombstones.get(room)
        if room in self.rooms or (outcome is not None and outcome.succeeded):
            raise ConnError(f"room {room} was expected before")
        entry = ReceiverRoom(room, encoder, deadline, now, required_dst_info_num)
        self.rooms[room] = entry
        self._next_deadline = min(self._next_deadline, deadline)
        if outcome is not None:  # it failed, or its claim timeout passed, before the request came
            return self._fail(entry, outcome.reason, outcome.code, now)
        unclaimed = self.unclaimed.take(room)
        return [] if unclaimed is None else self.on_message(unclaimed.peer.incarnation, unclaimed.message, now)

    def abort(self, room: str, reason: str, code: int, now: float) -> list[Action]:
        """The request gives ``room`` up. Changes nothing if the room is finished or unknown."""
        entry = self.rooms.get(room)
        return [] if entry is None else self._fail(entry, reason, code, now)

    def forget(self, room: str) -> None:
        """Drop the record of a finished room (its tombstone stays) as soon as no copier reads its blocks."""
        entry = self.rooms.get(room)
        if entry is not None and entry.machine.final:
            entry.forgotten = True
            if not entry.blocks:
                del self.rooms[room]

    # -- peers ---------------------------------------------------------------------------------------------------

    def peer_ready(self, peer: Peer, now: float) -> list[Action]:
        """``peer`` answered Registered. After a lost connection, this resynchronizes its rooms."""
        self._peers[peer.incarnation] = peer
        actions: list[Action] = []
        for entry in list(self.rooms.values()):
            if entry.peer is None or entry.peer.incarnation != peer.incarnation:
                continue
            if entry.peer.mooncake_session_id != peer.mooncake_session_id:
                reason = "the session to the encoder changed during the transfer"
                actions += self._fail(entry, reason, FailureCode.PEER_FAILED, now)
            else:
                entry.peer = peer
                actions += self._offer_again(entry, now)
        for asked, room in self.quarantine.of_process(peer.incarnation):
            actions.append(abort_message(asked, room, "repeated after a lost connection"))
        return actions + self._early_aborts.registered(peer, now)

    def peer_lost(self, incarnation: str, reason: str, now: float) -> list[Action]:
        """The encoder process has ended or is silent, so its rooms fail. Their offered blocks go into quarantine."""
        self._peers.pop(incarnation, None)
        self.unclaimed.drop_process(incarnation)
        lost = [one for one in self.rooms.values() if one.peer is not None and one.peer.incarnation == incarnation]
        return [
            action
            for entry in lost
            for action in self._fail(entry, reason, FailureCode.PEER_FAILED, now, notify_peer=False)
        ]

    def encoder_failed(self, encoder: str, reason: str, code: int, now: float) -> list[Action]:
        """No process of ``encoder`` can be used, so the rooms that it has not announced fail."""
        expected = [one for one in self.rooms.values() if one.state is ReceiverState.EXPECTED]
        hopeless = [one for one in expected if one.encoder == encoder]
        return [action for entry in hopeless for action in self._fail(entry, reason, code, now)]

    def writer_gone(self, incarnation: str, now: float) -> list[Action]:
        """It is proven that the process ``incarnation`` has ended: its lock is free."""
        return self._serve_waiting(now) if self.quarantine.writer_gone(incarnation) else []

    def quarantined_peers(self) -> set[Peer]:
        """The peers that may still write quarantined blocks, each with the epoch that it may write through."""
        return self.quarantine.peers()

    def in_doubt_since(self, mooncake_session_id: str) -> float | None:
        """Time at which the session's oldest quarantine began; None if it has none."""
        return self.quarantine.in_doubt_since(mooncake_session_id)

    def is_in_use(self, mooncake_session_id: str, epoch: int) -> bool:
        """Whether a window of an unfailed room is or may yet be offered for an epoch up to ``epoch``."""
        return any(peer.writes_through(mooncake_session_id, epoch) for peer in self._peers.values()) or any(
            entry.state is ReceiverState.OFFERED
            and entry.peer is not None
            and entry.peer.mooncake_session_id == mooncake_session_id
            and entry.epoch <= epoch
            for entry in self.rooms.values()
        )

    def epoch_revoked(self, mooncake_session_id: str, epoch: int, now: float) -> list[Action]:
        """It is proven that the epochs up to ``epoch`` are revoked: no write through them lands any more."""
        return self._serve_waiting(now) if self.quarantine.epoch_revoked(mooncake_session_id, epoch) else []

    # -- messages ------------------------------------------------------------------------------------------------

    def on_message(self, incarnation: str, message: RoomMessage, now: float) -> list[Action]:
        """Handle a message about a room. Late, early, repeated and contradictory ones do no harm.

        Raises ProtocolError if ``incarnation`` is not registered.
        """
        peer = self._peers.get(incarnation)
        if peer is None:
            raise ProtocolError(f"{type(message).__name__} from {incarnation}, which is not registered")
        entry = self.rooms.get(message.room)
        if entry is None or entry.machine.final:
            return self._on_ended(peer, message, now)
        if entry.peer is not None and entry.peer.incarnation != incarnation:
            # Two processes announce one room. The first one keeps it; an Abort answers Announces of the other, only.
            if not isinstance(message, Announce):
                return []
            return [abort_message(peer, message.room, "the room is served by another encoder process")]
        if isinstance(message, Announce):
            return self._on_announce(entry, peer, message, now)
        if isinstance(message, Failed):
            return self._on_failed(entry, peer, message, now)
        if entry.peer is None:
            if isinstance(message, Drained):
                return []  # the late answer to an Abort from before the room was expected
            return self._fail(entry, f"{type(message).__name__} before Announce", FailureCode.PEER_FAILED, now)
        if isinstance(message, Drained):
            return self._fail(entry, "the encoder sent Drained without an Abort", FailureCode.PEER_FAILED, now)
        return self._on_progress(entry, message, now)

    def _on_announce(self, entry: ReceiverRoom, peer: Peer, message: Announce, now: float) -> list[Action]:
        if entry.machine.state is not ReceiverState.EXPECTED:
            if not entry.same_size(message):
                return self._fail(entry, "announced twice with different sizes", FailureCode.PEER_FAILED, now)
            return self._offer_again(entry, now)
        entry.peer = peer  # not checked: only the encoder that was sent the room's name can announce it
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
                return []  # it refuses a repeated offer that was confirmed since
            return self._fail(entry, f"the encoder refused the offer: {message.refused}", FailureCode.PEER_FAILED, now)
        if message.window < entry.window or (
            message.window == entry.window and entry.machine.state in (ReceiverState.COPYING, ReceiverState.QUEUED)
        ):
            return []  # the answer to a repeated offer, or a repeated confirmation
        contradiction = entry.contradiction(message)
        if contradiction:
            return self._fail(entry, contradiction, FailureCode.PEER_FAILED, now)
        entry.machine.transition_to(ReceiverState.COPYING)
        entry.confirm(message, now)
        entry.view = entry.last and entry.window == 0 and not self.offers.anyone_waits() and self.views.grant(entry)
        return [entry.copy_out(message.checksum if isinstance(message, Done) else None)]

    def _on_ended(self, peer: Peer, message: RoomMessage, now: float) -> list[Action]:
        """Handle a message about a room that is finished or that no request has claimed."""
        room = message.room
        if self.quarantine.waits_for(peer, room):
            return self._serve_waiting(now) if self.quarantine.on_message(message) else []
        if room in self.tombstones or room in self.rooms:
            outcome = self.tombstones.get(room)
            arrived = outcome is not None and outcome.succeeded
            # The encoder announces open rooms again to a rank that registers again. If this room has arrived here,
            # other ranks may still need it, so there is no Abort.
            if isinstance(message, Announce) and not arrived:
                return [abort_message(peer, room, "no request waits for this room any more")]
            return []
        if isinstance(message, Announce | Failed) and not self.unclaimed.put(peer, message, now):
            return [abort_message(peer, room, "too many unclaimed rooms")] if isinstance(message, Announce) else []
        return []

    # -- copied out -----------------------------------------------------------------------------------------------

    def on_copied(
        self, room: str, window: int, error: str, now: float, *, view: bool = False, code: int = FailureCode.RANK_FAILED
    ) -> list[Action]:
        """A copier has finished with the blocks of ``window``. ``error`` is empty if every row is in place.

        ``view``: it made a view of them, even if there is an error. ``view_released`` frees them later.
        """
        entry = self.rooms[room]
        if window != entry.window or not entry.blocks:
            raise ConnError(f"room {room}: a copier reported window {window}, but the current one is {entry.window}")
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
                actions += self._fail(entry, error, code, now)
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
        """Nothing refers to the view of ``room`` any more, and nothing can again."""
        self.views.release(room)
        return self._serve_waiting(now)

    # -- time ----------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Action]:
        """Enforce deadlines, abort rooms unclaimed for too long, repeat Aborts, forget old tombstones."""
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
            actions.append(abort_message(peer, room, "repeated: the room's blocks are in quarantine"))
        self.tombstones.sweep(now)
        self.offers.sweep()
        return actions

    # -- offers --------------------------------------------------------------------------------------------------

    def _serve_waiting(self, now: float) -> list[Action]:
        """Offer free blocks to the rooms that wait. Called when blocks become free or a room begins to wait."""
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
        """Repeat the open offer, if any. The encoder answers a repeated offer with the confirmed state."""
        return [offer_message(entry, now)] if entry.state is ReceiverState.OFFERED else []

    # -- failure -------------------------------------------------------------------------------------------------

    def _fail(
        self, entry: ReceiverRoom, reason: str, code: int, now: float, *, notify_peer: bool = True
    ) -> list[Action]:
        if entry.machine.final:
            return []
        offered = entry.state is ReceiverState.OFFERED
        entry.machine.transition_to(ReceiverState.FAILED)
        entry.outcome = failure(reason, code)
        entry.ended = now
        self.tombstones.put(entry.room, entry.outcome, now + TOMBSTONE_SECONDS)
        actions: list[Action] = []
        if offered:
            self.quarantine.put(entry, now)
            entry.blocks = []
        # Blocks of a window that is being copied stay with the copier, which still reads them; on_copied frees them.
        if entry.peer is None:
            actions += self._early_aborts.give_up(entry, reason, self._peers.values(), now)
        elif notify_peer and not entry.last:
            actions.append(abort_message(entry.peer, entry.room, reason))
        actions.append(Ended(entry.room, entry.outcome))
        return actions

    def report(self) -> dict[str, Any]:
        """The number of blocks free, held, in views and in quarantine; of rooms in each state; of unclaimed rooms."""
        return accounts.report(self.allocator, self.rooms, self.views, self.unclaimed)

    def check_integrity(self) -> None:
        """Raise ConnError unless each block is free, held by an open window or a view, or listed in quarantine."""
        accounts.check_integrity(self.allocator, self.rooms, self.views, self.quarantine)
