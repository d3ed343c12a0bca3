"""Owns the verdicts on tries: what an answer to ``/encode``, or a failed room, says about the input and the encoder."""

from __future__ import annotations

import re
from enum import Enum
from http import HTTPStatus

import msgspec

from sglang_mm_conn.core.outcomes import FailureCode
from sglang_mm_conn.core.states import EncoderState
from sglang_mm_conn.core.texts import as_text

DRAINING = "draining"  # value of the header STATE_HEADER while an encoder drains
STATE_HEADER = "X-Mm-Conn-State"
# An encoder's error if the language side gave a whole batch up before the model ran. sglang puts words before it and
# answers with 500, whatever the code of the error.
BATCH_GIVEN_UP = "every request of the batch was given up before the model ran"


class Verdict(Enum):
    """How a try ended."""

    DELIVERED = "delivered"  # the encoder says that the embedding has arrived
    INPUT = "input"  # the input or a language rank is at fault, or the deadline has passed: no encoder would do better
    ABORTED = "aborted"  # the language side has given the room up: the request is over, or a rank lost the encoder
    ERROR = "error"  # the encoder failed to encode it: another encoder may succeed
    LOST = "lost"  # the room failed for no fault of the input; the encoder may be well
    REFUSED = "refused"  # nothing listens at the encoder's address, or it cannot be reached
    CUT_OFF = "cut off"  # the connection broke while the encoder had the part
    DRAINS = "drains"  # the encoder takes no new work
    STRANGER = "stranger"  # whoever answered is no encoder of this deployment


class TryEnd(msgspec.Struct, frozen=True):
    """How a try ended.

    Attributes:
        verdict: the kind.
        code: HTTP status that the client gets if this was the last try.
        reason: why, in words for the log and, for INPUT and ERROR, for the client.
    """

    verdict: Verdict
    code: int
    reason: str


DELIVERED = TryEnd(Verdict.DELIVERED, int(HTTPStatus.OK), "")

# What a lost try proves about its encoder; None: nothing.
PROVES = {
    Verdict.REFUSED: EncoderState.DOWN,
    Verdict.STRANGER: EncoderState.SUSPECT,  # it may be a proxy's answer to this one request: a probe decides
    Verdict.CUT_OFF: EncoderState.SUSPECT,
    Verdict.DRAINS: EncoderState.DRAINING,
    Verdict.LOST: None,
}

# Failures of rooms, and answers of encoders, that are about the transfer and not about the input.
_LOST = {
    FailureCode.UNKNOWN_ROOM,
    FailureCode.GONE,
    FailureCode.PEER_FAILED,
    FailureCode.PEER_TIMED_OUT,
    HTTPStatus.SERVICE_UNAVAILABLE,
}


def may_be_tried_again(code: int) -> bool:
    """Whether a room that failed with ``code`` may succeed at another encoder.

    A request that waits has not given its room up. If the room was aborted, another rank did that, or the dispatcher.
    """
    return of_failure(code, "").verdict is not Verdict.INPUT


def of_failure(code: int, reason: str) -> TryEnd:
    """The end of a try whose room failed with ``code`` (an HTTP status) and ``reason``."""
    if code == FailureCode.ABORTED:
        verdict = Verdict.ABORTED
    elif code in _LOST:
        verdict = Verdict.LOST
    elif 400 <= code < 500 or code == FailureCode.RANK_FAILED:
        verdict = Verdict.INPUT
    else:
        verdict, code = Verdict.ERROR, code if code >= 500 else int(HTTPStatus.BAD_GATEWAY)
    return TryEnd(verdict, code, reason)


# What clients are told of failures that are no encoder's words: those may name servers, ranks and rooms.
_TOLD: dict[int, str] = {
    FailureCode.TIMED_OUT: "the images, video or audio of this request were not encoded in time",
    FailureCode.RANK_FAILED: "the language server could not take the embeddings of this request",
}
# What sglang puts before the words of a rank of an encoder.
_WHERE = re.compile(r"^[\w ]{1,64} failed on TP rank \d+: ")


def for_client(end: TryEnd) -> tuple[int, str]:
    """Code and reason of a try that failed, as clients get them."""
    if end.verdict in (Verdict.ERROR, Verdict.INPUT):
        return end.code, _TOLD.get(end.code) or _WHERE.sub("", end.reason)
    code = end.code if end.code >= 500 else int(HTTPStatus.BAD_GATEWAY)
    return code, "the connection to the encoder of this request was lost"


class _EncodeError(msgspec.Struct):
    """sglang's answer to an ``/encode`` that failed."""

    req_id: str | None
    message: str = ""


# What a proxy before an encoder says of a large request.
_TOO_LARGE = {
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.REQUEST_URI_TOO_LONG, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
}  # fmt: skip
# Made at import: see the hazard in control.bootstrap.
_ERROR = msgspec.json.Decoder(_EncodeError)


def of_answer(room: str, status: int, body: bytes, state: str = "") -> TryEnd:
    """The end of a try that was answered.

    Args:
        room: the ``req_id`` of the request.
        status: HTTP status of the answer.
        body: its beginning.
        state: the value of its header STATE_HEADER, if any.
    """
    if status == HTTPStatus.OK and body.strip() == b"null":
        return DELIVERED
    if state == DRAINING:
        return TryEnd(Verdict.DRAINS, int(HTTPStatus.SERVICE_UNAVAILABLE), "the encoder drains")
    try:
        error = _ERROR.decode(body)
    except msgspec.DecodeError:
        error = None
    if error is None and status in _TOO_LARGE:
        return TryEnd(Verdict.INPUT, status, f"the request is too large for the encoders (HTTP {status})")
    if status == HTTPStatus.OK or (error is None and status < 500):
        return TryEnd(Verdict.STRANGER, int(HTTPStatus.BAD_GATEWAY), f"no encoder answers there (HTTP {status})")
    if error is None:  # an encoder, or a proxy before it
        return TryEnd(Verdict.ERROR, status, f"HTTP {status}")
    if status < 500 and error.req_id != room:
        return TryEnd(Verdict.STRANGER, int(HTTPStatus.BAD_GATEWAY), f"it answered for another request (HTTP {status})")
    reason = " ".join(as_text(error.message).split()) or f"HTTP {status}"
    return TryEnd(Verdict.ABORTED, status, reason) if BATCH_GIVEN_UP in reason else of_failure(status, reason)
