"""The language side's core: offers, resumes, quarantine and its proofs, waiting, deadlines."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sglang_mm_conn.core.actions import Action, Ended, Send
from sglang_mm_conn.core.errors import ConnError, ProtocolError
from sglang_mm_conn.core.language import offers, receiver, unclaimed
from sglang_mm_conn.core.language.receiver_room import Peer
from sglang_mm_conn.core.messages import (
    Abort,
    Announce,
    Done,
    Drained,
    Failed,
    Init,
    Message,
    Progress,
    Resume,
    decode_from_language,
)
from sglang_mm_conn.core.outcomes import Outcome
from sglang_mm_conn.core.rooms import new_room_base
from sglang_mm_conn.core.states import Poll, ReceiverState
from tests.core.harness import ENCODER, LIMIT, Wire, metadata_of, only, sends


def announce_of(room: str, tokens: int = 2000, row_bytes: int = 4, dtype: str = "float32") -> Announce:
    return Announce(room=room, total_tokens=tokens, row_bytes=row_bytes, dtype=dtype)


def at_expected() -> tuple[Wire, str]:
    wire = Wire(first_offer=1024)
    room = wire.room()
    wire.expect(room)
    return wire, room


def at_offered(path: str = "shm", first_offer: int | None = 1024) -> tuple[Wire, str]:
    """Window 0 is offered; the Init is not delivered."""
    wire = Wire(first_offer=first_offer, path=path)
    room = wire.start(2000)
    wire.deliver_to_rank(wire.rank)
    return wire, room


def at_copying() -> tuple[Wire, str]:
    """Window 0 is confirmed, its rows are being copied out."""
    wire, room = at_offered()
    wire.settle(until=lambda: bool(wire.rank.copies))
    return wire, room


def state(wire: Wire, room: str) -> tuple[object, ...]:
    entry = wire.rank.core.rooms[room]
    allocator = wire.rank.core.allocator
    return (
        entry.state, entry.window, tuple(entry.blocks), entry.allocated_tokens, entry.sent_tokens, entry.metadata,
        entry.total_tokens, allocator.free_count, allocator.held_count, allocator.quarantined_count,
    )  # fmt: skip


# -- offers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "first_offer", "offered", "blocks"),
    [
        (2000, 1024, 1024, 8),
        (2000, None, 2000, 16),
        (100, 1024, 100, 1),  # never more than is needed
        (129, None, 129, 2),
        (5000, None, 2048, 16),  # never more than there is
        (5000, 8000, 2048, 16),
        (2000, 130, 130, 2),
    ],
)
def test_the_offer_is_the_smallest_of_needed_free_and_set(
    tokens: int, first_offer: int | None, offered: int, blocks: int
) -> None:
    wire = Wire(first_offer=first_offer)
    wire.start(tokens)
    wire.deliver()
    (init,) = only(wire.to_encoder, Init)
    assert init.allocated_tokens == offered and len(init.dst_embedding_indices) == blocks


def test_allocated_tokens_is_the_capacity_of_the_blocks_also_for_narrower_rows() -> None:
    wire = Wire(blocks=2, block_rows=10, row_bytes=8)
    room = wire.start(100, row_bytes=3)  # 160 bytes hold 53 rows of 3
    wire.deliver()
    (init,) = only(wire.to_encoder, Init)
    assert init.allocated_tokens == 53
    wire.settle()
    assert wire.succeeded(room)


@pytest.mark.parametrize(("tokens", "first_offer"), [(1, None), (128, None), (129, 1), (2000, 300), (2049, None)])
def test_any_number_of_resumes_gives_the_right_bytes(tokens: int, first_offer: int | None) -> None:
    wire = Wire(blocks=3, first_offer=first_offer, regions=3)
    room = wire.start(tokens)
    wire.settle()
    assert wire.succeeded(room)
    windows = [resume.window for resume in only(wire.to_encoder, Resume)]
    assert windows == list(range(1, len(windows) + 1)) and len(windows) == wire.rank.core.rooms[room].resumes
    assert len({chunk.queue_idx for chunk in wire.chunk_log}) == 1
    wire.assert_baseline()


def test_an_embedding_larger_than_the_pool_passes_through_it() -> None:
    wire = Wire(blocks=2, block_rows=4)
    room = wire.start(1000)
    wire.settle()
    assert wire.succeeded(room)
    assert wire.rank.core.rooms[room].resumes == 124


def test_metadata_arrives_with_window_0_and_not_again() -> None:
    wire = Wire(blocks=2, block_rows=4)
    room = wire.start(30)
    wire.settle()
    assert wire.rank.core.rooms[room].metadata == metadata_of(room)
    carried = [message.metadata for message in wire.to_rank if isinstance(message, Progress | Done)]
    assert carried == [metadata_of(room), b"", b"", b""]


def test_a_room_on_two_ranks_arrives_on_both() -> None:
    wire = Wire(ranks=2, blocks=3, first_offer=200)
    rooms = [wire.start(tokens) for tokens in (500, 10, 1111)]
    wire.settle()
    assert all(wire.succeeded(room) for room in rooms)
    wire.assert_baseline()


def test_a_row_that_no_block_can_hold_fails_naming_both_sizes() -> None:
    wire = Wire(block_rows=2, row_bytes=4)
    room = wire.room()
    wire.expect(room)
    wire.announce(room, 10, row_bytes=9)
    wire.settle()
    assert "9 bytes" in wire.rank.ended[room].reason and "8 bytes" in wire.rank.ended[room].reason
    assert room in wire.encoder_ended
    wire.assert_baseline()


def test_an_embedding_over_the_limit_fails_naming_the_setting() -> None:
    wire = Wire(max_embedding_bytes=1000)
    room = wire.start(251)
    wire.settle()
    assert wire.rank.ended[room].code == 413
    assert "SGLANG_MM_CONN_MAX_EMBEDDING_BYTES=1000" in wire.rank.ended[room].reason
    fits = wire.start(250)
    wire.settle()
    assert wire.succeeded(fits)


def test_resume_transfer_of_rows_that_are_not_here_is_refused() -> None:
    wire, room = at_copying()
    with pytest.raises(ConnError, match="sent_tokens=1024, but 0 are copied out"):
        wire.rank.core.resume_transfer(wire.rank.core.rooms[room], [9], 1024, 128, wire.now)


# -- claims --------------------------------------------------------------------------------------------------------


def test_an_announcement_that_comes_before_its_request_waits_for_it() -> None:
    wire = Wire()
    room = wire.room()
    wire.announce(room, 100)
    wire.compute(room)
    wire.settle()
    assert not wire.to_encoder and room in wire.rank.core.unclaimed
    wire.expect(room)
    wire.settle()
    assert wire.succeeded(room)
    wire.assert_baseline()


def test_a_failure_that_comes_before_its_request_reaches_it() -> None:
    wire = Wire()
    room = wire.room()
    wire.announce(room, 100)
    wire.perform_encoder(wire.encoder.fail(room, "no such image", 400, wire.now))
    wire.settle()
    wire.expect(room)
    assert wire.rank.ended[room] == Ended(room, Outcome("no such image", 400))


def test_an_announcement_that_no_request_claims_releases_its_encode_soon() -> None:
    wire = Wire(claim_timeout=30.0, send_timeout=600.0)
    room = wire.room()
    wire.announce(room, 100)
    wire.compute(room)
    wire.deliver()
    wire.tick(29.0)
    assert room in wire.rank.core.unclaimed
    wire.tick(1.0)
    wire.settle()
    assert wire.encoder_ended[room].code == 499 and "no request claimed" in wire.encoder_ended[room].reason
    wire.assert_baseline()
    wire.expect(room)  # the late request fails at once: its encode was released
    assert wire.rank.ended[room].code == 408 and "no request claimed" in wire.rank.ended[room].reason


def test_an_arrived_room_that_is_announced_again_is_not_aborted_for_other_ranks() -> None:
    wire = Wire(ranks=2)
    room = wire.start(100)
    first, second = wire.ranks
    wire.settle(until=lambda: any(wire.chunks))
    write = wire.begin_write()
    assert write is not None and write.session.mooncake_session_id == first.session_id
    wire.end_write(write)  # the write to the second rank begins, and takes long
    while wire.deliver_to_rank(first):
        pass
    wire.copy_out(first)
    assert first.ended[room].success and room not in second.ended and wire.writing
    wire.reconnect(first)
    wire.deliver()
    wire.settle()
    assert wire.succeeded(room)


def test_the_refusal_of_an_old_offer_that_was_said_twice_changes_nothing() -> None:
    wire = Wire(first_offer=100, blocks=2, block_rows=100)
    room = wire.start(500)
    wire.settle(until=lambda: wire.rank.core.rooms[room].window == 1)
    old = only([decode_from_language(frame, LIMIT) for frame in wire.rank.outbox], Resume)[0]
    wire.settle(until=lambda: wire.rank.core.rooms[room].window == 2)
    wire.deliver_to_encoder(wire.rank)
    (answer,) = wire.inject_to_encoder(old)
    assert isinstance(answer, Progress) and answer.refused and answer.refused_window == 1
    wire.settle()
    assert wire.succeeded(room)


def test_an_announcement_after_the_abort_is_answered_with_abort() -> None:
    wire, room = at_expected()
    wire.abort(room)
    wire.announce(room, 100)
    wire.settle()
    assert room in wire.encoder_ended and not wire.encoder.rooms
    wire.rank.core.forget(room)
    assert only(wire.inject_to_rank(announce_of(room)), Abort)
    wire.assert_baseline()


@pytest.mark.parametrize("again", ["alive", "ended"])
def test_a_room_is_expected_once(again: str) -> None:
    wire, room = at_expected()
    if again == "ended":
        wire.abort(room)
    with pytest.raises(ConnError, match="before"):
        wire.rank.core.expect(room, ENCODER, wire.now + 1, wire.now)


def test_a_stale_success_is_not_found_by_a_room_of_the_same_name() -> None:
    wire = Wire()
    room = wire.start(100)
    wire.settle()
    wire.rank.core.forget(room)
    assert room not in wire.rank.core.rooms
    with pytest.raises(ConnError):
        wire.expect(room)


def test_unclaimed_announcements_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unclaimed, "UNCLAIMED_LIMIT", 3)
    wire = Wire()
    for _ in range(5):
        wire.announce(wire.room(), 10)
    wire.deliver()
    assert len(wire.rank.core.unclaimed) == 3


def test_an_encoder_that_announces_nonsense_leaves_capacity_for_another_encoder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unclaimed, "UNCLAIMED_LIMIT", 3)
    core = Wire().rank.core
    for incarnation in ("mad", "sane"):
        core.peer_ready(Peer(incarnation, "127.0.0.1:1", "shm", exclusive_lock=True), 0.0)

    def announce(incarnation: str) -> list[Action]:
        room = new_room_base("0" * 16)
        return core.on_message(incarnation, Announce(room=room, total_tokens=1, row_bytes=4, dtype="float32"), 0.0)

    said = [announce("mad") for _ in range(5)]
    assert [len(actions) for actions in said] == [0, 0, 0, 1, 1], "rooms above the limit are aborted"
    assert not announce("sane") and len(core.unclaimed) == 4
    core.tick(1e6)
    assert not core.unclaimed and not announce("mad") and not announce("sane"), "removed rooms no longer count"


def test_an_encoder_that_cannot_be_used_fails_only_what_waits_for_it() -> None:
    wire, announced = at_offered()
    waiting, other = wire.room(), wire.room()
    wire.expect(waiting)
    wire.rank.core.expect(other, "http://other", wire.now + 60, wire.now)
    wire.perform_rank(wire.rank, wire.rank.core.encoder_failed(ENCODER, "refused us", 502, wire.now))
    assert set(wire.rank.ended) == {waiting}
    wire.settle()
    assert wire.succeeded(announced)


# -- messages out of turn ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", [announce_of("room"), Drained(room="room")])
def test_a_message_of_a_process_that_is_not_registered_is_a_protocol_error(message: Message) -> None:
    with pytest.raises(ProtocolError, match="not registered"):
        Wire().rank.core.on_message("stranger", message, 0.0)  # type: ignore[arg-type]


def test_a_repeated_announcement_repeats_the_offer_and_changes_nothing() -> None:
    wire, room = at_offered()
    before = state(wire, room)
    (init,) = wire.inject_to_rank(announce_of(room))
    assert isinstance(init, Init) and init.allocated_tokens == 1024
    assert state(wire, room) == before
    wire.settle()
    assert wire.succeeded(room)


def test_a_repeated_announcement_while_rows_are_copied_says_nothing() -> None:
    wire, room = at_copying()
    before = state(wire, room)
    assert wire.inject_to_rank(announce_of(room)) == []
    assert state(wire, room) == before


@pytest.mark.parametrize("other", [{"tokens": 1999}, {"row_bytes": 8}, {"dtype": "bfloat16"}])
def test_two_announcements_that_contradict_fail_the_room(other: dict[str, object]) -> None:
    wire, room = at_offered()
    wire.inject_to_rank(announce_of(room, **other))  # type: ignore[arg-type]
    assert "twice" in wire.rank.ended[room].reason and wire.rank.core.quarantine
    wire.settle()
    wire.assert_baseline()


def test_progress_before_any_announcement_fails_the_room() -> None:
    wire, room = at_expected()
    wire.inject_to_rank(Progress(room=room, window=0, sent_tokens=5))
    assert "before Announce" in wire.rank.ended[room].reason


@pytest.mark.parametrize(
    "message",
    [
        Progress(room="", window=-1, sent_tokens=0),
        Progress(room="", window=0, sent_tokens=1024),
        Progress(room="", window=0, sent_tokens=1024, metadata=b"other"),
    ],
)
def test_a_stale_or_repeated_progress_changes_nothing(message: Progress) -> None:
    wire, room = at_copying()
    stale = Progress(room=room, window=message.window, sent_tokens=message.sent_tokens, metadata=message.metadata)
    for _ in range(3):  # copying, offered for window 1, copying again
        before = state(wire, room)
        assert wire.inject_to_rank(stale) == []
        assert state(wire, room) == before
        if wire.rank.copies:
            wire.copy_out()
        else:
            wire.settle(until=lambda: bool(wire.rank.copies))
    wire.settle()
    assert wire.succeeded(room)


def test_rows_are_gathered_once_however_often_the_status_is_told() -> None:
    wire, room = at_copying()
    for _ in range(3):
        wire.inject_to_rank(Progress(room=room, window=0, sent_tokens=1024))
    assert len(wire.rank.copies) == 1
    wire.copy_out()
    assert len([frame for frame in wire.rank.outbox if b"resume" in frame]) == 1


@pytest.mark.parametrize(
    "message",
    [
        Progress(room="", window=0, sent_tokens=1023),
        Progress(room="", window=0, sent_tokens=2000),
        Progress(room="", window=1, sent_tokens=1024),
        Done(room="", window=0, total_tokens=2000),  # done after a partial
        Done(room="", window=0, total_tokens=1024),
        Done(room="", window=1, total_tokens=2000),
        Progress(room="", window=-1, sent_tokens=0, refused="no room here"),
    ],
)
def test_a_completion_that_contradicts_the_offer_fails_the_room_and_frees_no_block(message: Progress | Done) -> None:
    wire, room = at_offered()
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    wire.inject_to_rank(type(message)(**{**fields, "room": room}))
    assert wire.rank.ended[room].code == 502
    assert wire.rank.core.rooms[room].poll() is Poll.Failed
    assert wire.rank.core.allocator.quarantined_count == 8 and not wire.rank.copies
    wire.settle()
    assert room in wire.encoder_ended
    wire.assert_baseline()


def test_a_last_window_that_is_called_partial_fails_the_room() -> None:
    wire = Wire()
    room = wire.start(100)
    wire.deliver_to_rank(wire.rank)
    wire.inject_to_rank(Progress(room=room, window=0, sent_tokens=100))
    assert not wire.rank.ended[room].success


def test_success_needs_done_and_the_last_rows_copied_out() -> None:
    wire = Wire()
    room = wire.start(100)
    wire.settle(until=lambda: bool(wire.rank.copies))
    assert wire.encoder_ended[room].success and room not in wire.rank.ended
    assert wire.rank.core.rooms[room].poll() is Poll.Transferring
    wire.copy_out()
    assert wire.rank.core.rooms[room].poll() is Poll.Success


@pytest.mark.parametrize(
    "message",
    [
        Progress(room="", window=0, sent_tokens=5),
        Done(room="", window=0, total_tokens=100),
        Failed(room="", reason="late", code=500, drained=True),
        Drained(room=""),
    ],
)
@pytest.mark.parametrize("success", [True, False])
def test_a_final_state_is_final_whatever_comes_later(message: Message, success: bool) -> None:
    wire = Wire()
    room = wire.start(100)
    if not success:
        wire.abort(room)
    wire.settle()
    before = state(wire, room)
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    assert wire.inject_to_rank(type(message)(**{**fields, "room": room})) == []
    assert state(wire, room) == before and wire.rank.ended[room].success is success


def test_drained_without_being_asked_fails_the_room() -> None:
    wire, room = at_offered()
    wire.inject_to_rank(Drained(room=room))
    assert not wire.rank.ended[room].success


def second_process(wire: Wire) -> Peer:
    peer = Peer("e1" * 8, wire.rank.session_id, "shm", exclusive_lock=True)
    wire.perform_rank(wire.rank, wire.rank.core.peer_ready(peer, wire.now))
    return peer


def test_a_second_process_that_announces_a_room_gets_one_abort_and_no_endless_loop() -> None:
    wire, room = at_offered()
    peer = second_process(wire)
    before = state(wire, room)
    actions = wire.rank.core.on_message(peer.incarnation, announce_of(room), wire.now)
    (abort,) = sends(actions)
    assert isinstance(abort, Abort) and "another encoder process" in abort.reason
    for answer in (Drained(room=room), Failed(room=room, reason="x", code=500, drained=True)):
        assert wire.rank.core.on_message(peer.incarnation, answer, wire.now) == []
    assert state(wire, room) == before
    wire.settle()
    assert wire.succeeded(room)


def test_drained_of_another_process_does_not_fail_a_room_that_nobody_announced() -> None:
    wire, room = at_expected()
    peer = second_process(wire)
    assert wire.rank.core.on_message(peer.incarnation, Drained(room=room), wire.now) == []
    wire.announce(room, 100)
    wire.compute(room)
    wire.settle()
    assert wire.succeeded(room)


# -- quarantine and its proofs -------------------------------------------------------------------------------------


PROOFS: dict[str, Callable[[str], Progress | Drained | Failed]] = {
    "Progress of that window": lambda room: Progress(room=room, window=0, sent_tokens=1024),
    "Drained": lambda room: Drained(room=room),
    "Failed, drained": lambda room: Failed(room=room, reason="x", code=500, drained=True),
}
NO_PROOFS = {
    "Progress of no window": lambda room: Progress(room=room, window=-1, sent_tokens=0),
    "refusal of no window": lambda room: Progress(room=room, window=-1, sent_tokens=0, refused="x"),
    "Progress of that window with other rows": lambda room: Progress(room=room, window=0, sent_tokens=0),
    "refusal that names that window": lambda room: Progress(room=room, window=0, sent_tokens=1024, refused="x"),
    "Done when rows remain": lambda room: Done(room=room, window=0, total_tokens=2000),
    "Failed, not drained": lambda room: Failed(room=room, reason="x", code=500, drained=False),
    "another announcement": announce_of,
    "Drained of another room": lambda room: Drained(room=room + "_local_part_1"),
}


@pytest.mark.parametrize("name", NO_PROOFS)
def test_what_is_no_proof_leaves_the_blocks_in_quarantine(name: str) -> None:
    wire, room = at_offered()
    wire.abort(room)
    wire.inject_to_rank(NO_PROOFS[name](room))
    assert wire.rank.core.allocator.quarantined_count == 8
    assert {held.blocks for held in wire.rank.core.quarantine.values()} == {tuple(range(8))}
    assert wire.rank.core.quarantined_peers()


@pytest.mark.parametrize("name", PROOFS)
def test_each_proof_frees_the_blocks_once(name: str) -> None:
    wire, room = at_offered()
    wire.abort(room)
    assert wire.rank.core.allocator.quarantined_count == 8
    wire.inject_to_rank(PROOFS[name](room))
    assert wire.rank.core.allocator.free_count == 16 and not wire.rank.core.quarantined_peers()
    assert wire.inject_to_rank(PROOFS[name](room)) == []


def test_done_of_the_last_window_frees_its_blocks() -> None:
    wire, room = at_offered(first_offer=None)
    wire.abort(room)
    held = wire.rank.core.allocator.quarantined_count
    assert held
    wire.inject_to_rank(Done(room=room, window=0, total_tokens=2000))
    assert wire.rank.core.allocator.quarantined_count == 0


@pytest.mark.parametrize("name", PROOFS)
def test_a_proof_of_another_process_is_none(name: str) -> None:
    wire, room = at_offered()
    wire.abort(room)
    peer = second_process(wire)
    wire.perform_rank(wire.rank, wire.rank.core.on_message(peer.incarnation, PROOFS[name](room), wire.now))
    assert wire.rank.core.allocator.quarantined_count == 8


@pytest.mark.parametrize("name", PROOFS)
def test_what_a_process_says_about_another_session_is_no_proof(name: str) -> None:
    # The encoder answers for the new session, where it does not know the room. It still writes through the old one.
    wire, room = at_offered()
    peer = Peer(wire.incarnation, "10.0.0.1:17999", "mooncake", exclusive_lock=False)
    wire.perform_rank(wire.rank, wire.rank.core.peer_ready(peer, wire.now))
    assert "session" in wire.rank.ended[room].reason
    wire.inject_to_rank(PROOFS[name](room))
    assert wire.rank.core.allocator.quarantined_count == 8


@pytest.mark.parametrize("old", [0, 1])
def test_a_confirmation_of_an_older_window_is_no_proof_for_the_later(old: int) -> None:
    wire = Wire(blocks=2, block_rows=4)
    room = wire.start(40)
    wire.settle(until=lambda: wire.rank.core.rooms[room].window == 2)
    wire.abort(room)
    wire.inject_to_rank(Progress(room=room, window=old, sent_tokens=8 * (old + 1)))
    assert wire.rank.core.allocator.quarantined_count == 2
    wire.settle()
    wire.assert_baseline()


def test_the_end_of_the_process_is_a_proof_only_for_that_process() -> None:
    wire, room = at_offered()
    wire.perform_rank(wire.rank, wire.rank.core.peer_lost(wire.incarnation, "silent", wire.now))
    assert wire.rank.ended[room].reason == "silent" and wire.rank.core.allocator.quarantined_count == 8
    wire.perform_rank(wire.rank, wire.rank.core.writer_gone("another", wire.now))
    assert wire.rank.core.allocator.quarantined_count == 8
    wire.perform_rank(wire.rank, wire.rank.core.writer_gone(wire.incarnation, wire.now))
    assert wire.rank.core.allocator.free_count == 16


def test_a_free_lock_proves_nothing_about_a_mooncake_write() -> None:
    wire, room = at_offered(path="mooncake")
    wire.abort(room)
    wire.perform_rank(wire.rank, wire.rank.core.writer_gone(wire.incarnation, wire.now))
    assert wire.rank.core.allocator.quarantined_count == 8


def test_silence_and_time_are_no_proofs() -> None:
    wire, room = at_offered()
    wire.silent(wire.rank)
    for _ in range(3):
        wire.tick(receiver.TOMBSTONE_SECONDS)
    assert wire.rank.core.allocator.quarantined_count == 8 and room not in wire.rank.core.tombstones


@pytest.mark.parametrize("at", [at_expected, at_offered, at_copying])
@pytest.mark.parametrize("how", ["abort", "deadline", "peer lost"])
def test_a_room_that_ends_in_any_state_frees_what_is_proven_and_nothing_else(at: object, how: str) -> None:
    wire, room = at()  # type: ignore[operator]
    allocator = wire.rank.core.allocator
    was = wire.rank.core.rooms[room].state
    if how == "abort":
        wire.abort(room)
    elif how == "deadline":
        wire.tick(60.0)
    else:
        wire.silent(wire.rank)
    expected = {
        ReceiverState.EXPECTED: (16, 0, 0),
        ReceiverState.OFFERED: (8, 0, 8),  # the encoder may write
        ReceiverState.COPYING: (8, 8, 0),  # the copier reads
    }[was]
    assert (allocator.free_count, allocator.held_count, allocator.quarantined_count) == expected
    assert room in wire.rank.ended or (was is ReceiverState.EXPECTED and how == "peer lost")
    wire.work()  # the copier is done; its report does not revive the room
    wire.abort(room)
    wire.reconnect()
    wire.settle()
    assert not wire.rank.ended[room].success
    wire.assert_baseline()


def test_a_late_write_of_an_aborted_room_lands_in_quarantine_not_in_reused_blocks() -> None:
    wire = Wire(blocks=8)
    room = wire.start(1024)
    wire.deliver()
    write = wire.begin_write()
    assert write is not None
    wire.abort(room)
    following = wire.start(1024)
    wire.deliver()
    assert wire.rank.core.rooms[following].state is ReceiverState.QUEUED  # nothing is free
    wire.end_write(write)  # asserts whose blocks these are
    wire.settle()
    assert wire.succeeded(following) and not wire.rank.ended[room].success


def test_a_room_forgotten_during_its_copy_keeps_its_blocks_until_the_copier_ends() -> None:
    wire, room = at_copying()
    wire.abort(room)
    wire.rank.core.forget(room)
    wire.check()
    assert wire.rank.core.allocator.held_count == 8
    wire.copy_out()
    assert room not in wire.rank.core.rooms and wire.rank.core.allocator.free_count == 16


def test_a_living_room_is_not_forgotten() -> None:
    wire, room = at_offered()
    wire.rank.core.forget(room)
    wire.settle()
    assert wire.succeeded(room)


def test_a_copy_reported_twice_is_refused_and_frees_nothing_twice() -> None:
    wire, room = at_copying()
    wire.copy_out()
    before = state(wire, room)
    with pytest.raises(ConnError, match="window 0"):
        wire.rank.core.on_copied(room, 0, "", wire.now)
    assert state(wire, room) == before


def test_a_copy_that_fails_ends_the_room_and_frees_its_blocks() -> None:
    wire, room = at_copying()
    wire.copy_out(error="checksum")
    assert wire.rank.ended[room].reason == "checksum"
    wire.settle()
    assert room in wire.encoder_ended
    wire.assert_baseline()


# -- waiting -------------------------------------------------------------------------------------------------------


def test_whoever_waits_for_blocks_holds_none_and_the_longest_wait_is_served_first() -> None:
    wire = Wire(blocks=4, block_rows=10)
    first = wire.start(100)
    wire.deliver()
    waiting = [wire.start(tokens) for tokens in (30, 5, 90)]
    wire.deliver()
    for room in waiting:
        entry = wire.rank.core.rooms[room]
        assert entry.state is ReceiverState.QUEUED and not entry.blocks and entry.poll() is Poll.WaitingForInput
    served: list[str] = []
    wire.settle(until=lambda: bool(wire.rank.copies))
    wire.copy_out()
    # The three that waited come before the first, which waits for its second window.
    served = [room for room in waiting if wire.rank.core.rooms[room].state is ReceiverState.OFFERED]
    assert served == waiting[:2]
    assert wire.rank.core.rooms[first].state is ReceiverState.QUEUED and not wire.rank.core.rooms[first].blocks
    wire.settle()
    assert all(wire.succeeded(room) for room in [first, *waiting])
    wire.assert_baseline()


def test_many_rooms_larger_than_the_pool_share_it_without_deadlock_or_starvation() -> None:
    wire = Wire(blocks=3, block_rows=4)
    rooms = [wire.start(tokens) for tokens in (50, 1, 33, 120, 2, 64)]
    wire.settle()
    assert all(wire.succeeded(room) for room in rooms)
    offers = [message.room for message in wire.to_encoder if isinstance(message, Init | Resume)]
    # FIFO: between two turns of one room every other that waits has its turn.
    large = rooms[3]
    turns = [index for index, room in enumerate(offers) if room == large]
    for room in rooms:
        assert offers.index(room) < turns[1]
    wire.assert_baseline()


def test_the_head_of_the_queue_does_not_block_what_is_behind_it() -> None:
    wire = Wire(blocks=4, block_rows=10)
    holder = wire.start(30)
    wire.deliver()
    large, small = wire.start(1000), wire.start(1)
    wire.deliver()
    assert wire.rank.core.rooms[large].state is ReceiverState.OFFERED  # takes the one block that is free
    assert wire.rank.core.rooms[large].allocated_tokens == 10
    wire.settle()
    assert all(wire.succeeded(room) for room in (holder, large, small))


def test_a_room_that_ends_while_it_waits_is_passed_over() -> None:
    wire = Wire(blocks=1, block_rows=10)
    holder = wire.start(10)
    wire.deliver()
    gone, served = wire.start(10), wire.start(10)
    wire.deliver()
    wire.abort(gone)
    wire.settle()
    assert wire.succeeded(holder) and wire.succeeded(served)
    wire.assert_baseline()


def test_blocks_that_a_proof_frees_go_to_whoever_waits() -> None:
    wire = Wire(blocks=1, block_rows=10)
    room = wire.start(10)
    wire.deliver()
    waiting = wire.start(10)
    wire.deliver()
    wire.abort(room)
    assert wire.rank.core.rooms[waiting].state is ReceiverState.QUEUED
    wire.settle()
    assert wire.succeeded(waiting)


# -- deadlines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [at_expected, at_offered, at_copying])
def test_every_state_ends_at_the_deadline_and_says_why(at: object) -> None:
    wire, room = at()  # type: ignore[operator]
    value = wire.rank.core.rooms[room].state.value
    wire.now += 59.9
    wire.perform_rank(wire.rank, wire.rank.core.tick(wire.now))
    assert room not in wire.rank.ended
    wire.now += 0.2
    wire.perform_rank(wire.rank, wire.rank.core.tick(wire.now))
    assert wire.rank.ended[room].code == 408 and value in wire.rank.ended[room].reason
    assert wire.rank.core.rooms[room].poll() is Poll.Failed


def test_a_room_that_waits_for_blocks_ends_at_its_deadline_too() -> None:
    wire = Wire(blocks=1)
    wire.start(100)
    wire.deliver()
    room = wire.start(100, timeout=5.0)
    wire.deliver()
    wire.tick(5.0)
    assert "queued" in wire.rank.ended[room].reason
    wire.settle()
    assert room in wire.encoder_ended


@pytest.mark.parametrize("left", [0.2, 5.0, 10.0, 500.0])
def test_the_encoder_is_told_a_deadline_before_ours(left: float) -> None:
    wire = Wire()
    room = wire.room()
    wire.expect(room, timeout=left)
    (init,) = wire.inject_to_rank(announce_of(room))
    assert isinstance(init, Init) and 0.9 * left <= init.deadline < left
    assert left - init.deadline <= offers.DEADLINE_MARGIN_SECONDS + 1e-9


def test_an_offer_after_the_deadline_names_no_negative_time() -> None:
    wire, _ = at_copying()
    wire.now += 100.0
    wire.copy_out()
    resume = wire.deliver_to_encoder(wire.rank)
    assert isinstance(resume, Resume) and resume.deadline == 0.0


# -- lost connections ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("at", range(24))
def test_a_connection_lost_after_any_step_loses_nothing(at: int, ranks: int) -> None:
    """After the n-th event everything on its way is lost: Announce, Init, Progress, Resume and Done, each in turn."""
    wire = Wire(ranks=ranks, first_offer=1024)
    room = wire.start(2000)
    lost = wire.ranks[-1]
    count = 0

    def after() -> bool:
        nonlocal count
        count += 1
        return count > at

    wire.settle(until=after)
    wire.drop(lost)
    wire.work()  # continues while the connection is down
    wire.reconnect(lost)
    wire.settle()
    assert wire.succeeded(room)
    wire.assert_baseline()


@pytest.mark.parametrize("kind", ["announce", "init", "progress", "resume", "done"])
def test_each_kind_of_lost_message_is_made_good(kind: str) -> None:
    wire = Wire(first_offer=1024)
    room = wire.start(2000)
    rank = wire.rank

    def on_its_way() -> bool:
        return any(kind.encode() in frame for frame in [*rank.inbox, *rank.outbox])

    wire.settle(until=on_its_way)
    assert on_its_way()
    wire.drop()
    wire.reconnect()
    wire.settle()
    assert wire.succeeded(room)


@pytest.mark.parametrize("window", [0, 1])
def test_a_write_under_way_is_confirmed_on_the_connection_that_replaced_the_old_one(window: int) -> None:
    wire = Wire(first_offer=1024)
    room = wire.start(2000)
    wire.deliver()
    for _ in range(window):
        wire.work()
        wire.deliver()
        wire.work()
        wire.deliver()
    write = wire.begin_write()
    assert write is not None and write.window == window
    wire.drop()
    wire.reconnect()
    wire.deliver()  # the confirmed state: nothing new
    wire.end_write(write)
    wire.settle()
    assert wire.succeeded(room)


@pytest.mark.parametrize("write_ends", ["before the reconnect", "after it"])
def test_a_lost_abort_is_said_again_until_the_blocks_are_proven_free(write_ends: str) -> None:
    wire = Wire(first_offer=1024)
    room = wire.start(2000)
    wire.deliver()
    write = wire.begin_write()
    assert write is not None
    wire.abort(room)
    wire.drop()
    if write_ends == "before the reconnect":
        wire.end_write(write)
    wire.reconnect()
    wire.deliver()
    if write_ends == "after it":
        assert wire.rank.core.quarantine
        wire.end_write(write)
    wire.settle()
    assert room in wire.encoder_ended
    wire.assert_baseline()


def test_a_room_that_failed_meanwhile_is_answered_with_the_outcome() -> None:
    wire, room = at_offered()
    wire.drop()
    wire.perform_encoder(wire.encoder.fail(room, "out of memory", 500, wire.now))
    wire.reconnect()
    wire.settle()
    assert wire.rank.ended[room] == Ended(room, Outcome("out of memory", 500))
    wire.assert_baseline()


def test_an_encoder_restarted_within_the_heartbeat_is_noticed_and_its_rooms_fail() -> None:
    wire, room = at_offered()
    wire.restart_encoder()
    assert "restarted" in wire.rank.ended[room].reason
    wire.assert_baseline()  # shared memory: the old process's lock is free
    wire.reconnect()
    following = wire.start(3000)
    wire.settle()
    assert wire.succeeded(following)


def test_a_restarted_mooncake_encoder_leaves_its_offered_blocks_in_quarantine() -> None:
    wire, _ = at_offered(path="mooncake")
    wire.restart_encoder()
    wire.reconnect()
    following = wire.start(3000)
    wire.settle()
    assert wire.succeeded(following)
    assert wire.rank.core.allocator.quarantined_count == 8


def test_announcements_of_a_lost_process_are_not_claimed_later() -> None:
    wire = Wire()
    room = wire.room()
    wire.announce(room, 10)
    wire.deliver()
    wire.restart_encoder()
    wire.expect(room)
    assert wire.rank.core.rooms[room].state is ReceiverState.EXPECTED and not wire.rank.core.unclaimed


# -- nothing grows -------------------------------------------------------------------------------------------------


def test_tables_return_to_baseline_after_successes_failures_and_aborts() -> None:
    wire = Wire(blocks=4)
    for number in range(60):
        room = wire.start(1 + 37 * (number % 30))
        if number % 3 == 1:
            wire.settle(until=lambda: bool(wire.rank.copies))
            wire.abort(room)
        elif number % 3 == 2:
            wire.deliver()
            wire.perform_encoder(wire.encoder.fail(room, "out of memory", 500, wire.now))
        wire.settle()
        assert room in wire.rank.ended
    assert len(wire.rank.core.tombstones) == 60
    wire.assert_baseline()
    wire.tick(receiver.TOMBSTONE_SECONDS)
    assert len(wire.rank.core.tombstones) == 0 and not wire.rank.core.offers.waiting


def test_a_report_says_who_has_the_blocks_and_how_far_the_rooms_are() -> None:
    wire, room = at_offered()
    core = wire.rank.core
    core.on_message(wire.incarnation, announce_of(wire.room()), wire.now)
    idle = {"blocks": 16, "free": 16, "held": 0, "views": 0, "quarantined": 0, "rooms": {}, "unclaimed": 0}
    assert core.report() == {**idle, "free": 8, "held": 8, "rooms": {"offered": 1}, "unclaimed": 1}
    core.abort(room, "given up", 499, wire.now)
    assert core.report() == {**idle, "free": 8, "quarantined": 8, "rooms": {"failed": 1}, "unclaimed": 1}
    core.forget(room)
    core.writer_gone(wire.incarnation, wire.now)
    assert core.report() == {**idle, "unclaimed": 1}


def test_check_integrity_sees_blocks_that_no_room_accounts_for() -> None:
    wire, room = at_offered()
    wire.rank.core.rooms[room].blocks.pop()
    with pytest.raises(ConnError, match="rooms and views hold 7"):
        wire.rank.core.check_integrity()


# -- engine epochs (Mooncake) ------------------------------------------------------------------------------------------


def _in_doubt_on_mooncake() -> tuple[Wire, str]:
    """A room whose encoder was lost in mid-write, over Mooncake: its blocks are in quarantine."""
    wire = Wire(path="mooncake", first_offer=1024)
    room = wire.start(2000)
    wire.deliver()
    assert wire.begin_write() is not None
    core = wire.rank.core
    core.peer_lost(wire.incarnation, "gone", wire.now)
    assert core.allocator.quarantined_count == 8
    return wire, room


def test_blocks_in_doubt_are_free_when_their_epoch_is_revoked_and_not_before() -> None:
    wire, _ = _in_doubt_on_mooncake()
    core, session = wire.rank.core, wire.rank.session_id
    assert core.in_doubt_since(wire.rank.session_id) == wire.now and core.in_doubt_since("10.9.9.9:1") is None
    core.writer_gone(wire.incarnation, wire.now)  # a proof for paths with a lock only
    core.epoch_revoked("10.9.9.9:9", 0, wire.now)  # another session
    core.epoch_revoked(session, -1, wire.now)  # an earlier epoch
    assert core.allocator.quarantined_count == 8
    core.epoch_revoked(session, 0, wire.now)
    assert core.allocator.quarantined_count == 0 and core.in_doubt_since(wire.rank.session_id) is None
    core.check_integrity()


def test_an_epoch_is_in_use_while_a_peer_may_get_it_or_a_healthy_window_is_open() -> None:
    wire = Wire(path="mooncake", first_offer=1024)
    room = wire.start(2000)
    wire.deliver()
    core, session = wire.rank.core, wire.rank.session_id
    assert core.is_in_use(session, 0)
    core.peer_ready(Peer(wire.incarnation, session, "mooncake", exclusive_lock=False, epoch=1), wire.now)
    assert core.is_in_use(session, 0), "window 0 of the room was offered for epoch 0"
    core.on_message(wire.incarnation, Progress(room=room, window=0, sent_tokens=1024), wire.now)
    assert not core.is_in_use(session, 0)
    (action,) = core.on_copied(room, 0, "", wire.now)
    assert isinstance(action, Send) and isinstance(action.message, Resume) and action.message.epoch == 1
