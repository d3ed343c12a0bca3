"""Owns the records of the encoder side: a registered session, a room, its progress per session, a data call."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from sglang_mm_conn.core.actions import TransferEmbeddingChunk
from sglang_mm_conn.core.errors import ProtocolError
from sglang_mm_conn.core.layout import Geometry, window_extents
from sglang_mm_conn.core.messages import Init, Resume
from sglang_mm_conn.core.outcomes import Outcome
from sglang_mm_conn.core.states import (
    SENDER_TRANSITIONS,
    WINDOW_TRANSITIONS,
    Poll,
    SenderState,
    StateMachine,
    WindowState,
)


@dataclass(frozen=True, kw_only=True)
class RegisteredSession:
    """The registered session of a language rank.

    Attributes:
        mooncake_session_id: host:port, names the session.
        peer: the control connection over which it was registered.
        incarnation: of the rank's process.
        server: incarnation of the language server.
        rank, size: which of how many receiving ranks.
        geometry: the shape of its pool.
        epochs: registered engine epochs that are not revoked.
        number: of the registration.
        most_writes: limit of concurrent writes, so that a session that hangs does not hold every worker.
    """

    mooncake_session_id: str
    peer: str
    incarnation: str
    server: str
    rank: int
    size: int
    geometry: Geometry
    epochs: tuple[int, ...] = (0,)
    number: int = 0
    most_writes: int = 1 << 30


@dataclass(slots=True)
class TransferEmbeddingInfo:
    """Progress of one (room, session). docs/protocol.md says where the names come from.

    Attributes:
        room, mooncake_session_id: which.
        required_dst_info_num: for the original interface only; SenderRoom has the value that counts.
        dst_embedding_indices: the blocks of the current window, in token order.
        allocated_tokens: rows of the current window.
        sent_tokens: rows confirmed so far.
        window: number of the current window.
        epoch: the engine epoch that the current window was offered for.
        src_embedding_indices: for the original interface only: 0, 1, ... one number per block of rows.
        total_tokens: for the original interface only; SenderRoom has the value that counts.
        machine: state of the current window.
    """

    room: str
    mooncake_session_id: str
    required_dst_info_num: int
    dst_embedding_indices: list[int]
    allocated_tokens: int
    sent_tokens: int = 0
    window: int = 0
    epoch: int = 0
    src_embedding_indices: tuple[int, ...] | None = None
    total_tokens: int = 0
    machine: StateMachine[WindowState] = field(
        default_factory=lambda: StateMachine(WINDOW_TRANSITIONS, WindowState.OFFERED)
    )

    @property
    def state(self) -> WindowState:
        return self.machine.state

    @property
    def drained(self) -> bool:
        """No write into the session's blocks is under way or in doubt. If the room is finished, none will come."""
        return self.machine.state not in (WindowState.WRITING, WindowState.IN_DOUBT)

    def same_offer(self, message: Init | Resume) -> bool:
        return (
            self.epoch == message.epoch
            and self.dst_embedding_indices == message.dst_embedding_indices
            and self.allocated_tokens == message.allocated_tokens
        )


class WindowWrite(msgspec.Struct, frozen=True):
    """One data call: write the rows of a window into the blocks of a session.

    Attributes:
        room, session, window: which.
        epoch: the engine epoch to write through.
        blocks: where to, in token order.
        first_token: the first row of the embedding to write.
        tokens: how many rows to write.
    """

    room: str
    session: RegisteredSession
    window: int
    epoch: int
    blocks: tuple[int, ...]
    first_token: int
    tokens: int


