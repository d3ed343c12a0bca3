"""A request's rooms: which is current, what the dispatcher is asked, and when the request fails."""

from __future__ import annotations

import pytest

from sglang_mm_conn.core.dispatch.actions import Redispatched
from sglang_mm_conn.core.dispatch.reports import RoomFailed
from sglang_mm_conn.core.dispatch.waiting import ASK_AGAIN_SECONDS, WaitingParts
from sglang_mm_conn.core.errors import ConnError, TransferFailed
from sglang_mm_conn.core.states import Poll


class Room:
    def __init__(self, url: str, room: str) -> None:
        self.url, self.room = url, room
        self.state, self.code = Poll.Bootstrapping, 0
        self.cleared = False

    def poll(self) -> Poll:
        return self.state

    def fail(self, code: int) -> None:
        self.state, self.code = Poll.Failed, code

    def failure_exception(self) -> None:
        raise TransferFailed(self.room, "why", self.code)

    def clear(self) -> None:
        self.cleared = True


class Ground:
    def __init__(self, *, asks: bool = True) -> None:
        self.expected: list[Room] = []
        self.reports: list[RoomFailed] = []
        self.parts: WaitingParts[Room] = WaitingParts(self._expect, self.reports.append if asks else None, 5.0)
        for part in range(2):
            self.parts.expect("a", f"room {part}")

    def _expect(self, url: str, room: str) -> Room:
        self.expected.append(Room(url, room))
        return self.expected[-1]


def news(part: int) -> Redispatched:
    return Redispatched("base", part, "b", "another")


def test_a_request_has_arrived_when_all_its_rooms_have() -> None:
    ground = Ground()
    assert not ground.parts.arrived(0.0)
    ground.expected[0].state = Poll.Success
    assert not ground.parts.arrived(0.0)
    ground.expected[1].state = Poll.Success
    assert ground.parts.arrived(0.0)


@pytest.mark.parametrize("code", [404, 410, 499, 500, 502, 503, 504])
def test_the_dispatcher_is_asked_about_a_failed_room_until_it_has_decided(code: int) -> None:
    ground = Ground()
    ground.expected[1].fail(code)
    for now in (0.0, ASK_AGAIN_SECONDS / 2, ASK_AGAIN_SECONDS, ASK_AGAIN_SECONDS * 3 / 2):
        assert not ground.parts.arrived(now)
    assert ground.reports == [RoomFailed("room 1", code, "why")] * 2
    assert ground.parts.redispatch(news(1)) and not ground.parts.arrived(9.0)
    assert len(ground.reports) == 2


@pytest.mark.parametrize("code", [400, 408, 413])
def test_a_room_that_failed_for_its_input_or_its_deadline_fails_the_request(code: int) -> None:
    ground = Ground()
    ground.expected[0].fail(code)
    with pytest.raises(TransferFailed):
        ground.parts.arrived(0.0)
    assert not ground.reports


def test_a_rank_that_cannot_ask_waits_for_the_others_and_gives_up_in_the_end() -> None:
    ground = Ground(asks=False)
    ground.expected[0].fail(502)
    assert not ground.parts.arrived(1.0) and not ground.parts.arrived(6.0)
    with pytest.raises(TransferFailed):
        ground.parts.arrived(6.1)


def test_a_new_room_takes_the_place_of_its_part_and_the_old_one_is_given_up() -> None:
    ground = Ground()
    assert ground.parts.redispatch(news(1))
    assert [one.room for one in ground.parts.rooms] == ["room 0", "another"]
    assert ground.parts.rooms[1].url == "b"
    assert [one.cleared for one in ground.expected] == [False, True, False]


def test_news_of_a_request_that_is_over_or_of_an_unknown_part_change_nothing() -> None:
    ground = Ground()
    assert not ground.parts.redispatch(news(2)) and not ground.parts.redispatch(news(-1))
    ground.parts.clear()
    assert all(one.cleared for one in ground.expected) and not ground.parts.rooms
    assert not ground.parts.redispatch(news(0)) and len(ground.expected) == 2


def test_a_room_that_cannot_be_expected_is_an_error_for_the_caller() -> None:
    def expect(url: str, room: str) -> Room:
        if room == "another":
            raise ConnError("expected before")
        return Room(url, room)

    parts = WaitingParts(expect, None, 1.0)
    parts.expect("a", "room 0")
    with pytest.raises(ConnError):
        parts.redispatch(news(0))
