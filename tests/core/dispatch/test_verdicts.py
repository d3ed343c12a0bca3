"""What an answer to /encode, or a failed room, says about the input and the encoder."""

from __future__ import annotations

from http import HTTPStatus

import msgspec
import pytest

from sglang_mm_conn.core.dispatch.verdicts import (
    BATCH_GIVEN_UP,
    DELIVERED,
    DRAINING,
    TryEnd,
    Verdict,
    for_client,
    may_be_tried_again,
    of_answer,
    of_failure,
)
from sglang_mm_conn.core.outcomes import FailureCode

ROOM = "room"


def error(message: str = "no", room: str | None = ROOM, **more: object) -> bytes:
    return msgspec.json.encode({"status": "error", "message": message, "req_id": room, **more})


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        (FailureCode.UNKNOWN_ROOM, Verdict.LOST),
        (FailureCode.TIMED_OUT, Verdict.INPUT),  # the deadline: no other encoder would do better
        (FailureCode.GONE, Verdict.LOST),
        (FailureCode.TOO_LARGE, Verdict.INPUT),
        (FailureCode.ABORTED, Verdict.ABORTED),
        (FailureCode.INTERNAL, Verdict.ERROR),
        (FailureCode.RANK_FAILED, Verdict.INPUT),  # the language rank: no other encoder would do better
        (FailureCode.PEER_FAILED, Verdict.LOST),
        (FailureCode.PEER_TIMED_OUT, Verdict.LOST),
        (HTTPStatus.SERVICE_UNAVAILABLE, Verdict.LOST),
        (HTTPStatus.BAD_REQUEST, Verdict.INPUT),
        (HTTPStatus.UNPROCESSABLE_ENTITY, Verdict.INPUT),
        (HTTPStatus.INSUFFICIENT_STORAGE, Verdict.ERROR),
    ],
)
def test_the_code_of_a_failed_room_says_who_is_at_fault(code: int, verdict: Verdict) -> None:
    assert of_failure(int(code), "why") == TryEnd(verdict, int(code), "why")
    assert may_be_tried_again(int(code)) == (verdict is not Verdict.INPUT)


def test_every_failure_code_has_a_verdict() -> None:
    for code in FailureCode:
        assert of_failure(code, "").verdict in (Verdict.LOST, Verdict.INPUT, Verdict.ABORTED, Verdict.ERROR)


@pytest.mark.parametrize("code", range(400, 500))
def test_the_inputs_fault_is_never_tried_again(code: int) -> None:
    about_the_transfer = (FailureCode.UNKNOWN_ROOM, FailureCode.GONE, FailureCode.ABORTED)
    assert may_be_tried_again(code) == (code in about_the_transfer)


@pytest.mark.parametrize("body", [b"null", b" null\n"])
def test_null_is_sglangs_answer_to_a_part_that_has_arrived(body: bytes) -> None:
    assert of_answer(ROOM, 200, body) is DELIVERED


@pytest.mark.parametrize(
    ("status", "body", "verdict"),
    [
        (400, error("bad image"), Verdict.INPUT),
        (500, error("out of memory"), Verdict.ERROR),
        (500, error(f"Encoder metadata publication failed: {BATCH_GIVEN_UP}"), Verdict.ABORTED),
        (503, error("no worker"), Verdict.LOST),
        (502, error("send failed"), Verdict.LOST),
        (404, error("unknown"), Verdict.LOST),
        (499, error("aborted"), Verdict.ABORTED),
    ],
)
def test_an_error_of_the_encoder_counts_as_that_of_a_room(status: int, body: bytes, verdict: Verdict) -> None:
    assert of_answer(ROOM, status, body) == TryEnd(verdict, status, msgspec.json.decode(body)["message"])


def test_an_error_without_a_message_still_has_a_reason() -> None:
    assert of_answer(ROOM, 500, msgspec.json.encode({"req_id": ROOM})).reason == "HTTP 500"
    assert of_answer(ROOM, 500, error("")).reason == "HTTP 500"


@pytest.mark.parametrize(
    "body", [b"", b"Internal Server Error", b"<html>", b'{"detail":"x"}', b"\xff\xfe", b"[" * 9999]
)
@pytest.mark.parametrize("status", [500, 502, 503, 599])
def test_a_server_error_of_a_proxy_or_an_encoder_may_succeed_elsewhere(status: int, body: bytes) -> None:
    end = of_answer(ROOM, status, body)
    assert end.verdict in (Verdict.ERROR, Verdict.LOST) and end.reason == f"HTTP {status}"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b"<html>hello</html>"),
        (200, b""),
        (200, b"{}"),
        (200, error()),
        (204, b""),
        (302, b""),
        (404, b'{"detail":"Not Found"}'),
        (405, b'{"detail":"Method Not Allowed"}'),
        (401, b"Unauthorized"),
        (400, error(room="another room")),
        (400, error(room=None)),
    ],
)
def test_whoever_does_not_answer_like_an_encoder_is_none(status: int, body: bytes) -> None:
    end = of_answer(ROOM, status, body)
    assert (end.verdict, end.code) == (Verdict.STRANGER, 502) and str(status) in end.reason


def test_an_error_about_the_server_need_not_name_the_room() -> None:
    assert of_answer(ROOM, 500, error("broken", room=None)).verdict is Verdict.ERROR


def test_an_encoder_that_drains_says_so_in_a_header() -> None:
    end = of_answer(ROOM, 503, error("the encoder is draining", room=None), DRAINING)
    assert (end.verdict, end.code) == (Verdict.DRAINS, 503)
    assert of_answer(ROOM, 500, error(), "something else").verdict is Verdict.ERROR


def test_a_part_that_has_arrived_has_arrived_also_from_an_encoder_that_drains() -> None:
    assert of_answer(ROOM, 200, b"null", DRAINING) is DELIVERED


@pytest.mark.parametrize("code", [*FailureCode, 503])
def test_a_client_is_told_no_server_rank_or_room_by_a_failed_transfer(code: int) -> None:
    reason = "encoder http://10.0.0.1:30000 (process e25d86) lost: room 933d0cf5-8e750bf5, rank 1"
    told = for_client(of_failure(code, reason))
    assert 400 <= told[0] < 600
    if code not in (FailureCode.INTERNAL, FailureCode.TOO_LARGE):  # these are an encoder's words, or about the input
        assert not any(word in told[1] for word in ("http", "process", "room", "rank"))
