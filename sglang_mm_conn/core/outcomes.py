"""Owns outcomes: of a room, of one data call, and the HTTP statuses of failures."""

from __future__ import annotations

from enum import Enum, IntEnum
from http import HTTPStatus

import msgspec

from sglang_mm_conn.core.texts import as_text


class FailureCode(IntEnum):
    """HTTP statuses of failed rooms. A failed encode may set another one."""

    UNKNOWN_ROOM = 404  # the encoder does not know the room
    TIMED_OUT = 408  # the language side's deadline has passed
    GONE = 410  # the room is finished, and its code is not one of a failure
    TOO_LARGE = 413  # the embedding is larger than SGLANG_MM_CONN_MAX_EMBEDDING_BYTES
    ABORTED = 499  # the request was aborted: its client disconnected, or its prompt was rejected (nginx uses this code)
    INTERNAL = 500  # the encode has failed, or what the encoder sent is damaged
    PEER_FAILED = 502  # the other side was lost or broke the protocol, or a data call to it failed
    PEER_TIMED_OUT = 504  # the encoder's deadline has passed because language ranks did not answer
    RANK_FAILED = 598  # a language rank has no memory for the embedding, for example. The client gets 500


def known_http_status(code: int) -> int:
    """``code`` if Python's HTTPStatus knows it (it does not know 499, for example), otherwise 400, 500 or 502."""
    if code == FailureCode.RANK_FAILED:
        return int(HTTPStatus.INTERNAL_SERVER_ERROR)
    if code in HTTPStatus._value2member_map_:
        return int(code)  # not a FailureCode: sglang logs it
    return int(HTTPStatus.BAD_REQUEST if 400 <= code < 500 else HTTPStatus.BAD_GATEWAY)


class Outcome(msgspec.Struct, frozen=True):
    """How a room ended.

    Attributes:
        reason: why it failed; empty if it succeeded.
        code: HTTP status: 200, a FailureCode, or the status that a failed encode has set.
    """

    reason: str
    code: int

    @property
    def succeeded(self) -> bool:
        return self.code == HTTPStatus.OK


def failure(reason: str, code: int) -> Outcome:
    """The outcome of a failed room. A ``code`` that is none of a failure becomes GONE."""
    return Outcome(as_text(reason), code if 400 <= code <= 599 else FailureCode.GONE)


SUCCEEDED = Outcome("", int(HTTPStatus.OK))


class WriteStatus(Enum):
    """What is known about a window's bytes when its data call has returned."""

    LANDED = "landed"  # every byte is in place
    FAILED = "failed"  # some bytes are missing, and none will land any more
    IN_DOUBT = "in doubt"  # bytes may still land, so this is no proof that memory may be reused


class WriteResult(msgspec.Struct, frozen=True):
    """How a data call ended.

    Attributes:
        status: what is known about the bytes.
        reason: why not every byte has landed; empty if every byte has.
    """

    status: WriteStatus
    reason: str = ""


LANDED = WriteResult(WriteStatus.LANDED)