@dataclass(slots=True)
class SenderRoom:
    """One room of the encoder side, with all its sessions. Times are in seconds.

    Attributes:
        room: its name.
        server: incarnation of its language server.
        total_tokens: rows of the embedding; ``row_bytes`` and ``dtype`` are of a row.
        deadline: time at which the room fails.
        started: time at which it was announced.
        machine: its state.
        transfer_infos: progress by session id.
        required_dst_info_num: ranks that must send Init; 0: not known yet.
        queue_idx: its transfer queue; None: not complete yet.
        source_at: time at which the embedding was handed over.
        elapsed: seconds from then until its last row was confirmed.
        source: numbers for the original interface, see TransferEmbeddingChunk; None: the embedding is not ready.
        metadata: of the part.
        checksum: of all rows; None: not used.
        unheard_since: time since which no session of its server is registered; None: one is.
        busy: whether a thread serves this room. One thread at a time does, so its windows are written in order.
        outcome: how it ended; None: it is not finished.
    """

    room: str
    server: str
    total_tokens: int
    row_bytes: int
    dtype: str
    deadline: float
    started: float
    machine: StateMachine[SenderState] = field(
        default_factory=lambda: StateMachine(SENDER_TRANSITIONS, SenderState.ANNOUNCED)
    )
    transfer_infos: dict[str, TransferEmbeddingInfo] = field(default_factory=dict)
    required_dst_info_num: int = 0
    queue_idx: int | None = None
    source_at: float = 0.0
    elapsed: float = 0.0
    source: tuple[int, ...] | None = None
    metadata: bytes = b""
    checksum: int | None = None
    unheard_since: float | None = None
    busy: bool = False
    outcome: Outcome | None = None

    @property
    def state(self) -> SenderState:
        return self.machine.state

    def poll(self) -> Poll:
        return {
            SenderState.ANNOUNCED: Poll.Bootstrapping,
            SenderState.READY: Poll.WaitingForInput,
            SenderState.TRANSFERRING: Poll.Transferring,
            SenderState.SUCCESS: Poll.Success,
            SenderState.FAILED: Poll.Failed,
        }[self.state]

    @property
    def offers(self) -> list[tuple[str, TransferEmbeddingInfo]]:
        """(session id, progress) of every session whose window is offered and not yet being written."""
        return [item for item in self.transfer_infos.items() if item[1].state is WindowState.OFFERED]

    @property
    def offered_bytes(self) -> int:
        """Bytes of the offered windows of all language ranks together."""
        return sum(info.allocated_tokens for _, info in self.offers) * self.row_bytes

    @property
    def windows(self) -> int:
        return max((info.window + 1 for info in self.transfer_infos.values()), default=0)

    @property
    def complete(self) -> bool:
        """Whether every rank has sent Init."""
        return 0 < self.required_dst_info_num == len(self.transfer_infos)

    def chunk(self) -> TransferEmbeddingChunk:
        """Work for the room's queue: write the offered windows."""
        assert self.queue_idx is not None and self.source is not None
        return TransferEmbeddingChunk(
            room=self.room,
            queue_idx=self.queue_idx,
            embedding_indices=self.source,
            is_last=True,
            total_tokens=self.total_tokens,
        )

    def unfinished(self, now: float) -> str:
        ranks = f"{len(self.transfer_infos)} of {self.required_dst_info_num or 'unknown'} ranks sent Init"
        return f"not finished after {now - self.started:.1f} s ({ranks})"

    def init_problem(self, session: RegisteredSession, message: Init) -> str:
        """Why the session's first Init is refused; empty if it is accepted."""
        if problem := self.offer_problem(session, message, self.total_tokens):
            return problem
        named = message.required_dst_info_num
        if session.server != self.server:
            return f"the room belongs to language server {self.server}, not {session.server}"
        if named != session.size:
            return f"required_dst_info_num={named}, but the server has {session.size} ranks"
        if self.transfer_infos and named != self.required_dst_info_num:
            return f"required_dst_info_num={named}, but another rank sent {self.required_dst_info_num}"
        if self.complete:
            return f"all {self.required_dst_info_num} ranks have sent Init"
        return ""

    def offer_problem(self, session: RegisteredSession, message: Init | Resume, remaining: int) -> str:
        """Why the offer is refused; empty if it is accepted. No block number or length is used unchecked."""
        if message.epoch not in session.epochs:
            return f"epoch {message.epoch} is not registered, {max(session.epochs)} is the newest"
        if message.allocated_tokens > remaining:
            return f"allocated_tokens={message.allocated_tokens}, but {remaining} rows remain"
        try:
            window_extents(session.geometry, message.dst_embedding_indices, message.allocated_tokens * self.row_bytes)
        except ProtocolError as error:
            return str(error)
        return ""
