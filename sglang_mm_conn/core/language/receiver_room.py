"""Owns the records of the language side: one encoder process, and one room."""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang_mm_conn.core.actions import CopyOut, Send
from sglang_mm_conn.core.messages import Abort, Announce, Done, Drained, Failed, Progress
from sglang_mm_conn.core.outcomes import Outcome
from sglang_mm_conn.core.states import RECEIVER_TRANSITIONS, Poll, ReceiverState, StateMachine
from sglang_mm_conn.core.texts import as_text

RoomMessage = Announce | Progress | Done | Failed | Drained


@dataclass(frozen=True)
class Peer:
    """One registered encoder process.

    Attributes:
        incarnation: of the process.
        mooncake_session_id: the session of this rank that it is registered with.
        data_path: its name, for logs.
        exclusive_lock: whether the process locks its writer slot, so that a free lock proves its end.
        epoch: the engine epoch that it is registered for.
        urls: of its encoder.
    """

    incarnation: str
    mooncake_session_id: str
    data_path: str
    exclusive_lock: bool
    epoch: int = 0
    urls: tuple[str, ...] = ()

    def writes_through(self, mooncake_session_id: str, epoch: int) -> bool:
        """Whether the process writes through an epoch of this session that is at most ``epoch``."""
        return self.mooncake_session_id == mooncake_session_id and self.epoch <= epoch


@dataclass(slots=True)
class ReceiverRoom:
    """One room of the language side. Times are in seconds.

    Attributes:
        room: its name.
        encoder: URL of the encoder server.
        deadline: time at which the room fails.
        started: time at which a request began to wait for it.
        required_dst_info_num: ranks that must send Init before the encoder writes.
        machine: its state.
        peer: the encoder process that announced it.
        total_tokens: rows of the embedding; ``row_bytes`` and ``dtype`` are of a row.
        window: number of the current window; -1: none was offered.
        epoch: the engine epoch that the current window was offered for.
        blocks: the blocks of the current window.
        allocated_tokens: rows of the current window.
        sent_tokens: rows that are confirmed *and* copied out.
        metadata: of the part.
        elapsed: transfer time, from the hand-over of the embedding until its last row is copied out.
        last: whether the current window is confirmed and is the last one.
        view: whether the result may be a view of the blocks.
        outcome: how the room failed; None: it did not.
        ended: time at which it finished.
        forgotten: whether the record goes once the copier has finished.
    """

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
    epoch: int = 0
    blocks: list[int] = field(default_factory=list)
    allocated_tokens: int = 0
    sent_tokens: int = 0
    metadata: bytes = b""
    elapsed: float = 0.0
    last: bool = False
    view: bool = False
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
        """The state for sglang. It never goes back: a resume stays Transferring, Failed and Success are final."""
        if self.state is ReceiverState.FAILED:
            return Poll.Failed
        if self.state is ReceiverState.SUCCESS:
            return Poll.Success
        if self.state is ReceiverState.EXPECTED:
            return Poll.Bootstrapping
        if self.state is ReceiverState.QUEUED and self.window < 0:
            return Poll.WaitingForInput
        return Poll.Transferring

    def same_size(self, message: Announce) -> bool:
        return (self.total_tokens, self.row_bytes, self.dtype) == (
            message.total_tokens, message.row_bytes, message.dtype,
        )  # fmt: skip

    def contradiction(self, message: Progress | Done) -> str:
        """How ``message`` differs from the open offer; empty if it confirms exactly this window."""
        confirmed = self.sent_tokens + self.allocated_tokens
        claimed = message.total_tokens if isinstance(message, Done) else message.sent_tokens
        if (
            self.machine.state is ReceiverState.OFFERED
            and message.window == self.window
            and claimed == confirmed
            and isinstance(message, Done) == (confirmed == self.total_tokens)
        ):
            return ""
        return (
            f"{type(message).__name__} of window {message.window} with {claimed} rows, "
            f"but window {self.window} offered rows {self.sent_tokens} to {confirmed} of {self.total_tokens}"
        )

    def unfinished(self, now: float) -> str:
        return (
            f"not finished after {now - self.started:.1f} s (state {self.state.value}, "
            f"{self.sent_tokens} of {self.total_tokens} rows)"
        )

    def confirm(self, message: Progress | Done, now: float) -> None:
        """Keep the contents of ``message``, which confirms the current window."""
        if self.window == 0:
            self.metadata = message.metadata
        if isinstance(message, Done):
            self.last = True
            self.elapsed = message.elapsed - now  # on_copied adds the time at which the rows are copied out

    def copy_out(self, checksum: int | None) -> CopyOut:
        """The action that copies the current window's rows out of its blocks."""
        return CopyOut(
            room=self.room,
            window=self.window,
            blocks=tuple(self.blocks),
            first_token=self.sent_tokens,
            tokens=self.allocated_tokens,
            row_bytes=self.row_bytes,
            total_tokens=self.total_tokens,
            dtype=self.dtype,
            last=self.last,
            checksum=checksum,
            view=self.view,
        )


def abort_message(peer: Peer, room: str, reason: str) -> Send:
    return Send(
        peer.incarnation,
        Abort(room=room, mooncake_session_id=peer.mooncake_session_id, reason=as_text(reason)),
    )
