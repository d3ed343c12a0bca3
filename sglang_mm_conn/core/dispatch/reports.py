"""Owns the reports of a language server's scheduler to its dispatchers, and their codec. No pickle."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from sglang_mm_conn.core.dispatch.encoders import EncoderStatus
from sglang_mm_conn.core.errors import ProtocolError
from sglang_mm_conn.core.texts import as_text

MOST_BYTES = 1 << 20
_MOST_ENCODERS = 4096


class EncoderStatuses(msgspec.Struct, frozen=True, tag_field="t", tag="encoder_statuses"):
    """What the scheduler's side knows of each encoder. Repeated, so that a dispatcher that missed one catches up."""

    encoders: Annotated[list[EncoderStatus], Meta(max_length=_MOST_ENCODERS)]


class RoomFailed(msgspec.Struct, frozen=True, tag_field="t", tag="room_failed"):
    """A room has failed, and its request waits for what the dispatcher decides. Repeated until it has decided.

    Attributes:
        room: which.
        code: HTTP status.
        reason: why.
    """

    room: str
    code: int
    reason: str


Report: TypeAlias = EncoderStatuses | RoomFailed

_ENCODER = msgspec.msgpack.Encoder()
# Made at import: see the hazard in control.bootstrap.
_DECODER: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(EncoderStatuses | RoomFailed)


def room_failed(room: str, code: int, reason: str) -> RoomFailed:
    """A RoomFailed whose reason is not too long."""
    return RoomFailed(room, code, as_text(reason))


def encode_report(report: Report) -> bytes:
    return _ENCODER.encode(report)


def decode_report(frame: bytes) -> Report:
    """Raises ProtocolError unless ``frame`` is exactly one report."""
    if len(frame) > MOST_BYTES:
        raise ProtocolError(f"report of {len(frame)} bytes is longer than the limit of {MOST_BYTES}")
    try:
        return _DECODER.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"malformed report: {error}") from None
