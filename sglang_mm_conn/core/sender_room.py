"""Owns the records of the encoder side: a registered session, one room, its progress per session, one data call."""

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
    """One language rank's session, as registered: who speaks for it and the shape of its memory."""

    mooncake_session_id: str
    peer: str  # control peer that registered it
    incarnation: str
    server: str
    rank: int
    size: int
    geometry: Geometry
    epochs: tuple[int, ...] = (0,)  # not revoked
    number: int = 0  # of the registration
    most_writes: int = 1 << 30  # at the same time: a destination that hangs must not hold every worker


@dataclass(slots=True)
class TransferEmbeddingInfo:
    """Progress of one (room, session): its current window, and what is confirmed (the seed's name and fields)."""

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
        """No write into its blocks is under way, or in doubt. Where the room has ended, none is to come either."""
        return self.machine.state not in (WindowState.WRITING, WindowState.IN_DOUBT)

    def same_offer(self, message: Init | Resume) -> bool:
        return (
            self.epoch == message.epoch
            and self.dst_embedding_indices == message.dst_embedding_indices
            and self.allocated_tokens == message.allocated_tokens
        )


class WindowWrite(msgspec.Struct, frozen=True):
    """One data call: rows ``first_token``... of the source into ``blocks`` of ``session``."""

    room: str
    session: RegisteredSession
    window: int
    epoch: int
    blocks: tuple[int, ...]
    first_token: int
    tokens: int


@dataclass(slots=True)
class SenderRoom:
    """One room over all its sessions (``transfer_infos`` by session id)."""

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
    source_at: float = 0.0  # when the embedding was there
    elapsed: float = 0.0  # from then until its last row was confirmed
    source: tuple[int, ...] | None = None  # source blocks; None: the embedding is not there yet
    metadata: bytes = b""
    checksum: int | None = None
    unheard_since: float | None = None  # no session of its server is registered since then
    busy: bool = False  # a thread serves this room; windows of one room are written in order
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
        """By session id, what is offered and not being written yet."""
        return [item for item in self.transfer_infos.items() if item[1].state is WindowState.OFFERED]

    @property
    def offered_bytes(self) -> int:
        """Of all language ranks together."""
        return sum(info.allocated_tokens for _, info in self.offers) * self.row_bytes

    @property
    def windows(self) -> int:
        return max((info.window + 1 for info in self.transfer_infos.values()), default=0)

    @property
    def complete(self) -> bool:
        """Every rank has said Init."""
        return 0 < self.required_dst_info_num == len(self.transfer_infos)

    def chunk(self) -> TransferEmbeddingChunk:
        """Work for the room's queue: write what is offered."""
        assert self.queue_idx is not None and self.source is not None
        return TransferEmbeddingChunk(
            room=self.room,
            queue_idx=self.queue_idx,
            embedding_indices=self.source,
            is_last=True,
            total_tokens=self.total_tokens,
        )

    def unfinished(self, now: float) -> str:
        ranks = f"{len(self.transfer_infos)} of {self.required_dst_info_num or 'unknown'} ranks said Init"
        return f"not finished after {now - self.started:.1f} s ({ranks})"

    def init_problem(self, session: RegisteredSession, message: Init) -> str:
        """Why the session's first Init cannot be taken; empty where it can."""
        if problem := self.offer_problem(session, message, self.total_tokens):
            return problem
        named = message.required_dst_info_num
        if session.server != self.server:
            return f"the room belongs to language server {self.server}, not {session.server}"
        if named != session.size:
            return f"required_dst_info_num={named}, but the server has {session.size} ranks"
        if self.transfer_infos and named != self.required_dst_info_num:
            return f"required_dst_info_num={named}, {self.required_dst_info_num} before"
        if self.complete:
            return f"all {self.required_dst_info_num} ranks have said Init"
        return ""

    def offer_problem(self, session: RegisteredSession, message: Init | Resume, remaining: int) -> str:
        """Why the offer cannot be taken; empty where it can. Nothing is written on an unchecked index or length."""
        if message.epoch not in session.epochs:
            return f"epoch {message.epoch} is over, {max(session.epochs)} is the newest"
        if message.allocated_tokens > remaining:
            return f"allocated_tokens={message.allocated_tokens}, but {remaining} rows remain"
        try:
            window_extents(session.geometry, message.dst_embedding_indices, message.allocated_tokens * self.row_bytes)
        except ProtocolError as error:
            return str(error)
        return ""
