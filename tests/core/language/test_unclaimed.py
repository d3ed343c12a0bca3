"""Unclaimed rooms: bounded, in the order of their time, dropped when it has passed."""

from __future__ import annotations

import pytest

from sglang_mm_conn.core.language import unclaimed
from sglang_mm_conn.core.language.receiver_room import Peer
from sglang_mm_conn.core.language.unclaimed import UnclaimedRooms
from sglang_mm_conn.core.messages import Announce, Failed

ONE, OTHER = Peer("e1", "10.0.0.1:17001", "shm", True), Peer("e2", "10.0.0.1:17001", "shm", True)


def announce(room: str) -> Announce:
    return Announce(room=room, total_tokens=1, row_bytes=4, dtype="float32")


def test_a_claimed_room_leaves_the_table() -> None:
    rooms = UnclaimedRooms(30.0)
    assert rooms.put(ONE, announce("a"), 0.0)
    item = rooms.take("a")
    assert item is not None and (item.peer, item.message) == (ONE, announce("a"))
    assert rooms.take("a") is None and not rooms


def test_one_process_fills_only_its_own_share_and_gets_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unclaimed, "UNCLAIMED_LIMIT", 2)
    rooms = UnclaimedRooms(30.0)
    assert [rooms.put(ONE, announce(room), 0.0) for room in "abc"] == [True, True, False]
    assert rooms.put(ONE, announce("a"), 0.0), "a room that is announced again needs no more than it has"
    assert rooms.put(OTHER, announce("d"), 0.0)
    rooms.drop_process("e1")
    assert list(rooms) == ["d"] and rooms.put(ONE, announce("c"), 0.0)


def test_each_expires_in_its_time_with_the_outcome_for_a_request_that_comes_late() -> None:
    rooms = UnclaimedRooms(30.0)
    rooms.put(ONE, announce("a"), 0.0)
    rooms.put(ONE, Failed(room="b", reason="no memory", code=507, drained=True), 1.0)
    rooms.put(ONE, announce("a"), 2.0)  # again: its time starts anew
    assert rooms.take_expired(30.9) == []
    ((item, outcome),) = rooms.take_expired(31.0)
    assert item.message.room == "b" and (outcome.reason, outcome.code) == ("no memory", 507)
    ((item, outcome),) = rooms.take_expired(32.0)
    assert item.message == announce("a") and outcome.code == 408 and "30 s" in outcome.reason
    assert not rooms
