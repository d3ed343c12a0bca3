"""The wait of a request for its parts: when it has arrived or failed, and what the dispatcher is asked and says."""

from __future__ import annotations

import pytest

from sglang_mm_conn.core.dispatch.actions import Redispatched
from sglang_mm_conn.core.dispatch.reports import RoomFailed
from sglang_mm_conn.core.dispatch.waiting import ASK_AGAIN_SECONDS, WaitingParts
from sglang_mm_conn.core.errors import AllocatorError, TransferFailed
from sglang_mm_conn.core.outcomes import FailureCode
from sglang_mm_conn.core.states import Poll

A, B = "http://a:1", "http://b:1"
PATIENCE = 4.0


class Room:
    """A room whose state a test sets."""

    def __init__(self, url: str, room: str) -> None:
        self.url = url
        self.room = room
        self.state = Poll.WaitingForInput
        self.error = TransferFailed(room, "the encoder is lost", 502)
        self.cleared = 0

    def poll(self) -> Poll:
        return self.state

    def fail(self, code: int = 502, reason: str = "the encoder is lost") -> None:
        self.state, self.error = Poll.Failed, TransferFailed(self.room, reason, code)

    def failure_exception(self) -> None:
        if self.state is Poll.Failed:
            raise self.error

    def clear(self) -> None:
        self.cleared += 1


class Waiting:
    """A request that waits for parts at A; ``asks``: it can ask the dispatcher."""

    def __init__(self, parts: int = 2, *, asks: bool = True) -> None:
        self.asked: list[RoomFailed] = []
        self.parts: WaitingParts[Room] = WaitingParts(Room, self.asked.append if asks else None, PATIENCE)
        for number in range(parts):
            self.parts.expect(A, f"room-{number}")

    def room(self, number: int) -> Room:
        return self.parts.rooms[number]


def test_a_request_has_arrived_when_all_of_its_parts_have() -> None:
    waiting = Waiting()
    assert [(room.url, room.room) for room in waiting.parts.rooms] == [(A, "room-0"), (A, "room-1")]
    assert not waiting.parts.arrived(0.0)
    waiting.room(1).state = Poll.Success
    assert not waiting.parts.arrived(0.1)
    waiting.room(0).state = Poll.Success
    assert waiting.parts.arrived(0.2) and waiting.asked == []


@pytest.mark.parametrize("code", [404, 410, 499, 500, 502, 503, 504, 507])
def test_a_room_that_another_encoder_may_save_is_asked_about_again_and_again(code: int) -> None:
    waiting = Waiting()
    waiting.room(1).fail(code)
    for now in (10.0, 10.5, 10.0 + ASK_AGAIN_SECONDS, 10.9 + ASK_AGAIN_SECONDS, 10.0 + 2 * ASK_AGAIN_SECONDS):
        assert not waiting.parts.arrived(now)
    assert waiting.asked == [RoomFailed("room-1", code, "the encoder is lost")] * 3


@pytest.mark.parametrize("code", [400, 408, 413, 422, FailureCode.RANK_FAILED])
def test_a_fault_of_the_input_fails_the_request_at_once(code: int) -> None:
    for asks in (True, False):
        waiting = Waiting(asks=asks)
        waiting.room(0).fail(code, "bad image")
        with pytest.raises(TransferFailed, match="bad image") as error:
            waiting.parts.arrived(0.0)
        assert error.value.code == code and waiting.asked == []


def test_each_room_is_asked_about_on_its_own() -> None:
    waiting = Waiting()
    waiting.room(0).fail()
    waiting.parts.arrived(10.0)
    waiting.room(1).fail()
    waiting.parts.arrived(10.1)
    assert [report.room for report in waiting.asked] == ["room-0", "room-1"]


def test_a_part_from_another_encoder_takes_the_place_of_the_one_that_failed() -> None:
    waiting = Waiting()
    old, other = waiting.parts.rooms
    old.fail()
    other.state = Poll.Success
    waiting.parts.arrived(10.0)
    assert waiting.parts.redispatch(Redispatched("base", 0, B, "new"))
    assert old.cleared == 1 and other.cleared == 0 and waiting.parts.rooms[1] is other
    assert (waiting.room(0).url, waiting.room(0).room) == (B, "new")
    assert not waiting.parts.arrived(10.5)
    waiting.room(0).state = Poll.Success
    assert waiting.parts.arrived(10.6) and len(waiting.asked) == 1


def test_a_new_room_that_fails_too_is_asked_about_at_once() -> None:
    waiting = Waiting(1)
    waiting.room(0).fail()
    waiting.parts.arrived(10.0)
    waiting.parts.redispatch(Redispatched("base", 0, B, "new"))
    waiting.room(0).fail()
    waiting.parts.arrived(10.1)
    assert [report.room for report in waiting.asked] == ["room-0", "new"]


@pytest.mark.parametrize("part", [-1, 2, 99])
def test_news_of_a_part_that_there_is_not_change_nothing(part: int) -> None:
    waiting = Waiting()
    before = list(waiting.parts.rooms)
    assert not waiting.parts.redispatch(Redispatched("base", part, B, "new"))
    assert waiting.parts.rooms == before and not any(room.cleared for room in before)


def test_a_request_that_is_over_gives_its_rooms_up_and_ignores_news() -> None:
    waiting = Waiting()
    rooms = list(waiting.parts.rooms)
    waiting.parts.clear()
    waiting.parts.clear()
    assert [room.cleared for room in rooms] == [1, 1] and waiting.parts.rooms == []
    assert not waiting.parts.redispatch(Redispatched("base", 0, B, "new"))


def test_a_rank_that_cannot_wait_for_a_new_room_has_given_the_old_one_up() -> None:
    rooms = []

    def expect(url: str, room: str) -> Room:
        if url == B:
            raise AllocatorError("no blocks")
        rooms.append(Room(url, room))
        return rooms[-1]

    parts = WaitingParts(expect, None, PATIENCE)
    parts.expect(A, "room-0")
    with pytest.raises(AllocatorError, match="no blocks"):
        parts.redispatch(Redispatched("base", 0, B, "new"))
    assert rooms[0].cleared == 1


def test_a_rank_that_cannot_ask_waits_for_news_as_long_as_its_patience() -> None:
    waiting = Waiting(asks=False)
    waiting.room(0).fail(504)
    for now in (10.0, 12.0, 10.0 + PATIENCE):
        assert not waiting.parts.arrived(now)
    with pytest.raises(TransferFailed) as error:
        waiting.parts.arrived(10.1 + PATIENCE)
    assert (error.value.room, error.value.code) == ("room-0", 504)


def test_news_in_time_end_the_patience_of_a_rank_that_cannot_ask() -> None:
    waiting = Waiting(1, asks=False)
    waiting.room(0).fail()
    waiting.parts.arrived(10.0)
    assert waiting.parts.redispatch(Redispatched("base", 0, B, "new"))
    assert not waiting.parts.arrived(100.0)
    waiting.room(0).fail()
    assert not waiting.parts.arrived(101.0) and not waiting.parts.arrived(101.0 + PATIENCE)
    with pytest.raises(TransferFailed):
        waiting.parts.arrived(101.1 + PATIENCE)
