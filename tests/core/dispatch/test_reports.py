"""The codec of the reports from a scheduler to its dispatchers."""

from __future__ import annotations

import random

import msgspec
import pytest

from sglang_mm_conn.core.dispatch import reports
from sglang_mm_conn.core.dispatch.encoders import EncoderStatus
from sglang_mm_conn.core.dispatch.reports import (
    MOST_BYTES,
    EncoderStatuses,
    Report,
    RoomFailed,
    decode_report,
    encode_report,
    room_failed,
)
from sglang_mm_conn.core.errors import ProtocolError

REPORTS: list[Report] = [
    EncoderStatuses([]),
    EncoderStatuses(
        [
            EncoderStatus("http://a:1", True),
            EncoderStatus("http://b:2", False, silences=3, refusal="not ours", draining=True, load=7),
        ]
    ),
    RoomFailed("room", 502, "lost"),
]


@pytest.mark.parametrize("report", REPORTS)
def test_a_report_arrives_as_it_was_sent(report: Report) -> None:
    assert decode_report(encode_report(report)) == report


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"\xff",
        encode_report(REPORTS[1])[:-1],
        encode_report(REPORTS[1]) + b"\x00",
        msgspec.msgpack.encode({"t": "other"}),
        msgspec.msgpack.encode({"t": "room_failed", "room": 1, "code": 502, "reason": ""}),
        msgspec.msgpack.encode({"t": "encoder_statuses", "encoders": [{"url": "http://a"}]}),
        msgspec.msgpack.encode([]),
        b"\x91" * 5000,
        b"\x82\xa1t\xabroom_failed\xa4room\xa2\xff\xfe",
    ],
)
def test_what_is_no_report_is_refused(frame: bytes) -> None:
    with pytest.raises(ProtocolError, match="malformed report"):
        decode_report(frame)


def test_a_report_that_is_too_long_is_refused_before_it_is_read() -> None:
    with pytest.raises(ProtocolError, match=f"longer than the limit of {MOST_BYTES}"):
        decode_report(bytes(MOST_BYTES + 1))


def test_a_report_of_too_many_encoders_is_refused() -> None:
    many = EncoderStatuses([EncoderStatus("", True)] * (reports._MOST_ENCODERS + 1))
    with pytest.raises(ProtocolError, match="malformed report"):
        decode_report(encode_report(many))


def test_mutated_reports_are_decoded_or_refused_and_nothing_else() -> None:
    chance = random.Random(5)
    for _ in range(3000):
        frame = bytearray(encode_report(chance.choice(REPORTS)))
        for _ in range(chance.randrange(1, 4)):
            frame[chance.randrange(len(frame))] = chance.randrange(256)
        try:
            decode_report(bytes(frame))
        except ProtocolError:
            continue


def test_the_reason_of_a_failed_room_is_cut_and_can_be_sent() -> None:
    report = room_failed("room", 502, "\ud800" + "why " * 2500)
    assert decode_report(encode_report(report)) == report and len(report.reason) == 1000
