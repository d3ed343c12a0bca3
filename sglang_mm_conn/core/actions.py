"""Owns the actions: requests of a core that its caller carries out, in their order. A core never acts itself."""

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
    """Copy the rows of a window out of its blocks into the result, or make the result a view of the blocks.

    Attributes:
        room, window: which.
        blocks: the window's blocks, in token order.
        first_token: the row of the result that the first row of the window becomes.
        tokens: rows of the window.
        row_bytes: bytes of each row.
        total_tokens: rows of the result.
        dtype: of the result.
        last: whether the window completes the result.
        checksum: of all rows, to be verified; None: not used.
        view: whether the rows may stay in the blocks, which are contiguous then.
    """

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
    view: bool = False


class TransferEmbeddingChunk(msgspec.Struct, frozen=True):
    """Work for a transfer queue: write the offered windows of a room.

    It holds no bytes: EncoderEndpoint keeps them per room, as ``Source.rows`` (connector/encoder/source.py). The last
    three fields are kept for the original interface only.

    Attributes:
        room: which.
        queue_idx: the room's transfer queue.
        embedding_indices: 0, 1, ... one number per block that the rows would fill. A log line counts them.
        is_last: always True.
        total_tokens: rows of the whole embedding.
    """

    room: str
    queue_idx: int
    embedding_indices: tuple[int, ...]
    is_last: bool
    total_tokens: int


class Ended(msgspec.Struct, frozen=True):
    """A room is finished.

    Attributes:
        room: which.
        outcome: Success or Failed, with reason and code.
        peer: for the log: the sessions that had offered blocks, or the language server; empty if not known.
    """

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
    """No write of ``room`` is under way or will come, so the embedding may be freed."""

    room: str


Action: TypeAlias = Send | CopyOut | TransferEmbeddingChunk | Ended | Release


# -- actions of core.language.registration -----------------------------------------------------------------------


class LookUp(msgspec.Struct, frozen=True):
    """Ask ``url`` over HTTP which processes serve it, then call ``looked_up``, ``absent`` or ``look_up_failed``."""

    url: str


class Connect(msgspec.Struct, frozen=True):
    """Open a control connection to process ``incarnation`` at the host of ``url``, port ``control_port``."""

    incarnation: str
    url: str
    control_port: int


class Disconnect(msgspec.Struct, frozen=True):
    """Close the control connection to ``incarnation``."""

    incarnation: str


class SendRegister(msgspec.Struct, frozen=True):
    """Build the Register message, which may take seconds, and send it. Call ``cannot_register`` if that fails.

    Attributes:
        incarnation: the process to send it to.
        path: the data path to offer.
        slot: the writer slot that the process must lock.
        number: of the registration; the encoder keeps the newest.
    """

    incarnation: str
    path: str
    slot: int
    number: int


class SendRetire(msgspec.Struct, frozen=True):
    """Send the process a Retire for the revoked epochs of ``path``, if any was revoked."""

    incarnation: str
    path: str


class SendHeartbeat(msgspec.Struct, frozen=True):
    """Send the process a Heartbeat."""

    incarnation: str


class ProcessReady(msgspec.Struct, frozen=True):
    """The process answered Registered for the newest epoch: rooms may use it. ``urls``: those of its encoder."""

    incarnation: str
    mooncake_session_id: str
    path: str
    epoch: int
    urls: tuple[str, ...]


class ProcessLost(msgspec.Struct, frozen=True):
    """The process no longer serves this rank, so its rooms fail with ``reason``."""

    incarnation: str
    reason: str


class EncoderRefused(msgspec.Struct, frozen=True):
    """No process of ``url`` can be used, so requests that wait for it fail with ``reason``."""

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
