"""Writes to a session: never more concurrently than its limit, first come, first served."""

from __future__ import annotations

from sglang_mm_conn.core.encoder.sender_room import RegisteredSession, SenderRoom, TransferEmbeddingInfo
from sglang_mm_conn.core.encoder.write_slots import WriteSlots
from sglang_mm_conn.core.layout import Geometry
from sglang_mm_conn.core.states import SenderState, WindowState

SESSION_ID = "10.0.0.1:17001"
SESSION = RegisteredSession(
    mooncake_session_id=SESSION_ID, peer="p", incarnation="1a" * 8, server="5e" * 8, rank=0, size=1,
    geometry=Geometry(40, 8, 1), most_writes=1,
)  # fmt: skip


def rooms(names: str) -> dict[str, SenderRoom]:
    made = {}
    for name in names:
        entry = SenderRoom(name, "5e" * 8, 10, 4, "float32", 60.0, 0.0)
        entry.machine.transition_to(SenderState.TRANSFERRING)
        entry.transfer_infos[SESSION_ID] = TransferEmbeddingInfo(name, SESSION_ID, 1, [0], 10)
        made[name] = entry
    return made


def test_who_finds_no_slot_gets_the_next_in_turn() -> None:
    slots, known = WriteSlots(), rooms("abc")
    assert [slots.take(SESSION, name) for name in "abc"] == [True, False, False]
    slots.give_back(SESSION_ID)
    assert slots.next_room(SESSION_ID, known) is known["b"]
    assert slots.next_room(SESSION_ID, known) is known["c"]
    assert slots.next_room(SESSION_ID, known) is None
    assert not slots.writes and not slots.deferred


def test_a_room_that_is_gone_failed_or_served_meanwhile_is_passed_over() -> None:
    slots, known = WriteSlots(), rooms("abcde")
    for name in "abcde":
        slots.take(SESSION, name)
    del known["b"]
    known["c"].machine.transition_to(SenderState.FAILED)
    known["d"].transfer_infos[SESSION_ID].machine.transition_to(WindowState.WRITING)
    assert slots.next_room(SESSION_ID, known) is known["e"]


def test_a_turn_that_was_not_used_is_passed_on() -> None:
    slots = WriteSlots()
    assert slots.take(SESSION, "a") and not slots.take(SESSION, "b")
    assert slots.idle({SESSION_ID: SESSION}) == []
    assert slots.idle({}) == [SESSION_ID], "no write is under way to a lost session"
    slots.give_back(SESSION_ID)
    assert slots.idle({SESSION_ID: SESSION}) == [SESSION_ID]
    assert not slots.writes
