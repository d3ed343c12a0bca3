"""Joins one encoder core and the receiver cores of one language server, and checks their memory.

Nothing happens by itself: a test delivers messages, starts and ends writes and copies, drops connections. Frames pass
the real codec in order, and a dropped connection loses its frames. Each write into a block and each copy out of one
asserts that its window owns the block.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from sglang_mm_conn.core.actions import Action, CopyOut, Ended, Release, Send, TransferEmbeddingChunk
from sglang_mm_conn.core.blocks import BlockAllocator
from sglang_mm_conn.core.encoder.sender import SenderCore
from sglang_mm_conn.core.encoder.sender_room import RegisteredSession, WindowWrite
from sglang_mm_conn.core.errors import ProtocolError
from sglang_mm_conn.core.language.receiver import ReceiverCore
from sglang_mm_conn.core.language.receiver_room import Peer
from sglang_mm_conn.core.layout import Geometry, window_extents
from sglang_mm_conn.core.messages import (
    Abort,
    Init,
    Message,
    Registered,
    Resume,
    decode_from_encoder,
    decode_from_language,
    encode,
)
from sglang_mm_conn.core.outcomes import LANDED, WriteResult, WriteStatus
from sglang_mm_conn.core.rooms import new_room_base
from sglang_mm_conn.core.states import Poll

SERVER = "5e" * 8
ENCODER = "http://encoder:30000"
LIMIT = 1 << 24

Kind = TypeVar("Kind", bound=Message)


def source_of(room: str, nbytes: int) -> bytes:
    """The embedding of ``room``: bytes that no other room has."""
    return random.Random(room).randbytes(nbytes)


def metadata_of(room: str) -> bytes:
    return f"metadata of {room}".encode()


def only(messages: Iterable[Message], kind: type[Kind]) -> list[Kind]:
    return [message for message in messages if isinstance(message, kind)]


def sends(actions: Iterable[Action]) -> list[Message]:
    return [action.message for action in actions if isinstance(action, Send)]


def written(error: str = "", in_doubt: bool = False) -> WriteResult:
    """How a data call ended."""
    if not error:
        return LANDED
    return WriteResult(WriteStatus.IN_DOUBT if in_doubt else WriteStatus.FAILED, error)


@dataclass
class Rank:
    """One language rank: its core, its pool's memory, and its ends of the wire."""

    index: int
    incarnation: str
    session: RegisteredSession
    core: ReceiverCore
    memory: bytearray
    peer: str
    path: str
    connected: bool = True
    inbox: deque[bytes] = field(default_factory=deque)  # frames on their way from the encoder
    outbox: deque[bytes] = field(default_factory=deque)  # frames on their way to the encoder
    copies: deque[CopyOut] = field(default_factory=deque)
    results: dict[str, bytearray] = field(default_factory=dict)
    ended: dict[str, Ended] = field(default_factory=dict)
    polled: dict[str, Poll] = field(default_factory=dict)

    @property
    def session_id(self) -> str:
        return self.session.mooncake_session_id

    def owner(self, block: int) -> object:
        """The owner of ``block``, in quarantine or not; None if it is free."""
        allocator = self.core.allocator
        return allocator._held.get(block, allocator._quarantined.get(block))


