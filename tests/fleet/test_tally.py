"""What clients noticed is counted as it was."""

from __future__ import annotations

import json

import pytest

from tests.fleet.tally import NO_ANSWER, Event, Reply, Tally, kind_of, troubles


def reply(began: float = 0.0, seconds: float = 1.0, status: int = 200, *, right: bool = True, images: int = 1) -> Reply:
    error = "" if status == 200 and right else "said so"
    return Reply("question", images, began, seconds, status, right and status == 200, error)


REPLIES = [
    reply(0.0, 1.0),
    reply(1.0, 2.0, images=0),
    reply(2.0, 9.0, status=502),
    reply(3.0, 0.5, right=False),
    reply(4.0, 0.5, status=NO_ANSWER),
    reply(5.0, 0.5, status=502),
]


def test_failed_and_wrong_answers_are_counted_apart() -> None:
    tally = Tally.of(REPLIES)
    assert tally.requests == 6
    assert [one.began for one in tally.failed] == [2.0, 4.0, 5.0]
    assert [one.began for one in tally.wrong] == [3.0]
    assert tally.statuses == {502: 2, NO_ANSWER: 1}
    assert tally.failed_text() == "3 (2 HTTP 502, 1 without an answer)"
    assert Tally.of(REPLIES[:2]).failed_text() == "0"


def test_the_slowest_the_median_the_p99_and_the_rate_are_those_of_all_replies() -> None:
    tally = Tally.of(REPLIES)
    assert tally.slowest == 9.0 and tally.median == 0.75 and tally.p99 == 9.0
    assert tally.rate == pytest.approx(6 / 11.0)
    hundred = Tally.of(reply(seconds=number / 100) for number in range(1, 101))
    assert hundred.p99 == 0.99 and hundred.slowest == 1.0


def test_nothing_asked_is_no_division_by_zero() -> None:
    nothing = Tally(())
    assert (nothing.requests, nothing.slowest, nothing.median, nothing.p99, nothing.rate) == (0, 0.0, 0.0, 0.0, 0.0)
    assert str(nothing).startswith("0 requests: 0 failed, 0 wrong")


def test_a_tally_may_be_of_some_moments_and_of_questions_with_or_without_images() -> None:
    assert [one.began for one in Tally.of(REPLIES, since=2, until=4).replies] == [2.0, 3.0]
    assert [one.began for one in Tally.of(REPLIES, images=False).replies] == [1.0]
    assert Tally.of(REPLIES, images=True).requests == 5
    assert (Tally.of(REPLIES[:2]) + Tally.of(REPLIES[2:])).replies == Tally.of(REPLIES).replies


def test_errors_of_one_kind_are_told_once_whatever_names_they_carry() -> None:
    first = json.dumps({"message": "encoder http://127.0.0.1:12345 (process 0a1b2c3d4e5f) lost after 10.25 s"})
    second = json.dumps({"message": "encoder http://127.0.0.1:54321 (process f5e4d3c2b1a0) lost after 9 s"})
    assert kind_of(first) == kind_of(second)
    assert "lost after" in kind_of(first)
    assert kind_of("plain\n text 17") == "plain text _"
    assert kind_of('["a list"]') == '["a list"]'


def test_troubles_say_how_many_failed_and_how_long_after_what() -> None:
    events = [Event(0.0, "ready"), Event(5.2, "encoder-1 killed"), Event(90.0, "later")]
    lines = troubles(REPLIES, events)
    assert lines[0].startswith("2 x HTTP 502, first 0.3 s after 'encoder-1 killed', over 5.5 s, the slowest took 9.0")
    assert any(line.startswith("1 x wrong answer, first 3.5 s after 'ready', at once") for line in lines)
    assert any(line.startswith("1 x no answer") for line in lines)
    assert troubles(REPLIES[:2], events) == []


def test_troubles_of_many_kinds_are_cut_short() -> None:
    many = [reply(status=status) for status in range(400, 430)]
    lines = troubles(many, [], most=3)
    assert len(lines) == 4 and lines[-1] == "and 27 other kinds"
