"""The receiver core alone, against a small model of encoders on a network that loses, repeats and reorders.

The joined machines drive both real cores. Here the other side is a model, so it can do things that the real encoder
never does (lie, be slow for ever, serve a room of another encoder), and one core cannot hide a fault of the other. The
model knows for each offer whether its encoder may still write it. The core knows only the messages that it received.

Each of these faults in the core made a test fail: quarantine was skipped on failure; any confirmation was a proof for
any window; the row count was not compared; the message of another process was a proof; the queue was served from its
tail; free blocks were not offered to waiting rooms; a Drained without an Abort freed blocks; a revoked epoch freed
blocks of a newer one, or counted as unused while it had a healthy window; an offer was not repeated after its
connection was lost; a waiting room had no deadline.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_mm_conn.core.actions import Action, CopyOut, Ended, Send
from sglang_mm_conn.core.blocks import BlockAllocator
from sglang_mm_conn.core.errors import ProtocolError
from sglang_mm_conn.core.language.receiver import ReceiverCore
from sglang_mm_conn.core.language.receiver_room import Peer
from sglang_mm_conn.core.layout import Geometry
from sglang_mm_conn.core.messages import Abort, Announce, Done, Drained, Failed, Init, Message, Progress, Resume
from sglang_mm_conn.core.rooms import new_room_base
from sglang_mm_conn.core.states import Poll

BLOCK_BYTES = 12
CLAIM_TIMEOUT = 20.0
Byte = tuple[str, int]  # room, and which byte of its embedding: what a cell of memory holds
Index = st.integers(0, 63)
Patience = st.sampled_from([5.0, 40.0])


@dataclass
class Offer:
    """Blocks that were offered for one window."""

    room: str
    window: int
    encoder: Encoder
    epoch: int
    blocks: list[int]
    first: int
    tokens: int
    taken: bool = False  # the encoder has received it
    confirmed: bool = False  # written, and never again
    copied: bool = False


@dataclass
class Served:
    """A room at one encoder."""

    window: int = -1  # the last that is confirmed
    rows: int = 0
    current: Offer | None = None
    ended: bool = False
    in_doubt: bool = False


@dataclass
class Encoder:
    """One encoder process of the model."""

    incarnation: str
    session: str
    path: str
    alive: bool = True
    connected: bool = False
    rooms: dict[str, Served] = field(default_factory=dict)
    inbox: list[Message] = field(default_factory=list)
    outbox: list[Message] = field(default_factory=list)
    said: list[Message] = field(default_factory=list)  # all messages on all connections; each stays true


class ReceiverMachine(RuleBasedStateMachine):
    """One rank, and at a time one encoder over shared memory and one over Mooncake."""

    @initialize(
        blocks=st.integers(1, 6), first_offer=st.sampled_from([None, 1, 5]), view_blocks=st.integers(0, 5),
    )  # fmt: skip
    def begin(self, blocks: int, first_offer: int | None, view_blocks: int) -> None:
        self.now = 100.0
        self.blocks, self.first_offer = blocks, first_offer
        self.allocator = BlockAllocator(blocks)
        self.core = ReceiverCore(
            self.allocator, Geometry(BLOCK_BYTES, blocks, 1), first_offer=first_offer, claim_timeout=CLAIM_TIMEOUT,
            max_embedding_bytes=10_000, view_blocks=min(view_blocks, blocks - 1), view_least_bytes=8,
        )  # fmt: skip
        self.view_blocks = min(view_blocks, blocks - 1)
        self.views: list[Offer] = []
        self.memory: list[Byte | None] = [None] * (blocks * BLOCK_BYTES)
        self.sizes: dict[str, tuple[int, int]] = {}  # room: rows, bytes of a row
        self.results: dict[str, list[Byte | None]] = {}
        self.deadlines: dict[str, float] = {}
        self.ended: dict[str, Ended] = {}
        self.polls: dict[str, Poll] = {}
        self.waiting: list[str] = []
        self.offers: list[Offer] = []
        self.copies: list[tuple[CopyOut, Offer]] = []
        self.unproven: list[Encoder] = []  # dead; the core has no proof of it yet
        self.epoch = 0
        self.destroyed = -1
        self.names = 0
        self.encoders: list[Encoder] = []
        for path in ("shm", "mooncake"):
            self.encoders.append(self.new_encoder(path))
            self.connect(self.encoders[-1])

    # -- what can land -------------------------------------------------------------------------------------------

    def may_write(self, offer: Offer) -> bool:
        """Whether bytes of ``offer`` can land now or later, whatever messages were sent."""
        encoder = offer.encoder
        if offer.confirmed or (encoder.path == "mooncake" and offer.epoch <= self.destroyed):
            return False
        served = encoder.rooms.get(offer.room)
        if served is not None and served.ended and not served.in_doubt:
            return False
        return encoder.alive or (encoder.path == "mooncake" and offer.taken)

    def cells(self, offer: Offer) -> list[int]:
        """The place of each byte of the window. Rows are packed, blocks are in the given order."""
        return [
            offer.blocks[byte // BLOCK_BYTES] * BLOCK_BYTES + byte % BLOCK_BYTES
            for byte in range(offer.tokens * self.sizes[offer.room][1])
        ]

    def content(self, offer: Offer) -> list[Byte]:
        row = self.sizes[offer.room][1]
        return [(offer.room, byte) for byte in range(offer.first * row, (offer.first + offer.tokens) * row)]

    def land(self, offer: Offer, share: float = 1.0) -> None:
        written = list(zip(self.cells(offer), self.content(offer), strict=True))
        for cell, byte in written[: int(len(written) * share)]:
            self.memory[cell] = byte

    # -- actions of the core -------------------------------------------------------------------------------------

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                encoder = next((one for one in self.encoders if one.incarnation == action.peer), None)
                assert encoder is not None, "sent to a lost process"
                if isinstance(action.message, Init | Resume):
                    self.see_offer(encoder, action.message)
                if encoder.connected:
                    encoder.inbox.append(action.message)
            elif isinstance(action, CopyOut):
                self.see_copy(action)
            else:
                assert isinstance(action, Ended)
                assert action.room not in self.ended, "a room ended twice"
                self.ended[action.room] = action
                if action.success:
                    self.see_success(action.room)
                else:
                    assert action.reason and 400 <= action.code <= 599
        self.waiting = [room for room in self.waiting if room not in self.ended]
        for room in self.deadlines:
            entry = self.core.rooms.get(room)
            if entry is None or room in self.waiting:
                continue
            idle = not any(offer.room == room and not offer.copied for offer in self.offers)
            if idle and entry.poll() in (Poll.WaitingForInput, Poll.Transferring):
                self.waiting.append(room)

    def see_offer(self, encoder: Encoder, message: Init | Resume) -> None:
        room, row = message.room, self.sizes[message.room][1]
        window = message.window if isinstance(message, Resume) else 0
        first = message.sent_tokens if isinstance(message, Resume) else 0
        offer = Offer(
            room, window, encoder, message.epoch, message.dst_embedding_indices, first, message.allocated_tokens
        )
        assert room in self.deadlines and room not in self.ended, "an offer for a room that no request waits for"
        assert 0 <= message.deadline <= max(0.0, self.deadlines[room] - self.now), "the encoder's deadline is later"
        earlier = [one for one in self.offers if one.room == room]
        if earlier and earlier[-1].window == window:
            same = (earlier[-1].encoder, earlier[-1].epoch, earlier[-1].blocks, earlier[-1].first, earlier[-1].tokens)
            assert same == (encoder, offer.epoch, offer.blocks, first, offer.tokens), "an offer was repeated otherwise"
            return
        assert window == len(earlier) and all(one.copied and one.encoder is encoder for one in earlier)
        assert first == sum(one.tokens for one in earlier), "resumed elsewhere than where the rows end"
        assert 1 <= offer.tokens <= self.sizes[room][0] - first
        assert offer.tokens * row <= len(offer.blocks) * BLOCK_BYTES, "more was offered than there is room for"
        assert window or self.first_offer is None or offer.tokens <= self.first_offer
        assert offer.epoch == self.epoch or encoder.path == "shm", "offered for an epoch that is being revoked"
        ahead = self.waiting[: self.waiting.index(room)] if room in self.waiting else self.waiting
        assert not [one for one in ahead if one not in self.ended], "somebody has waited longer"
        self.waiting = [one for one in self.waiting if one != room]
        self.offers.append(offer)
        self.nothing_is_written_or_read_in_a_block_of_another()

    def see_copy(self, copy: CopyOut) -> None:
        offer = next(one for one in self.offers if (one.room, one.window) == (copy.room, copy.window))
        assert offer.confirmed and not offer.copied, "copied before it was written, or twice"
        assert not any(one.room == copy.room and one.window == copy.window for one, _ in self.copies)
        assert (list(copy.blocks), copy.first_token, copy.tokens) == (offer.blocks, offer.first, offer.tokens)
        assert (copy.total_tokens, copy.row_bytes) == self.sizes[copy.room]
        assert copy.last == (offer.first + offer.tokens == copy.total_tokens)
        if copy.view:
            assert copy.last and copy.window == 0 and copy.total_tokens * copy.row_bytes >= 8
            assert offer.blocks == list(range(offer.blocks[0], offer.blocks[0] + len(offer.blocks))), "in pieces"
            assert not self.waiting, "blocks are kept while somebody waits"
            kept = [one for one, _ in self.copies if one.view]
            held = sum(len(one.blocks) for one in [copy, *kept]) + sum(len(one.blocks) for one in self.views)
            assert held <= self.view_blocks, "views hold more than they may"
        self.copies.append((copy, offer))

    def see_success(self, room: str) -> None:
        tokens, row = self.sizes[room]
        assert self.results[room] == [(room, byte) for byte in range(tokens * row)], "success without every row"
        assert self.core.rooms[room].metadata == room.encode()

    # -- requests ------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.sizes) < 10)
    @rule(rows=st.integers(1, 20), row=st.sampled_from([1, 4, 5, 12]))
    def dispatch(self, rows: int, row: int) -> None:
        self.sizes[new_room_base("5e" * 8)] = (rows, row)

    @precondition(lambda self: self.sizes)
    @rule(index=Index, seconds=Patience)
    def expect(self, index: int, seconds: float) -> None:
        room = list(self.sizes)[index % len(self.sizes)]
        if room not in self.deadlines:
            self.deadlines[room] = self.now + seconds
            self.perform(self.core.expect(room, "http://encoder", self.deadlines[room], self.now))

    @precondition(lambda self: len(self.sizes) < 10)
    @rule(rows=st.integers(1, 20), row=st.sampled_from([4, 5]), encoder=st.integers(0, 1), seconds=Patience)
    def start(self, rows: int, row: int, encoder: int, seconds: float) -> None:
        """A request whose Announce is sent and received at once."""
        self.dispatch(rows, row)
        self.expect(len(self.sizes) - 1, seconds)
        one = self.encoders[encoder]
        self.announce(one, list(self.sizes)[-1])
        if one.outbox:
            self.take(one, one.outbox[-1])

    @precondition(lambda self: self.deadlines)
    @rule(index=Index)
    def abort(self, index: int) -> None:
        room = list(self.deadlines)[index % len(self.deadlines)]
        self.perform(self.core.abort(room, "client gone", 499, self.now))
        assert room in self.ended

    @precondition(lambda self: self.ended)
    @rule(index=Index)
    def forget(self, index: int) -> None:
        self.core.forget(list(self.ended)[index % len(self.ended)])

    # -- what encoders do ----------------------------------------------------------------------------------------

    def new_encoder(self, path: str) -> Encoder:
        self.names += 1
        session = "10.0.0.1:1" if path == "shm" else "10.0.0.1:2"
        return Encoder(f"{path} {self.names}", session, path)

    def say(self, encoder: Encoder, message: Message) -> None:
        if encoder.connected:
            encoder.outbox.append(message)
            encoder.said.append(message)

    def say_announce(self, encoder: Encoder, room: str) -> None:
        tokens, row = self.sizes[room]
        self.say(encoder, Announce(room=room, total_tokens=tokens, row_bytes=row, dtype="float32"))

    def say_failed(self, encoder: Encoder, room: str, *, drained: bool) -> None:
        self.say(encoder, Failed(room=room, reason="broken", code=500, drained=drained))

    def say_truth(self, encoder: Encoder, room: str) -> None:
        served, total = encoder.rooms[room], self.sizes[room][0]
        metadata = room.encode() if served.window == 0 else b""
        if served.rows == total:
            self.say(encoder, Done(room=room, window=served.window, total_tokens=total, metadata=metadata))
        else:
            self.say(encoder, Progress(room=room, window=served.window, sent_tokens=served.rows, metadata=metadata))

    def announce(self, encoder: Encoder, room: str) -> None:
        if room not in encoder.rooms:
            encoder.rooms[room] = Served()
            self.say_announce(encoder, room)

    def hear(self, encoder: Encoder, message: Message) -> None:
        """An encoder handles a message as the protocol requires."""
        if isinstance(message, Abort):
            served = encoder.rooms.setdefault(message.room, Served())
            if not served.in_doubt:
                served.ended = True
                self.say(encoder, Drained(room=message.room))
            return
        assert isinstance(message, Init | Resume)
        served = encoder.rooms[message.room]
        if served.ended:
            self.say_failed(encoder, message.room, drained=not served.in_doubt)
            return
        window = message.window if isinstance(message, Resume) else 0
        if window == served.window + 1 and served.current is None:
            (offer,) = (one for one in self.offers if (one.room, one.window) == (message.room, window))
            offer.taken, served.current = True, offer
        else:
            self.say_truth(encoder, message.room)

    def write(self, encoder: Encoder, room: str) -> None:
        served = encoder.rooms[room]
        offer = served.current
        assert offer is not None
        self.land(offer)
        offer.confirmed, served.current = True, None
        served.window, served.rows = offer.window, served.rows + offer.tokens
        self.say_truth(encoder, room)

    def take(self, encoder: Encoder, message: Message) -> None:
        encoder.outbox.remove(message)
        self.tell(encoder, message)

    def tell(self, encoder: Encoder, message: Message) -> None:
        self.perform(self.core.on_message(encoder.incarnation, message, self.now))  # type: ignore[arg-type]

    def events(self) -> list[Callable[[], object]]:
        """Every event that can happen next. The network keeps no order."""
        found: list[Callable[[], object]] = []
        for encoder in self.encoders:
            found += [partial(self.deliver, encoder, message) for message in encoder.inbox]
            found += [partial(self.take, encoder, message) for message in encoder.outbox]
            found += [partial(self.write, encoder, room) for room in self.writable(encoder)]
        found += [partial(self.finish_copy, index) for index in range(len(self.copies))]
        found += [partial(self.drop_view, index) for index in range(len(self.views))]
        return found

    def deliver(self, encoder: Encoder, message: Message) -> None:
        encoder.inbox.remove(message)
        self.hear(encoder, message)

    @staticmethod
    def writable(encoder: Encoder) -> list[str]:
        return [room for room, served in encoder.rooms.items() if served.current is not None and not served.ended]

    def finish_copy(self, index: int, error: str = "") -> None:
        copy, offer = self.copies.pop(index)
        result = self.results.setdefault(copy.room, [None] * (copy.total_tokens * copy.row_bytes))
        start = copy.first_token * copy.row_bytes
        for at, cell in enumerate(self.cells(offer), start):
            assert result[at] is None, "a row was copied twice"
            result[at] = self.memory[cell]
        assert result[start : start + copy.tokens * copy.row_bytes] == self.content(offer), "wrong bytes"
        offer.copied = True
        # A copy that failed may have got as far as the view, or not.
        view = copy.view and error != "no memory"
        if view:
            self.views.append(offer)
        self.perform(self.core.on_copied(copy.room, copy.window, error, self.now, view=view))

    def drop_view(self, index: int) -> None:
        """The last tensor over a view is released. Until now no other window was written to its blocks."""
        offer = self.views.pop(index)
        assert [self.memory[cell] for cell in self.cells(offer)] == self.content(offer), "a view was overwritten"
        self.perform(self.core.view_released(offer.room, self.now))

    def go_on(self, choices: list[int]) -> None:
        for choice in choices:
            if found := self.events():
                found[choice % len(found)]()
                self.nothing_is_written_or_read_in_a_block_of_another()

    Choices = st.lists(st.integers(0, 63), min_size=1, max_size=12)
    # Three times the same, so that progress is drawn as often as faults.
    go_on_1 = rule(choices=Choices)(go_on)
    go_on_2 = rule(choices=Choices)(lambda self, choices: self.go_on(choices))
    go_on_3 = rule(choices=Choices)(lambda self, choices: self.go_on(choices))

    @precondition(lambda self: self.sizes)
    @rule(index=Index, encoder=st.integers(0, 3))
    def encode(self, index: int, encoder: int) -> None:
        """Nearly always the first encoder. Sometimes two serve one room."""
        self.announce(self.encoders[encoder == 3], list(self.sizes)[index % len(self.sizes)])

    @precondition(lambda self: self.sizes)
    @rule(index=Index)
    def encode_over_mooncake(self, index: int) -> None:
        room = list(self.sizes)[index % len(self.sizes)]
        if room not in self.encoders[0].rooms:
            self.announce(self.encoders[1], room)

    # -- what goes wrong -----------------------------------------------------------------------------------------

    @rule(index=Index, encoder=st.integers(0, 1))
    def message_comes_twice(self, index: int, encoder: int) -> None:
        """An earlier message arrives once more, possibly long after."""
        one = self.encoders[encoder]
        if one.said and one.connected:
            message = one.said[-1 - index % len(one.said)]
            before = set(self.ended)
            self.tell(one, message)
            served = isinstance(message, Progress | Done) and any(offer.room == message.room for offer in self.offers)
            assert not served or before == set(self.ended), "a repeated confirmation ended a room"
        if one.inbox:
            self.hear(one, one.inbox[index % len(one.inbox)])

    @rule(index=Index, share=st.sampled_from([0.3, 1.0]))
    def bytes_land(self, index: int, share: float) -> None:
        """Part of a write lands; its encoder may have been given up long ago."""
        if hot := [offer for offer in self.offers if offer.taken and self.may_write(offer)]:
            self.land(hot[index % len(hot)], share)

    @rule(index=Index, encoder=st.integers(0, 1), in_doubt=st.booleans())
    def write_fails(self, index: int, encoder: int, in_doubt: bool) -> None:
        one = self.encoders[encoder]
        if rooms := self.writable(one):
            room = rooms[index % len(rooms)]
            one.rooms[room].ended = True
            one.rooms[room].in_doubt = in_doubt and one.path == "mooncake"
            self.say_failed(one, room, drained=not one.rooms[room].in_doubt)

    @rule(index=Index, encoder=st.integers(0, 1))
    def encode_fails(self, index: int, encoder: int) -> None:
        one = self.encoders[encoder]
        if rooms := [room for room, served in one.rooms.items() if not served.ended and served.current is None]:
            room = rooms[index % len(rooms)]
            one.rooms[room].ended = True
            self.say_failed(one, room, drained=True)

    @precondition(lambda self: len(self.ended) < len(self.deadlines))
    @rule(
        index=Index,
        encoder=st.integers(0, 1),
        kind=st.sampled_from(["progress", "done", "drained", "refused", "announce"]),
        window=st.integers(-1, 1),
        more=st.integers(-2, 2),
    )
    def lie(self, index: int, encoder: int, kind: str, window: int, more: int) -> None:
        """A false message about an expected room. It may fail the room, but never free a block."""
        rooms = [room for room in self.deadlines if room not in self.ended]
        offered = [offer.room for offer in self.offers if offer.room in rooms and not offer.confirmed]
        rooms = offered if offered and index % 4 else rooms
        room = rooms[index % len(rooms)]
        one = self.encoders[encoder]
        total, row = self.sizes[room]
        offers = [offer for offer in self.offers if offer.room == room]
        current = offers[-1].window if offers else -1
        rows = sum(offer.tokens for offer in offers)
        if kind == "announce":
            lie: Message = Announce(room=room, total_tokens=total + 1, row_bytes=row, dtype="float32")
            if not offers or offers[0].encoder is not one or not one.connected:
                return  # without an offer the core cannot know that it is false
        elif kind == "drained":
            lie = Drained(room=room)
        elif kind == "refused":
            lie = Progress(room=room, window=-1, sent_tokens=0, refused="no", refused_window=max(0, current + window))
        elif kind == "done":
            lie = Done(room=room, window=max(0, current + window), total_tokens=max(1, total + more))
            if window == 0 and more == 0 and rows == total:
                return  # not false, or not to be known as false
        else:
            lie = Progress(room=room, window=current + window, sent_tokens=max(0, rows + more))
            if window == 0 and max(0, rows + more) == rows < total:
                return
        if one.connected:
            before = len(self.copies)
            self.perform(self.core.on_message(one.incarnation, lie, self.now))  # type: ignore[arg-type]
            assert len(self.copies) == before, "rows were copied because of a lie"

    @rule()
    def message_of_a_stranger(self) -> None:
        with pytest.raises(ProtocolError):
            self.core.on_message("stranger", Drained(room="x"), self.now)

    @rule(seconds=st.sampled_from([0.0, 1.0, 6.0, 25.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.perform(self.core.tick(self.now))
        for room, deadline in self.deadlines.items():
            assert room in self.ended or self.now < deadline, "a room outlived its deadline"

    def cut(self, encoder: Encoder) -> None:
        """The connection breaks: everything on its way is lost."""
        encoder.connected = False
        encoder.inbox.clear()
        encoder.outbox.clear()

    def connect(self, encoder: Encoder) -> None:
        self.cut(encoder)
        encoder.connected = True
        epoch = self.epoch if encoder.path == "mooncake" else 0
        peer = Peer(encoder.incarnation, encoder.session, encoder.path, encoder.path == "shm", epoch)
        self.perform(self.core.peer_ready(peer, self.now))
        for room, served in encoder.rooms.items():
            if served.ended:
                self.say_failed(encoder, room, drained=not served.in_doubt)
            elif served.rows < self.sizes[room][0]:
                self.say_announce(encoder, room)

    @rule(index=st.integers(0, 1))
    def reconnect(self, index: int) -> None:
        self.connect(self.encoders[index])

    @rule(index=st.integers(0, 1), cut_only=st.booleans())
    def silence(self, index: int, cut_only: bool) -> None:
        self.cut(self.encoders[index])
        if not cut_only:
            self.perform(self.core.peer_lost(self.encoders[index].incarnation, "silent", self.now))

    @precondition(lambda self: self.names < 6)
    @rule(index=st.integers(0, 1))
    def die(self, index: int) -> None:
        old = self.encoders[index]
        self.cut(old)
        old.alive = False
        self.perform(self.core.peer_lost(old.incarnation, "gone", self.now))
        self.unproven.append(old)
        self.encoders[index] = self.new_encoder(old.path)
        self.connect(self.encoders[index])

    @precondition(lambda self: self.unproven)
    @rule()
    def death_is_proven(self) -> None:
        self.perform(self.core.writer_gone(self.unproven.pop(0).incarnation, self.now))

    @rule()
    def new_epoch(self) -> None:
        """A second engine is created and the first one remains. The encoder is registered for the second."""
        if self.epoch == self.destroyed + 1:
            self.epoch += 1
            self.connect(self.encoders[1])

    @rule()
    def old_epoch_is_revoked(self) -> None:
        old = self.epoch - 1
        session = self.encoders[1].session
        if old <= self.destroyed or self.core.is_in_use(session, old):
            return
        for offer in self.offers:
            if offer.encoder.path == "mooncake" and offer.epoch <= old:
                assert offer.confirmed or offer.room in self.ended, "the epoch of a healthy window was revoked"
        self.destroyed = old
        doubted = set(self.core.quarantine)
        self.perform(self.core.epoch_revoked(session, old, self.now))
        for room in doubted & set(self.core.quarantine):
            last = [offer for offer in self.offers if offer.room == room][-1]
            assert last.encoder.path == "shm" or last.epoch > old, "in doubt though its epoch was revoked"

    # -- what holds ----------------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_written_or_read_in_a_block_of_another(self) -> None:
        if not hasattr(self, "core"):
            return
        taken: set[int] = set()
        for offer in self.offers:
            read = any(one is offer for _, one in self.copies) or any(one is offer for one in self.views)
            if read or self.may_write(offer):
                assert not taken & set(offer.blocks), "a block serves two at once"
                taken |= set(offer.blocks)
        assert not taken & set(self.allocator.free_blocks()), "a block is free while it is written or read"

    @invariant()
    def accounts_are_right_and_no_block_lies_idle_while_somebody_waits(self) -> None:
        if hasattr(self, "core"):
            self.core.check_integrity()
            assert not self.waiting or not self.allocator.free_count

    @invariant()
    def status_never_goes_back(self) -> None:
        for room, entry in self.core.rooms.items() if hasattr(self, "core") else ():
            before, poll = self.polls.get(room, Poll.Bootstrapping), entry.poll()
            assert poll is before if before in (Poll.Failed, Poll.Success) else poll in (Poll.Failed, max(poll, before))
            assert (poll in (Poll.Failed, Poll.Success)) == (room in self.ended)
            self.polls[room] = poll

    # -- the end -------------------------------------------------------------------------------------------------

    def come_to_rest(self) -> None:
        for _ in range(5000):
            found = self.events()
            if not found:
                return
            found[0]()
            self.nothing_is_written_or_read_in_a_block_of_another()
        raise AssertionError("the two sides do not come to rest")

    def teardown(self) -> None:
        """All faults end and every proof comes: every room is finished, every block is free, a new room arrives."""
        if not hasattr(self, "core"):
            return
        for encoder in self.encoders:
            self.connect(encoder)
        self.come_to_rest()
        while self.unproven:
            self.death_is_proven()
        for _ in range(2):  # one that had begun, and one that ends every doubt
            self.new_epoch()
            self.come_to_rest()
            self.old_epoch_is_revoked()
        self.come_to_rest()
        for encoder in self.encoders:
            for room, served in encoder.rooms.items():
                assert served.ended or room in self.ended or room not in self.deadlines, "a room hangs"
        self.time_passes(100.0)
        self.come_to_rest()
        assert set(self.ended) == set(self.deadlines) and not self.copies
        assert self.allocator.free_count == self.blocks, "blocks were never given back"
        assert not self.core.quarantine and not self.core.unclaimed
        self.dispatch(rows=20, row=5)
        room = list(self.sizes)[-1]
        self.expect(len(self.sizes) - 1, 60.0)
        self.announce(self.encoders[1], room)
        self.come_to_rest()
        assert self.ended[room].success, "a new room did not get through after all that"
        for room in self.ended:
            self.core.forget(room)
        assert not self.core.rooms


ReceiverMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestReceiver = ReceiverMachine.TestCase


@pytest.mark.parametrize("seed", range(60))
def test_long_walks_in_which_most_goes_well(seed: int) -> None:
    """The same rules over hundreds of steps: windows follow one another, and faults meet every state of a room."""
    chance = random.Random(seed)
    walk = ReceiverMachine()
    walk.begin(chance.randint(1, 6), chance.choice([None, 1, 5]), chance.randint(0, 5))

    def number() -> int:
        return chance.randrange(1 << 16)

    def side() -> int:
        return chance.randrange(2)

    def patience() -> float:
        return chance.choice([5.0, 40.0])

    def lie() -> None:
        if len(walk.ended) < len(walk.deadlines):
            kind = chance.choice(["progress", "done", "drained", "refused", "announce"])
            walk.lie(number(), side(), kind, chance.choice([-1, 0, 0, 1]), chance.randint(-2, 2))

    def abort_while_all_is_repeated() -> None:
        if under_way := [room for room in walk.deadlines if room not in walk.ended and walk.core.rooms[room].resumes]:
            walk.abort(list(walk.deadlines).index(chance.choice(under_way)))
            for recent in range(20):
                walk.message_comes_twice(recent, side())

    def finish_copy() -> None:
        if walk.copies:
            walk.finish_copy(number() % len(walk.copies), chance.choice(["", "no memory", "checksum"]))

    steps: list[tuple[int, Callable[[], object]]] = [
        (60, lambda: walk.go_on([number() for _ in range(chance.randint(1, 6))])),
        (8, lambda: walk.start(chance.randint(1, 20), chance.choice([1, 4, 5, 12]), side(), patience())),
        (2, lambda: walk.dispatch(chance.randint(1, 20), chance.choice([1, 4, 5, 12]))),
        (3, lambda: walk.sizes and walk.expect(number(), patience())),
        (3, lambda: walk.sizes and walk.encode(number(), chance.randrange(4))),
        (3, lambda: walk.sizes and walk.encode(len(walk.sizes) - 1, 3)),
        (3, lambda: walk.deadlines and walk.abort(len(walk.deadlines) - 1 - chance.randrange(3))),
        (1, lambda: walk.ended and walk.forget(number())),
        (6, lambda: walk.message_comes_twice(number(), side())),
        (3, abort_while_all_is_repeated),
        (4, lambda: walk.bytes_land(number(), chance.random())),
        (2, lambda: walk.write_fails(number(), side(), chance.random() < 0.5)),
        (1, lambda: walk.encode_fails(number(), side())),
        (3, lie),
        (3, lambda: walk.time_passes(chance.choice([0.1, 1.0, 6.0]))),
        (2, finish_copy),
        (2, lambda: walk.reconnect(side())),
        (1, lambda: walk.silence(side(), chance.random() < 0.5)),
        (1, lambda: walk.names < 12 and walk.die(side())),
        (1, lambda: walk.names < 12 and (walk.die(side()), walk.death_is_proven(), walk.bytes_land(0, 1.0))),
        (1, lambda: walk.unproven and walk.death_is_proven()),
        (2, walk.new_epoch),
        (2, walk.old_epoch_is_revoked),
        (2, lambda: (walk.new_epoch(), walk.old_epoch_is_revoked())),
    ]
    for _ in range(300):
        chance.choices([step for _, step in steps], [weight for weight, _ in steps])[0]()
        walk.nothing_is_written_or_read_in_a_block_of_another()
        walk.accounts_are_right_and_no_block_lies_idle_while_somebody_waits()
        walk.status_never_goes_back()
    walk.teardown()