class Wire:
    """The encoder, the ranks, and the messages between them."""

    def __init__(
        self,
        *,
        ranks: int = 1,
        blocks: int = 16,
        block_rows: int = 128,
        row_bytes: int = 4,
        regions: int = 1,
        queues: int = 4,
        first_offer: int | None = None,
        claim_timeout: float = 30.0,
        send_timeout: float = 300.0,
        max_embedding_bytes: int = 1 << 30,
        path: str = "shm",
        connect: bool = True,
    ) -> None:
        self.now = 1000.0
        self.row_bytes = row_bytes
        self.queues, self.send_timeout = queues, send_timeout
        self.geometry = Geometry(block_rows * row_bytes, blocks // regions, regions)
        self.path = path
        self.incarnation = "e0" * 8
        self.claim_timeout = claim_timeout
        self.encoder = SenderCore(queues=queues, send_timeout=send_timeout, claim_timeout=claim_timeout)
        self.encoder_ended: dict[str, Ended] = {}
        self.chunks: list[deque[TransferEmbeddingChunk]] = [deque() for _ in range(queues)]
        self.chunk_log: list[TransferEmbeddingChunk] = []
        self.writing: list[WindowWrite] = []
        self.late: list[WindowWrite] = []  # in doubt: their bytes may land at any later time
        self.sizes: dict[str, tuple[int, int]] = {}
        self.to_rank: list[Message] = []  # every message ever delivered, in order
        self.to_encoder: list[Message] = []
        self.sender_polled: dict[str, Poll] = {}
        self._connections = 0
        self.ranks: list[Rank] = []
        for index in range(ranks):
            session = RegisteredSession(
                mooncake_session_id=f"10.0.0.{index + 1}:{17001 + index}",
                peer="none",
                incarnation=f"{index:02x}" * 8,
                server=SERVER,
                rank=index,
                size=ranks,
                geometry=self.geometry,
            )
            core = ReceiverCore(
                BlockAllocator(self.geometry.blocks),
                self.geometry,
                first_offer=first_offer,
                claim_timeout=claim_timeout,
                max_embedding_bytes=max_embedding_bytes,
            )
            memory = bytearray(self.geometry.blocks * self.geometry.block_bytes)
            rank = Rank(index, session.incarnation, session, core, memory, "none", path, connected=False)
            self.ranks.append(rank)
            if connect:
                self.reconnect(rank)
                self.deliver_to_rank(rank)

    @property
    def rank(self) -> Rank:
        return self.ranks[0]

    # -- what the surroundings of the cores do -------------------------------------------------------------------

    def room(self) -> str:
        return new_room_base(SERVER)

    def expect(self, room: str, *ranks: Rank, timeout: float = 60.0) -> None:
        for rank in ranks or self.ranks:
            actions = rank.core.expect(room, ENCODER, self.now + timeout, self.now, len(self.ranks))
            self.perform_rank(rank, actions)

    def announce(self, room: str, tokens: int, row_bytes: int | None = None) -> None:
        row_bytes = row_bytes or self.row_bytes
        self.sizes[room] = (tokens, row_bytes)
        ended_before = room in self.encoder.tombstones
        actions = self.encoder.announce(room, tokens, row_bytes, "float32", self.now)
        if ended_before:  # the caller of announce gets the outcome at once
            (ended,) = actions
            assert isinstance(ended, Ended) and not ended.success
            self.encoder_ended[room] = ended
        else:
            self.perform_encoder(actions)

    def compute(self, room: str) -> None:
        self.perform_encoder(self.encoder.add_source(room, range(3), metadata_of(room), None, self.now))

    def start(self, tokens: int, *, timeout: float = 60.0, row_bytes: int | None = None) -> str:
        """A new room that all ranks expect and whose embedding is ready; nothing is delivered yet."""
        room = self.room()
        self.expect(room, timeout=timeout)
        self.announce(room, tokens, row_bytes)
        self.compute(room)
        return room

    def abort(self, room: str, rank: Rank | None = None, reason: str = "client gone") -> None:
        rank = rank or self.rank
        self.perform_rank(rank, rank.core.abort(room, reason, 499, self.now))

    def tick(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.perform_encoder(self.encoder.tick(self.now))
        for rank in self.ranks:
            self.perform_rank(rank, rank.core.tick(self.now))

    def perform_encoder(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                for rank in self.ranks:
                    if rank.peer == action.peer and rank.connected:
                        rank.inbox.append(encode(action.message))
            elif isinstance(action, TransferEmbeddingChunk):
                self.chunks[action.queue_idx].append(action)
                self.chunk_log.append(action)
            elif isinstance(action, Release):
                assert action.room not in [write.room for write in self.writing], "a source is freed in mid-write"
            else:
                assert isinstance(action, Ended)
                assert action.room not in self.encoder_ended, "a room ended twice on the encoder"
                self.encoder_ended[action.room] = action
        self.check()

    def perform_rank(self, rank: Rank, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                if rank.connected and action.peer == self.incarnation:
                    rank.outbox.append(encode(action.message))
            elif isinstance(action, CopyOut):
                rank.copies.append(action)
            else:
                assert isinstance(action, Ended)
                assert action.room not in rank.ended, "a room ended twice on a rank"
                rank.ended[action.room] = action
                if action.success:
                    tokens, row_bytes = self.sizes[action.room]
                    assert bytes(rank.results[action.room]) == source_of(action.room, tokens * row_bytes)
                    assert rank.core.rooms[action.room].metadata == metadata_of(action.room)
        self.check()

    # -- messages ------------------------------------------------------------------------------------------------

    def deliver_to_encoder(self, rank: Rank) -> Message | None:
        if not rank.outbox:
            return None
        message = decode_from_language(rank.outbox.popleft(), LIMIT)
        self.to_encoder.append(message)
        assert isinstance(message, Init | Resume | Abort)
        try:
            actions = self.encoder.on_message(rank.peer, message, self.now)
        except ProtocolError:
            assert self.encoder.sessions.get(message.mooncake_session_id) is None  # not registered (any more)
        else:
            self.perform_encoder(actions)
        return message

    def deliver_to_rank(self, rank: Rank) -> Message | None:
        if not rank.inbox:
            return None
        message = decode_from_encoder(rank.inbox.popleft(), LIMIT)
        self.to_rank.append(message)
        if isinstance(message, Registered):
            peer = Peer(
                message.incarnation, message.mooncake_session_id, rank.path, rank.path == "shm", urls=(ENCODER,)
            )
            self.perform_rank(rank, rank.core.peer_ready(peer, self.now))
        else:
            self.perform_rank(rank, rank.core.on_message(self.incarnation, message, self.now))  # type: ignore[arg-type]
        return message

    def inject_to_encoder(self, message: Init | Resume | Abort, rank: Rank | None = None) -> list[Message]:
        """Deliver ``message`` before all others. Returns the encoder's answers, which also go onto the wire."""
        actions = self.encoder.on_message((rank or self.rank).peer, message, self.now)
        self.perform_encoder(actions)
        return sends(actions)

    def inject_to_rank(self, message: Message, rank: Rank | None = None) -> list[Message]:
        rank = rank or self.rank
        actions = rank.core.on_message(self.incarnation, message, self.now)  # type: ignore[arg-type]
        self.perform_rank(rank, actions)
        return sends(actions)

    # -- connections ---------------------------------------------------------------------------------------------

    def drop(self, rank: Rank | None = None) -> None:
        """The connection breaks: everything on its way is lost."""
        rank = rank or self.rank
        rank.connected = False
        rank.inbox.clear()
        rank.outbox.clear()

    def reconnect(self, rank: Rank | None = None) -> None:
        """A new connection (a new peer for the encoder), registered there; Registered is on its way."""
        rank = rank or self.rank
        self.drop(rank)
        self._connections += 1
        rank.peer = f"connection-{self._connections}"
        rank.connected = True
        rank.session = replace(rank.session, peer=rank.peer)
        registered = Registered(epoch=0, mooncake_session_id=rank.session_id, incarnation=self.incarnation)
        rank.inbox.append(encode(registered))
        self.perform_encoder(self.encoder.register(rank.session, self.now))

    def silent(self, rank: Rank) -> None:
        """Each side treats the other as lost, as after a long silence."""
        self.drop(rank)
        self.perform_encoder(self.encoder.session_lost(rank.session_id, "silent", self.now))
        self.perform_rank(rank, rank.core.peer_lost(self.incarnation, "silent", self.now))

    def restart_encoder(self) -> None:
        """The encoder process dies and another starts; the ranks have not connected to it."""
        old, self.incarnation = self.incarnation, f"e{self._connections:015x}"
        for rank in self.ranks:
            self.drop(rank)
            self.perform_rank(rank, rank.core.peer_lost(old, "the encoder was restarted", self.now))
        self.encoder = SenderCore(queues=self.queues, send_timeout=self.send_timeout, claim_timeout=self.claim_timeout)
        self.encoder_ended, self.sender_polled = {}, {}
        self.writing.clear()
        for queue in self.chunks:
            queue.clear()
        if self.path == "shm":
            for rank in self.ranks:
                self.perform_rank(rank, rank.core.writer_gone(old, self.now))

    # -- writes and copies ----------------------------------------------------------------------------------------

    def begin_write(self) -> WindowWrite | None:
        """A worker takes a chunk and begins its data call: half of the bytes land at once."""
        for queue in self.chunks:
            while queue:
                chunk = queue.popleft()
                write = self._begin(chunk.room)
                if write is not None:
                    return write
        return None

    def _begin(self, room: str) -> WindowWrite | None:
        write = self.encoder.begin_write(room)
        if write is not None:
            assert write.room not in [other.room for other in self.writing], "two writes of one room at once"
            self.writing.append(write)
            self.land(write, first=True, second=False)
        return write

    def end_write(self, write: WindowWrite, error: str = "", *, in_doubt: bool = False) -> None:
        """The data call returns. Its other half has landed; in doubt it may land later. The worker continues."""
        self.writing.remove(write)
        if in_doubt:
            self.late.append(write)
        elif not error:
            self.land(write, first=False, second=True)
        self.perform_encoder(self.encoder.on_written(write, written(error, in_doubt), self.now))
        self._begin(write.room)

    def land(self, write: WindowWrite, *, first: bool = True, second: bool = True) -> None:
        """Bytes of ``write`` land. P2: only in blocks that the window still owns."""
        rank = next(rank for rank in self.ranks if rank.session_id == write.session.mooncake_session_id)
        tokens, row_bytes = self.sizes[write.room]
        start, nbytes = write.first_token * row_bytes, write.tokens * row_bytes
        assert write.first_token + write.tokens <= tokens
        source = source_of(write.room, tokens * row_bytes)[start : start + nbytes]
        for number, extent in enumerate(window_extents(self.geometry, write.blocks, nbytes)):
            if (number % 2 == 0 and not first) or (number % 2 == 1 and not second):
                continue
            at = extent.region * self.geometry.region_bytes + extent.offset
            rank.memory[at : at + extent.length] = source[extent.start : extent.start + extent.length]
        for block in write.blocks:
            owner = rank.owner(block)
            assert owner == (write.room, write.window), f"window {write.window} was written into {owner}'s block"

    def copy_out(self, rank: Rank | None = None, error: str = "") -> CopyOut | None:
        """A copier finishes the oldest copy."""
        rank = rank or self.rank
        if not rank.copies:
            return None
        copy = rank.copies.popleft()
        for block in copy.blocks:
            assert rank.core.allocator._held.get(block) == (copy.room, copy.window), "copied out of somebody's block"
        result = rank.results.setdefault(copy.room, bytearray(copy.total_tokens * copy.row_bytes))
        for extent in window_extents(self.geometry, copy.blocks, copy.tokens * copy.row_bytes):
            at = extent.region * self.geometry.region_bytes + extent.offset
            to = copy.first_token * copy.row_bytes + extent.start
            result[to : to + extent.length] = rank.memory[at : at + extent.length]
        self.perform_rank(rank, rank.core.on_copied(copy.room, copy.window, error, self.now))
        return copy

    # -- all at once ---------------------------------------------------------------------------------------------

    def deliver(self) -> bool:
        """Deliver until nothing is on its way."""
        progress = False
        # A list, so that every rank gets its message before the next round.
        while any([self.deliver_to_encoder(rank) or self.deliver_to_rank(rank) for rank in self.ranks]):  # noqa: C419
            progress = True
        return progress

    def work(self) -> bool:
        """Make all writes and copies that are possible."""
        progress = False
        while self.writing or self.begin_write():
            self.end_write(self.writing[0])
            progress = True
        for rank in self.ranks:
            while self.copy_out(rank):
                progress = True
        return progress

    def settle(self, until: Callable[[], bool] = lambda: False, limit: int = 20_000) -> None:
        """Deliver, write and copy until nothing is left to do or ``until`` is true; an endless exchange fails."""
        for _ in range(limit):
            busy = False
            for rank in self.ranks:
                if until():
                    return
                busy |= self.deliver_to_encoder(rank) is not None
                if until():
                    return
                busy |= self.deliver_to_rank(rank) is not None
            if not busy:
                busy = self.work()
            if not busy:
                return
        raise AssertionError("the two sides do not come to rest")

    def check(self) -> None:
        """Holds after every step: accounts are right, and no poll value goes back."""
        for rank in self.ranks:
            rank.core.check_integrity()
            for room, entry in rank.core.rooms.items():
                self._monotonic(rank.polled, room, entry.poll())
        for room, sender_entry in self.encoder.rooms.items():
            self._monotonic(self.sender_polled, room, sender_entry.poll())

    @staticmethod
    def _monotonic(polled: dict[str, Poll], room: str, value: Poll) -> None:
        before = polled.get(room, Poll.Bootstrapping)
        assert before not in (Poll.Failed, Poll.Success) or value is before, "a final state changed"
        assert value is Poll.Failed or value >= before, f"poll went back from {before} to {value}"
        polled[room] = value

    def succeeded(self, room: str) -> bool:
        return (
            room in self.encoder_ended
            and self.encoder_ended[room].success
            and all(room in rank.ended and rank.ended[room].success for rank in self.ranks)
        )

    def assert_baseline(self) -> None:
        """Every room is finished and has left a tombstone only, and every block is free."""
        assert not self.encoder.rooms
        for rank in self.ranks:
            assert not rank.core.quarantine and not rank.core.unclaimed
            assert rank.core.allocator.free_count == self.geometry.blocks
            for room in list(rank.core.rooms):
                rank.core.forget(room)
            assert not rank.core.rooms
