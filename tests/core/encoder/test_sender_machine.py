"""The sender core alone, against a small model of language ranks that send anything, twice, late or never.

The joined machines drive both real cores. Here a rank of the model may offer any blocks, name any window and count,
and repeat any message. The model decides on its own which offers fit: exactly those may be written, each of them once.

Each of these faults in the core made a test fail: the window or the confirmed count of a resume, or the length of an
offer, was not checked; a second Init was accepted; a resume queued no work; Drained was sent during a write or in
doubt; a rank was not notified of a failure; the queue was computed again; a source was released during a write; two
workers served one room; an offer prolonged the deadline, or did not shorten it; a rank got more than its share of
writes; the end of a write did not queue the next room.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_mm_conn.core.actions import Action, Ended, Release, Send, TransferEmbeddingChunk
from sglang_mm_conn.core.encoder.sender import SenderCore
from sglang_mm_conn.core.encoder.sender_room import RegisteredSession, WindowWrite
from sglang_mm_conn.core.errors import ProtocolError
from sglang_mm_conn.core.layout import Geometry
from sglang_mm_conn.core.messages import Abort, Announce, Done, Drained, Failed, Init, Message, Progress, Resume
from sglang_mm_conn.core.rooms import new_room_base
from sglang_mm_conn.core.states import Poll
from tests.core.harness import written

BLOCKS, BLOCK_BYTES = 8, 12
QUEUES = 5
SEND_TIMEOUT, CLAIM_TIMEOUT = 60.0, 20.0
CHECKSUM = 7
Index = st.integers(0, 63)


@dataclass
class Rank:
    """A language rank of the model. ``peer`` is its connection, empty if it is not registered."""

    session: str
    server: str
    size: int
    most_writes: int
    number: int
    peer: str = ""
    lives: int = 0
    epoch: int = 0
    epochs: tuple[int, ...] = (0,)

    @property
    def incarnation(self) -> str:
        return f"{self.session} life {self.lives}"


@dataclass
class Part:
    """A room at one rank: the window that it offered last, and the confirmed rows."""

    offer: Init | Resume
    window: int = 0
    state: str = "offered"  # then writing, then partial or done
    confirmed_window: int = -1
    rows: int = 0


@dataclass
class Room:
    name: str
    server: str
    total: int
    row: int
    announced: bool = False
    deadline: float = 0.0
    source: bool = False
    parts: dict[str, Part] = field(default_factory=dict)
    ended: bool | None = None  # success, where it has
    released: bool = False
    queue: int | None = None

    @property
    def open(self) -> bool:
        return self.announced and self.ended is None


class SenderMachine(RuleBasedStateMachine):
    """One encoder, a language server of one or two ranks, and another one."""

    @initialize(ranks=st.integers(1, 2), most_writes=st.integers(1, 2))
    def begin(self, ranks: int, most_writes: int) -> None:
        self.now = 100.0
        self.core = SenderCore(queues=QUEUES, send_timeout=SEND_TIMEOUT, claim_timeout=CLAIM_TIMEOUT)
        ours, theirs = "aa" * 8, "bb" * 8
        self.ranks = [Rank(f"10.0.0.{n}:{17001 + n}", ours, ranks, most_writes, n) for n in range(ranks)]
        self.ranks.append(Rank("10.0.0.9:18009", theirs, 1, most_writes, 9))
        self.connections = 0
        self.speaks: dict[str, tuple[Rank, str]] = {}  # connection -> rank, incarnation
        self.rooms: dict[str, Room] = {}
        self.chunks: list[str] = []
        self.writes: list[WindowWrite] = []
        self.doubts: dict[tuple[str, str], int] = {}  # room, session -> epoch through which bytes may still land
        self.drained: set[tuple[str, str, str]] = set()  # room, session, incarnation
        self.history: list[tuple[Rank, Init | Resume | Abort]] = []
        self.polls: dict[str, Poll] = {}
        for rank in self.ranks:
            self.register(rank)

    # -- what the model knows ------------------------------------------------------------------------------------

    def complete(self, room: Room) -> bool:
        return len(room.parts) == self.ranks_of(room)[0].size

    def ranks_of(self, room: Room) -> list[Rank]:
        return [rank for rank in self.ranks if rank.server == room.server]

    def fits(self, rank: Rank, message: Init | Resume) -> bool:
        """Whether this offer is the next one of its (room, session), and can be written."""
        room = self.rooms.get(message.room)
        if room is None or not room.open or room.server != rank.server:
            return False
        part = room.parts.get(rank.session)
        rows = 0
        if isinstance(message, Resume):
            if part is None or part.state != "partial":
                return False
            if (message.window, message.sent_tokens) != (part.window + 1, part.rows):
                return False
            rows = part.rows
        elif part is not None or message.required_dst_info_num != rank.size:
            return False
        blocks = message.dst_embedding_indices
        return (
            message.epoch in rank.epochs
            and len(set(blocks)) == len(blocks)
            and all(block < BLOCKS for block in blocks)
            and message.allocated_tokens * room.row <= len(blocks) * BLOCK_BYTES
            and message.allocated_tokens <= room.total - rows
        )

    # -- actions of the core -------------------------------------------------------------------------------------

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Ended):
                room = self.rooms[action.room]
                assert room.ended is None, "a room ended twice"
                room.ended = action.success
                if action.success:
                    assert self.complete(room) and all(part.state == "done" for part in room.parts.values())
                else:
                    assert action.reason and 400 <= action.code <= 599
                    self.everybody_hears(room, actions)
        for action in actions:
            if isinstance(action, Send):
                rank, incarnation = self.speaks[action.peer]
                self.said(rank, incarnation, action.message)
            elif isinstance(action, TransferEmbeddingChunk):
                room = self.rooms[action.room]
                assert room.open and room.source and self.complete(room)
                queue = sum(int(session.rpartition(":")[2]) for session in room.parts) % QUEUES
                assert action.queue_idx == queue and room.queue in (None, queue)
                room.queue = queue
                self.chunks.append(action.room)
            elif isinstance(action, Release):
                room = self.rooms[action.room]
                assert room.ended is not None and not room.released
                assert not [write for write in self.writes if write.room == action.room], "released in mid-write"
                room.released = True

    def everybody_hears(self, room: Room, actions: list[Action]) -> None:
        ends = [one for one in actions if isinstance(one, Send) and isinstance(one.message, Failed | Drained)]
        told = {one.peer for one in ends}
        for rank in self.ranks_of(room):
            writing = [write for write in self.writes if (write.room, write.session.peer) == (room.name, rank.peer)]
            assert not rank.peer or rank.peer in told or writing, "a rank was not notified that the room failed"

    def said(self, rank: Rank, incarnation: str, message: Message) -> None:
        """Every message of the core is true, and goes only to ranks that it concerns."""
        assert isinstance(message, Announce | Progress | Done | Failed | Drained)
        room = self.rooms.get(message.room)
        if room is None:
            assert isinstance(message, Failed | Drained) and getattr(message, "drained", True)
            return
        part = room.parts.get(rank.session)
        if isinstance(message, Announce):
            assert rank.server == room.server and room.open
            assert (message.total_tokens, message.row_bytes) == (room.total, room.row)
        elif isinstance(message, Progress):
            confirmed = (part.confirmed_window, part.rows) if part else (-1, 0)
            assert (message.window, message.sent_tokens) == confirmed, "wrong confirmed state"
            assert message.refused or rank.server == room.server
            assert message.metadata == (b"m" if confirmed[0] == 0 and not message.refused else b"")
        elif isinstance(message, Done):
            assert part is not None and part.state == "done" and part.rows == room.total, "done before all was written"
            assert (message.window, message.total_tokens, message.checksum) == (part.window, room.total, CHECKSUM)
        elif isinstance(message, Drained) or message.drained:
            assert (room.name, rank.session) not in self.doubts, "called drained while bytes may land"
            for write in self.writes:
                key = (write.room, write.session.mooncake_session_id, write.session.incarnation)
                assert key != (room.name, rank.session, incarnation), "called drained in mid-write"
            assert not room.open
            if room.ended is not None:  # else no rank knows it, and the next message may be an Announce
                self.drained.add((room.name, rank.session, incarnation))

    # -- encodes -------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.rooms) < 10)
    @rule(total=st.integers(1, 20), row=st.sampled_from([1, 4, 5, 12]), other=st.integers(0, 5), announce=st.booleans())
    def new_room(self, total: int, row: int, other: int, announce: bool) -> None:
        server = self.ranks[-1 if other == 0 else 0].server
        room = Room(new_room_base(server), server, total, row)
        self.rooms[room.name] = room
        if announce:
            self.announce(room)

    def pick(self, index: int) -> Room:
        """Mostly an open room, sometimes one that is being written (it may be finished), or any."""
        rooms = [room for room in self.rooms.values() if room.open] if index % 4 > 1 else []
        if index % 4 == 1:
            rooms = [self.rooms[write.room] for write in self.writes]
        rooms = rooms or list(self.rooms.values())
        return rooms[index // 4 % len(rooms)]

    def announce(self, room: Room) -> None:
        actions = self.core.announce(room.name, room.total, room.row, "float32", self.now)
        if room.announced:
            assert room.ended is not None or not actions, "announced again"
        elif room.ended is None:
            room.announced, room.deadline = True, self.now + SEND_TIMEOUT
            told = {action.peer for action in actions if isinstance(action, Send)}
            assert told == {rank.peer for rank in self.ranks_of(room) if rank.peer}
        if room.ended is not None:  # given up before: only the caller of announce is notified, at once
            (ended,) = actions
            assert isinstance(ended, Ended) and (not ended.success or room.ended)
        else:
            self.perform(actions)

    @precondition(lambda self: self.rooms)
    @rule(index=Index)
    def announce_one(self, index: int) -> None:
        room = self.pick(index)
        if not room.announced or room.ended is None:
            self.announce(room)

    @precondition(lambda self: self.rooms)
    @rule(index=Index)
    def embedding_is_there(self, index: int) -> None:
        room = self.pick(index)
        if room.announced and not room.source:
            actions = self.core.add_source(room.name, [3, 1], b"m", CHECKSUM, self.now)
            room.source = room.ended is None
            chunks = [action for action in actions if isinstance(action, TransferEmbeddingChunk)]
            assert len(chunks) == (room.open and self.complete(room)), "a complete room was not queued once"
            self.perform(actions)

    @precondition(lambda self: self.rooms)
    @rule(index=Index)
    def encode_fails(self, index: int) -> None:
        room = self.pick(index)
        self.perform(self.core.fail(room.name, "out of memory", 500, self.now))
        assert room.ended is not None

    # -- what ranks say ------------------------------------------------------------------------------------------

    def say(self, rank: Rank, message: Init | Resume) -> None:
        """Only an offer that fits is accepted. Any other gets the confirmed state at once, and changes nothing."""
        self.history.append((rank, message))
        if not rank.peer:
            with pytest.raises(ProtocolError):
                self.core.on_message("nobody", message, self.now)
            return
        room = self.rooms.get(message.room)
        fits = self.fits(rank, message)
        if room is not None and room.open and room.server == rank.server:
            room.deadline = min(room.deadline, self.now + message.deadline)
        actions = self.core.on_message(rank.peer, message, self.now)
        answers = [one.message for one in actions if isinstance(one, Send) and one.peer == rank.peer]
        chunks = [one for one in actions if isinstance(one, TransferEmbeddingChunk)]
        if fits:
            assert room is not None and not answers
            if isinstance(message, Init):
                room.parts[rank.session] = Part(message)
            else:
                part = room.parts[rank.session]
                part.offer, part.window, part.state = message, message.window, "offered"
            assert len(chunks) == (room.source and self.complete(room)), "an offer that fits queued no work"
        else:
            (answer,) = answers
            assert isinstance(answer, Progress | Done | Failed) and not chunks
            if room is None or not room.open:
                assert isinstance(answer, Failed | Done)
            elif isinstance(message, Resume):
                part_of = room.parts.get(rank.session)
                repeated = part_of is not None and part_of.offer == message
                assert isinstance(answer, Done) or bool(answer.refused) != repeated  # type: ignore[union-attr]
        self.perform(actions)

    def next_offer(self, rank: Rank, room: Room, blocks: list[int], tokens: int) -> Init | Resume | None:
        """The offer that an honest rank would send now."""
        part = room.parts.get(rank.session)
        if part is not None and part.state != "partial":
            return None
        rows = part.rows if part else 0
        tokens = max(1, min(tokens, len(blocks) * BLOCK_BYTES // room.row, room.total - rows))
        return self.offer(rank, room, part.window + 1 if part else 0, blocks, rows, tokens)

    @staticmethod
    def offer(
        rank: Rank, room: Room, window: int, blocks: list[int], rows: int, tokens: int, deadline: float = 30.0,
        epoch: int | None = None, ranks: int | None = None,
    ) -> Init | Resume:  # fmt: skip
        epoch = rank.epoch if epoch is None else epoch
        if window == 0:
            return Init(
                room=room.name, mooncake_session_id=rank.session, epoch=epoch, dst_embedding_indices=blocks,
                allocated_tokens=tokens, required_dst_info_num=ranks or rank.size, deadline=deadline,
            )  # fmt: skip
        return Resume(
            room=room.name, mooncake_session_id=rank.session, epoch=epoch, window=window, dst_embedding_indices=blocks,
            sent_tokens=rows, allocated_tokens=tokens, deadline=deadline,
        )  # fmt: skip

    GoodBlocks = st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=5, unique=True)

    def honest_offers(self, index: int, blocks: list[int], tokens: int) -> None:
        if not self.rooms:
            return
        room = self.pick(index)
        for rank in self.ranks_of(room):
            message = self.next_offer(rank, room, blocks, tokens) if room.announced and rank.peer else None
            if message is not None:
                self.say(rank, message)

    honest_1 = rule(index=Index, blocks=GoodBlocks, tokens=st.integers(1, 20))(honest_offers)
    honest_2 = rule(index=Index, blocks=GoodBlocks, tokens=st.integers(1, 20))(
        lambda self, index, blocks, tokens: self.honest_offers(index, blocks, tokens)
    )

    @precondition(lambda self: self.rooms)
    @rule(
        index=Index,
        rank=st.integers(0, 2),
        wrong=st.sampled_from(["window", "rows", "tokens", "blocks", "epoch", "ranks", "room", "nothing"]),
        by=st.sampled_from([-2, -1, 1, 2]),
        deadline=st.sampled_from([3.0, 30.0, 300.0]),
        blocks=st.lists(st.integers(0, BLOCKS), min_size=1, max_size=5),
    )
    def odd_offer(self, index: int, rank: int, wrong: str, by: int, deadline: float, blocks: list[int]) -> None:
        """An offer that differs little from an honest one, of a rank of any server."""
        room = self.pick(index)
        one = self.ranks[rank % len(self.ranks)]
        part = room.parts.get(one.session)
        window, rows = (part.window + 1, part.rows) if part else (index % 2, 0)
        if wrong == "room":
            room = Room(new_room_base(one.server), one.server, 10, 4)
        blocks = blocks if wrong == "blocks" else list(dict.fromkeys(block % BLOCKS for block in blocks))
        most = min(len(blocks) * BLOCK_BYTES // room.row, room.total - rows)
        message = self.offer(
            one, room,
            max(0, window + by) if wrong == "window" else window,
            blocks,
            max(0, rows + by) if wrong == "rows" else rows,
            max(1, most + by if wrong == "tokens" else min(most, 3)),
            deadline,
            max(0, one.epoch + by) if wrong == "epoch" else None,
            max(1, one.size + by) if wrong == "ranks" else None,
        )  # fmt: skip
        self.say(one, message)

    @precondition(lambda self: self.history)
    @rule(index=Index)
    def said_again(self, index: int) -> None:
        """An earlier message arrives once more."""
        rank, message = self.history[-1 - index % len(self.history)]
        if isinstance(message, Abort):
            self.say_abort(rank, message)
        else:
            self.say(rank, message)

    def say_abort(self, rank: Rank, message: Abort) -> None:
        self.history.append((rank, message))
        room = self.rooms[message.room]
        if not rank.peer or rank.server != room.server:
            with pytest.raises(ProtocolError):
                self.core.on_message(rank.peer or "nobody", message, self.now)
            return
        if not room.announced and room.ended is None:
            room.ended = False
        actions = self.core.on_message(rank.peer, message, self.now)
        answered = any(isinstance(one, Send) and one.message == Drained(room=room.name) for one in actions)
        writing = any(
            (write.room, write.session.mooncake_session_id) == (room.name, rank.session) for write in self.writes
        )
        doubtful = (room.name, rank.session) in self.doubts
        assert answered or writing or doubtful, "an abort was not answered"
        self.perform(actions)
        assert room.ended is not None

    @precondition(lambda self: self.rooms)
    @rule(index=Index, rank=st.integers(0, 2))
    def abort(self, index: int, rank: int) -> None:
        room, one = self.pick(index), self.ranks[rank % len(self.ranks)]
        self.say_abort(one, Abort(room=room.name, mooncake_session_id=one.session, reason="client gone"))

    # -- ranks come and go ---------------------------------------------------------------------------------------

    def register(self, rank: Rank) -> None:
        self.connections += 1
        rank.peer = f"connection {self.connections}"
        self.speaks[rank.peer] = (rank, rank.incarnation)
        session = RegisteredSession(
            mooncake_session_id=rank.session,
            peer=rank.peer,
            incarnation=rank.incarnation,
            server=rank.server,
            rank=rank.number,
            size=rank.size,
            geometry=Geometry(BLOCK_BYTES, BLOCKS // 2, 2),
            epochs=rank.epochs,
            number=self.connections,
            most_writes=rank.most_writes,
        )
        actions = self.core.register(session, self.now)
        self.perform(actions)
        told = {one.message.room for one in actions if isinstance(one, Send) and isinstance(one.message, Announce)}
        assert told == {room.name for room in self.rooms.values() if room.open and room.server == rank.server}

    @rule(rank=st.integers(0, 2), restarted=st.integers(0, 3))
    def connect(self, rank: int, restarted: int) -> None:
        one = self.ranks[rank % len(self.ranks)]
        if restarted == 0:
            one.lives += 1
            one.peer = ""
        self.register(one)
        if restarted == 0:
            for room in self.rooms.values():
                assert not room.open or one.session not in room.parts, "a restarted rank inherited a room"

    @rule(rank=st.integers(0, 2))
    def silence(self, rank: int) -> None:
        one = self.ranks[rank % len(self.ranks)]
        one.peer = ""
        self.perform(self.core.session_lost(one.session, "silent", self.now))
        for room in self.rooms.values():
            assert not room.open or one.session not in room.parts, "a lost rank's room continues"

    @rule(rank=st.integers(0, 2))
    def new_epoch(self, rank: int) -> None:
        """A rank replaces its engine. The old epoch remains until no healthy window needs it."""
        one = self.ranks[rank % len(self.ranks)]
        if len(one.epochs) == 1 and one.peer:
            one.epoch += 1
            one.epochs = (*one.epochs, one.epoch)
            self.register(one)

    @rule(rank=st.integers(0, 2))
    def old_epoch_is_revoked(self, rank: int) -> None:
        one = self.ranks[rank % len(self.ranks)]
        parts = [room.parts.get(one.session) for room in self.rooms.values() if room.open]
        healthy = [part for part in parts if part and part.state in ("offered", "writing")]
        if len(one.epochs) == 2 and one.peer and not [part for part in healthy if part.offer.epoch < one.epoch]:
            one.epochs = (one.epoch,)
            self.core.retire(one.session, one.epoch - 1)
            for key in [key for key, epoch in self.doubts.items() if key[1] == one.session and epoch < one.epoch]:
                del self.doubts[key]

    # -- workers -------------------------------------------------------------------------------------------------

    def begin_writes(self, room_name: str) -> None:
        write = self.core.begin_write(room_name)
        if write is None:
            return
        room = self.rooms[room_name]
        rank = next(rank for rank in self.ranks if rank.session == write.session.mooncake_session_id)
        part = room.parts[rank.session]
        assert room.open and room.source and self.complete(room), "a room is written too early or too late"
        assert not [one for one in self.writes if one.room == room_name], "two writes of one room at once"
        busy = [one for one in self.writes if one.session.mooncake_session_id == rank.session]
        assert len(busy) < rank.most_writes
        assert rank.peer and write.session.incarnation == rank.incarnation
        assert (room_name, rank.session, rank.incarnation) not in self.drained, "written after it was called drained"
        assert part.state == "offered", "a window is written twice"
        offer = part.offer
        assert (write.window, write.epoch) == (part.window, offer.epoch)
        assert list(write.blocks) == offer.dst_embedding_indices
        assert (write.first_token, write.tokens) == (part.rows, offer.allocated_tokens)
        part.state = "writing"
        self.writes.append(write)

    @rule(index=Index)
    def worker_takes_a_chunk(self, index: int) -> None:
        if self.chunks:
            self.begin_writes(self.chunks.pop(index % len(self.chunks)))

    @rule(index=Index, error=st.sampled_from(["", "", "", "", "broken", "in doubt"]))
    def write_ends(self, index: int, error: str) -> None:
        if not self.writes:
            return
        write = self.writes.pop(index % len(self.writes))
        room = self.rooms[write.room]
        session = write.session.mooncake_session_id
        part = room.parts[session]
        was_open = room.open
        if error == "in doubt":
            self.doubts[write.room, session] = write.epoch
        elif not error and was_open:
            part.rows += write.tokens
            part.confirmed_window = write.window
            part.state = "done" if part.rows == room.total else "partial"
        actions = self.core.on_written(write, written(error, error == "in doubt"), self.now)
        rank = next(rank for rank in self.ranks if rank.session == session)
        if rank.peer and rank.incarnation == write.session.incarnation:
            kind = (Failed if error else Progress | Done) if was_open or error else Drained
            told = [one for one in actions if isinstance(one, Send) and one.peer == rank.peer]
            assert any(isinstance(one.message, kind) for one in told), "the rank was not notified of the end of a write"
        self.perform(actions)
        assert not error or room.ended is False or not was_open
        self.begin_writes(write.room)

    @rule(seconds=st.sampled_from([0.0, 1.0, 7.0, 25.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        before = [room for room in self.rooms.values() if room.open]
        self.perform(self.core.tick(self.now))
        for room in before:
            due = self.now >= room.deadline
            assert not (due and room.open), "a room outlived its deadline"
            unheard = not any(rank.peer for rank in self.ranks_of(room))
            assert due or unheard or room.open, "a room ended before its time"

    # -- what holds ----------------------------------------------------------------------------------------------

    @invariant()
    def exactly_the_rooms_that_are_not_released_are_kept(self) -> None:
        if hasattr(self, "core"):
            kept = {room.name for room in self.rooms.values() if room.announced and not room.released}
            assert set(self.core.rooms) == kept

    @invariant()
    def status_never_goes_back(self) -> None:
        for name, entry in self.core.rooms.items() if hasattr(self, "core") else ():
            before, poll = self.polls.get(name, Poll.Bootstrapping), entry.poll()
            assert poll is before if before in (Poll.Failed, Poll.Success) else poll in (Poll.Failed, max(poll, before))
            self.polls[name] = poll

    # -- the end -------------------------------------------------------------------------------------------------

    def come_to_rest(self) -> None:
        while self.chunks or self.writes:
            self.worker_takes_a_chunk(0)
            self.write_ends(0, "")

    def teardown(self) -> None:
        """All faults end: no work was forgotten, every open room arrives, and nothing remains of any."""
        if not hasattr(self, "core"):
            return
        for rank in self.ranks:
            self.register(rank)
        self.new_room(20, 5, 1, True)
        fresh = list(self.rooms.values())[-1]
        self.come_to_rest()
        self.time_passes(0.0)  # passes on the turns of those that gave theirs up
        self.come_to_rest()
        for room in self.rooms.values():
            ready = room.open and room.source and self.complete(room)
            assert not ready or not [part for part in room.parts.values() if part.state == "offered"], "work forgotten"
        left = [room for room in self.rooms.values() if room.open]
        for room in left:
            if not room.source:
                room.source = True
                self.perform(self.core.add_source(room.name, [3, 1], b"m", CHECKSUM, self.now))
            for _ in range(2 * room.total + 2):
                for rank in self.ranks_of(room):
                    message = self.next_offer(rank, room, [5, 2], 20) if room.open else None
                    if message is not None:
                        self.say(rank, message)
                self.come_to_rest()
        assert all(room.ended for room in left) and fresh.ended
        assert not self.core.rooms and not self.core.write_slots.writes and not self.core.write_slots.deferred
        for room in self.rooms.values():
            assert room.released or not room.announced
            for rank in self.ranks_of(room):  # a repeated offer gets the outcome, and a proof
                self.say(rank, self.offer(rank, room, 1, [0], 1, 1))


SenderMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestSender = SenderMachine.TestCase


@pytest.mark.parametrize("seed", range(60))
def test_long_walks_in_which_most_goes_well(seed: int) -> None:
    """The same rules over hundreds of steps: windows follow one another, and faults meet every state of a room."""
    chance = random.Random(seed)
    walk = SenderMachine()
    walk.begin(chance.randint(1, 2), chance.randint(1, 2))

    def number() -> int:
        return chance.randrange(1 << 16)

    def blocks() -> list[int]:
        return chance.sample(range(BLOCKS), chance.randint(1, 5))

    def odd() -> None:
        if not walk.rooms:
            return
        wrong = chance.choice(["window", "rows", "tokens", "blocks", "epoch", "ranks", "room", "nothing"])
        some = chance.choices(range(BLOCKS + 1), k=chance.randint(1, 5))
        walk.odd_offer(number(), number(), wrong, chance.choice([-2, -1, 1, 2]), chance.choice([3.0, 30.0, 99.0]), some)

    steps: list[tuple[int, Callable[[], object]]] = [
        (8, lambda: walk.new_room(chance.randint(1, 20), chance.choice([1, 4, 5, 12]), number(), number() % 4 > 0)),
        (3, lambda: walk.rooms and walk.announce_one(number())),
        (12, lambda: walk.rooms and walk.embedding_is_there(number())),
        (30, lambda: walk.honest_offers(number(), blocks(), chance.randint(1, 20))),
        (30, lambda: walk.worker_takes_a_chunk(number())),
        (30, lambda: walk.write_ends(number(), "")),
        (2, lambda: walk.write_ends(number(), chance.choice(["broken", "in doubt"]))),
        (6, odd),
        (6, lambda: walk.history and walk.said_again(chance.choice([number(), number() % 8]))),
        (2, lambda: walk.rooms and walk.abort(number(), number())),
        (1, lambda: walk.rooms and walk.encode_fails(number())),
        (2, lambda: walk.connect(number(), 1)),
        (1, lambda: walk.connect(number(), number() % 4)),
        (1, lambda: walk.silence(number())),
        (2, lambda: walk.new_epoch(number())),
        (2, lambda: walk.old_epoch_is_revoked(number())),
        (3, lambda: walk.time_passes(chance.choice([0.1, 1.0, 5.0]))),
    ]
    for _ in range(300):
        chance.choices([step for _, step in steps], [weight for weight, _ in steps])[0]()
        walk.exactly_the_rooms_that_are_not_released_are_kept()
        walk.status_never_goes_back()
    walk.teardown()
