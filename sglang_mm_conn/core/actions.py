"""What a core asks its surroundings to do, in this order. Cores never act themselves."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from sglang_mm_conn.core.messages import Message
from sglang_mm_conn.core.outcomes import Outcome


class Send(msgspec.Struct, frozen=True):
    """Send ``message`` to the control peer ``peer``."""

    peer: str
    message: Message


class CopyOut(msgspec.Struct, frozen=True):
    """Copy the first ``tokens`` rows of window ``window`` out of ``blocks``, to row ``first_token`` of the result."""

    room: str
    window: int
    blocks: tuple[int, ...]
    first_token: int
    tokens: int
    row_bytes: int
    total_tokens: int
    dtype: str
    last: bool
    checksum: int | None
    view: bool = False  # or leave them in the blocks, which are contiguous, and make the result a view of them


class TransferEmbeddingChunk(msgspec.Struct, frozen=True):
    """Work for a transfer queue: serve the offered windows of ``room`` (the seed's name and fields)."""

    room: str
    queue_idx: int
    embedding_indices: tuple[int, ...]
    is_last: bool
    total_tokens: int


class Ended(msgspec.Struct, frozen=True):
    """``room`` reached its final state; ``peer`` says with whom, where it is known."""

    room: str
    outcome: Outcome
    peer: str = ""

    @property
    def success(self) -> bool:
        return self.outcome.succeeded

    @property
    def reason(self) -> str:
        return self.outcome.reason

    @property
    def code(self) -> int:
        return self.outcome.code


class Release(msgspec.Struct, frozen=True):
    """No write of ``room`` is under way or will come: its source may be freed."""

    room: str


Action: TypeAlias = Send | CopyOut | TransferEmbeddingChunk | Ended | Release


# -- what core.registration asks for -----------------------------------------------------------------------------------


class LookUp(msgspec.Struct, frozen=True):
    """Ask ``url`` over HTTP which processes serve it; answered by ``looked_up``, ``absent`` or ``look_up_failed``."""

    url: str


class Connect(msgspec.Struct, frozen=True):
    """Open a control connection to the process ``incarnation``: the host of ``url``, port ``control_port``."""

    incarnation: str
    url: str
    control_port: int


class Disconnect(msgspec.Struct, frozen=True):
    """Close the control connection to ``incarnation``."""

    incarnation: str


class SendRegister(msgspec.Struct, frozen=True):
    """Make the Register message and send it. Making it may take seconds; ``cannot_register`` where it fails."""

    incarnation: str
    path: str
    slot: int
    number: int  # of the registration: the encoder takes the newest


class SendRetire(msgspec.Struct, frozen=True):
    """Tell the process which epochs of ``path`` were revoked, if any was."""

    incarnation: str
    path: str


class SendHeartbeat(msgspec.Struct, frozen=True):
    """Tell the process that this rank lives."""

    incarnation: str


class ProcessReady(msgspec.Struct, frozen=True):
    """The process answered Registered for the newest epoch: rooms may use it."""

    incarnation: str
    mooncake_session_id: str
    path: str
    epoch: int


class ProcessLost(msgspec.Struct, frozen=True):
    """The process serves this rank no more: its rooms fail with ``reason``."""

    incarnation: str
    reason: str


class EncoderRefused(msgspec.Struct, frozen=True):
    """No process of ``url`` can be used: requests that wait for it fail with ``reason``."""

    url: str
    reason: str


INFO, WARNING, ERROR = 20, 30, 40  # the levels of the module logging


class Log(msgspec.Struct, frozen=True):
    """A line for the operator; ``level`` is INFO, WARNING or ERROR."""

    level: int
    text: str


RegistrationAction: TypeAlias = (
    LookUp | Connect | Disconnect | SendRegister | SendRetire | SendHeartbeat | ProcessReady | ProcessLost
    | EncoderRefused | Log
)  # fmt: skip
