"""How things end: a room, one data call; and the codes that a client of sglang sees for failures."""

from __future__ import annotations

from enum import Enum, IntEnum
from http import HTTPStatus

import msgspec


class FailureCode(IntEnum):
    """HTTP statuses of failed rooms. An encode that failed may bring another one."""

    UNKNOWN_ROOM = 404  # the encoder does not know the room
    TIMED_OUT = 408  # the language side's deadline has passed
    GONE = 410  # it ended with a code that is none of a failure
    ABORTED = 499  # the request gave it up: its client is gone, or its prompt was rejected (the code is nginx's)
    INTERNAL = 500  # this side failed
    PEER_FAILED = 502  # the other side was lost or broke the protocol, or a data call to it failed
    PEER_TIMED_OUT = 504  # the encoder's deadline has passed: language ranks did not answer


def known_http_status(code: int) -> int:
    """``code``, or the general one of its kind where Python's HTTPStatus does not know it (499, say)."""
    if code in HTTPStatus._value2member_map_:
        return code
    return int(HTTPStatus.BAD_REQUEST if 400 <= code < 500 else HTTPStatus.BAD_GATEWAY)


class Outcome(msgspec.Struct, frozen=True):
    """How a room ended.

    Attributes:
        reason: Why it failed; empty where it succeeded.
        code: An HTTP status: 200, or a FailureCode (an encode that failed may have brought another one).
    """

    reason: str
    code: int

    @property
    def succeeded(self) -> bool:
        return self.code == HTTPStatus.OK


SUCCEEDED = Outcome("", int(HTTPStatus.OK))


class WriteStatus(Enum):
    """What is known of a window's bytes when its data call has returned."""

    LANDED = "landed"  # all of them are in place
    FAILED = "failed"  # not all are, and none will land any more
    IN_DOUBT = "in doubt"  # bytes may still land: nothing may be reused on the strength of this


class WriteResult(msgspec.Struct, frozen=True):
    """How a data call ended; ``reason`` says why it did not land everything."""

    status: WriteStatus
    reason: str = ""


LANDED = WriteResult(WriteStatus.LANDED)
