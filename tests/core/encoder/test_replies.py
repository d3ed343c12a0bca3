"""The messages that the encoder sends about a room, and the records from which it answers late ones."""

from __future__ import annotations

import pytest

from sglang_mm_conn.core.actions import Send
from sglang_mm_conn.core.encoder import replies
from sglang_mm_conn.core.encoder.replies import DONE_SECONDS, Replies, failed_message, status_reply
from sglang_mm_conn.core.encoder.sender_room import RegisteredSession, SenderRoom, TransferEmbeddingInfo
from sglang_mm_conn.core.layout import Geometry
from sglang_mm_conn.core.messages import Done, Failed, Progress
from sglang_mm_conn.core.outcomes import Outcome
from sglang_mm_conn.core.rooms import new_room_base
from sglang_mm_conn.core.states import WindowState
from sglang_mm_conn.core.tombstones import Tombstones

SERVER = "5e" * 8
SESSION = RegisteredSession(
    mooncake_session_id="10.0.0.1:17001", peer="p", incarnation="1a" * 8, server=SERVER, rank=0, size=1,
    geometry=Geometry(40, 8, 1),
)  # fmt: skip


def room_with(*states: WindowState) -> tuple[SenderRoom, TransferEmbeddingInfo]:
    """A room whose one window has gone through ``states``."""
    entry = SenderRoom("a", SERVER, 10, 4, "float32", 60.0, 0.0, metadata=b"meta")
    info = TransferEmbeddingInfo("a", SESSION.mooncake_session_id, 1, [0], 10)
    entry.transfer_infos[SESSION.mooncake_session_id] = info
    for state in states:
        info.machine.transition_to(state)
    return entry, info


def answer_to(made: Replies, room: str, entry: SenderRoom | None = None) -> Failed:
    message = made.to_offer_of_ended(room, SESSION, entry).message
    assert isinstance(message, Failed)
    return message


def test_only_a_confirmed_window_is_reported_as_confirmed_and_carries_the_metadata() -> None:
    entry, info = room_with()
    assert status_reply(entry, info, SESSION, "").message == Progress(room="a", window=-1, sent_tokens=0)
    entry, info = room_with(WindowState.WRITING)
    assert status_reply(entry, info, SESSION, "").message == Progress(room="a", window=-1, sent_tokens=0)
    info.machine.transition_to(WindowState.PARTIAL)
    info.sent_tokens = 5
    confirmed = Progress(room="a", window=0, sent_tokens=5, metadata=b"meta")
    assert status_reply(entry, info, SESSION, "").message == confirmed


def test_a_refusal_is_never_taken_for_a_completion() -> None:
    entry, info = room_with(WindowState.WRITING, WindowState.DONE)
    assert isinstance(status_reply(entry, info, SESSION, "").message, Done)
    refused = status_reply(entry, info, SESSION, "no", 3).message
    assert isinstance(refused, Progress) and (refused.refused, refused.refused_window) == ("no", 3)


def test_a_completion_is_repeated_until_its_time_is_over() -> None:
    made = Replies(Tombstones())
    done = Done(room="a", window=0, total_tokens=10)
    made.done("a", SESSION.mooncake_session_id, done, 0.0)
    made.sweep(DONE_SECONDS - 0.1)
    assert made.to_offer_of_ended("a", SESSION, None) == Send("p", done)
    made.sweep(DONE_SECONDS)
    assert answer_to(made, "a").code == 404


def test_completions_and_failures_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "DONE_LIMIT", 2)
    tombstones = Tombstones()
    made = Replies(tombstones)
    rooms = [new_room_base(SERVER) for _ in range(5)]
    for room in rooms:
        tombstones.put(room, Outcome("why", 500), 60.0)
        made.failed(room)
        made.done(room, SESSION.mooncake_session_id, Done(room=room, window=0, total_tokens=1), 0.0)
    told = [action.message for action in made.failures_for(SESSION, {}) if isinstance(action, Send)]
    assert [message.room for message in told if isinstance(message, Failed)] == rooms[-2:]
    answers = [made.to_offer_of_ended(room, SESSION, None).message for room in rooms]
    assert [isinstance(answer, Done) for answer in answers] == [False] * 3 + [True] * 2


def test_a_session_hears_only_of_the_failures_of_its_server_whose_outcome_is_known() -> None:
    tombstones = Tombstones()
    made = Replies(tombstones)
    forgotten, others = new_room_base(SERVER), new_room_base("0a" * 8)
    tombstones.put(others, Outcome("why", 500), 60.0)
    made.failed(forgotten)
    made.failed(others)
    assert made.failures_for(SESSION, {}) == []


def test_a_write_in_doubt_is_not_called_drained_until_its_epoch_is_retired() -> None:
    made = Replies(Tombstones())
    made.doubt("a", SESSION.mooncake_session_id, 3)
    assert made.is_in_doubt("a", SESSION.mooncake_session_id) and not made.is_in_doubt("a", "10.0.0.2:17001")
    made.epoch_retired(SESSION.mooncake_session_id, 2)
    made.epoch_retired("10.0.0.2:17001", 3)
    assert not answer_to(made, "a").drained
    made.epoch_retired(SESSION.mooncake_session_id, 3)
    assert answer_to(made, "a").drained


@pytest.mark.parametrize(
    ("states", "drained"),
    [
        ((), True),
        ((WindowState.WRITING,), False),
        ((WindowState.WRITING, WindowState.IN_DOUBT), False),
        ((WindowState.WRITING, WindowState.CLOSED), True),
    ],
)
def test_an_ended_room_is_called_drained_only_without_a_write_of_this_session(
    states: tuple[WindowState, ...], drained: bool
) -> None:
    entry, _ = room_with(*states)
    entry.outcome = Outcome("why", 500)
    assert answer_to(Replies(Tombstones()), "a", entry).drained is drained


def test_a_failure_always_has_a_reason_and_the_status_of_an_error() -> None:
    message = failed_message("a", Outcome("", 200), drained=True)
    assert message.reason and message.code == 410
