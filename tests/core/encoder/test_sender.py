"""The encoder's core: which messages it accepts, which it refuses with the confirmed state, when it sends Drained."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from sglang_mm_conn.core.actions import Ended, Send, TransferEmbeddingChunk
from sglang_mm_conn.core.encoder import replies, sender
from sglang_mm_conn.core.encoder.sender_room import SenderRoom, WindowWrite
from sglang_mm_conn.core.errors import ConnError, IllegalTransition, ProtocolError
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
    decode_from_encoder,
)
from sglang_mm_conn.core.outcomes import LANDED, Outcome
from sglang_mm_conn.core.states import Poll, SenderState, WindowState
from tests.core.harness import SERVER, Rank, Wire, metadata_of, only


def at_partial(tokens: int = 2000, first_offer: int = 1024) -> tuple[Wire, str]:
    """A room whose window 0 is confirmed and copied out; the Resume for window 1 is not delivered."""
    wire = Wire(first_offer=first_offer)
    room = wire.start(tokens)
    wire.settle(until=lambda: any(b"resume" in frame for frame in wire.rank.outbox))
    return wire, room


def at_writing(ranks: int = 1) -> tuple[Wire, str, WindowWrite]:
    """A room whose first write is under way."""
    wire = Wire(ranks=ranks, first_offer=1024)
    room = wire.start(2000)
    wire.deliver()
    write = wire.begin_write()
    assert write is not None
    return wire, room, write


def test_what_is_offered_is_counted_over_all_ranks_and_without_what_is_being_written() -> None:
    wire = Wire(ranks=2, first_offer=1024)
    room = wire.start(2000)
    wire.deliver()
    entry = wire.encoder.rooms[room]
    assert [info.allocated_tokens for _, info in entry.offers] == [1024, 1024]
    assert entry.offered_bytes == 2 * 1024 * entry.row_bytes
    assert wire.begin_write() is not None
    assert len(entry.offers) == 1 and entry.offered_bytes == 1024 * entry.row_bytes


def init_of(room: str, rank: Rank, **change: object) -> Init:
    values: dict[str, object] = {
        "room": room,
        "mooncake_session_id": rank.session_id,
        "epoch": 0,
        "dst_embedding_indices": [0, 1],
        "allocated_tokens": 200,
        "required_dst_info_num": rank.session.size,
        "deadline": 30.0,
    }
    return msgspec.convert({**values, **change}, Init)


def resume_of(room: str, rank: Rank, **change: object) -> Resume:
    values: dict[str, object] = {
        "room": room,
        "mooncake_session_id": rank.session_id,
        "epoch": 0,
        "window": 1,
        "dst_embedding_indices": list(range(8)),
        "sent_tokens": 1024,
        "allocated_tokens": 976,
        "deadline": 30.0,
    }
    return msgspec.convert({**values, **change}, Resume)


def frozen(entry: SenderRoom) -> object:
    """All of the room that a refused message must not change."""
    infos = {
        key: (info.state, info.window, info.sent_tokens, info.allocated_tokens, list(info.dst_embedding_indices))
        for key, info in entry.transfer_infos.items()
    }
    return entry.state, entry.queue_idx, entry.required_dst_info_num, infos


# -- announcing ----------------------------------------------------------------------------------------------------


def test_an_announcement_reaches_every_registered_rank_and_each_that_registers_later() -> None:
    wire = Wire(ranks=2, connect=False)
    room = wire.room()
    wire.reconnect(wire.ranks[0])
    wire.announce(room, 10)
    wire.expect(room)
    wire.deliver()
    assert [message.room for message in only(wire.to_rank, Announce)] == [room]
    wire.reconnect(wire.ranks[1])
    wire.compute(room)
    wire.settle()
    assert wire.succeeded(room)


def test_another_servers_ranks_hear_nothing_of_a_room() -> None:
    wire = Wire()
    wire.announce("ff" * 8 + "-" + "00" * 8, 10)
    assert not wire.rank.inbox


def test_a_room_announced_again_is_refused_with_another_size_and_else_unchanged() -> None:
    wire = Wire()
    room = wire.start(10)
    before = frozen(wire.encoder.rooms[room])
    for tokens, row_bytes in ((11, 4), (10, 8)):
        with pytest.raises(ConnError, match="before"):
            wire.encoder.announce(room, tokens, row_bytes, "float32", wire.now)
    assert wire.encoder.announce(room, 10, 4, "float32", wire.now) == []
    assert frozen(wire.encoder.rooms[room]) == before
    wire.settle()
    assert wire.succeeded(room)


def test_a_room_name_that_is_none_of_ours_is_refused() -> None:
    with pytest.raises(ProtocolError):
        Wire().announce("cmpl-1", 10)


def test_an_aborted_room_ends_as_soon_as_it_is_announced() -> None:
    wire = Wire()
    room = wire.room()
    abort = Abort(room=room, mooncake_session_id=wire.rank.session_id, reason="client gone")
    assert wire.inject_to_encoder(abort) == [Drained(room=room)]
    wire.announce(room, 10)
    assert wire.encoder_ended[room] == Ended(room, Outcome("client gone", 499))
    assert not wire.encoder.rooms
    assert wire.encoder.add_source(room, [0], b"", None, 0.0) == []


def test_a_second_source_is_refused_and_one_for_an_ended_room_is_dropped() -> None:
    wire = Wire()
    room = wire.start(10)
    with pytest.raises(ConnError, match="source"):
        wire.compute(room)
    assert wire.encoder.add_source("unknown", [0], b"", None, 0.0) == []


def test_an_encode_that_fails_before_its_size_is_known_is_told_to_its_server() -> None:
    wire = Wire()
    room = wire.room()
    wire.expect(room)
    wire.perform_encoder(wire.encoder.fail(room, "no such image", 400, wire.now))
    wire.perform_encoder(wire.encoder.fail(room, "again", 500, wire.now))  # once is enough
    wire.deliver()
    assert wire.rank.ended[room] == Ended(room, Outcome("no such image", 400))
    assert not wire.encoder.rooms


@pytest.mark.parametrize("known", [False, True])
def test_a_reason_with_a_lone_surrogate_and_an_odd_code_still_travel(known: bool) -> None:
    # JSON of a client ("\udcff" in an image's URL) ends up in the encoder's error text.
    wire = Wire()
    room = wire.room()
    wire.expect(room)
    if known:
        wire.announce(room, 10)
    wire.perform_encoder(wire.encoder.fail(room, "cannot open /tmp/\udcff" + "x" * 5000, 0, wire.now))
    wire.deliver()
    assert wire.rank.ended[room].reason.startswith("cannot open /tmp/?x") and wire.rank.ended[room].code == 410


# -- Init ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source_first", [True, False])
def test_the_room_is_served_when_all_ranks_said_init_and_the_source_is_there(source_first: bool) -> None:
    wire = Wire(ranks=2)
    room = wire.room()
    wire.expect(room)
    wire.announce(room, 10)
    if source_first:
        wire.compute(room)
    wire.deliver_to_rank(wire.ranks[0])
    wire.deliver_to_encoder(wire.ranks[0])
    assert wire.encoder.rooms[room].state is SenderState.ANNOUNCED and not wire.chunk_log
    wire.deliver()
    if not source_first:
        assert wire.encoder.rooms[room].poll() is Poll.WaitingForInput and not wire.chunk_log
        wire.compute(room)
    assert wire.encoder.rooms[room].state is SenderState.TRANSFERRING
    assert [chunk.queue_idx for chunk in wire.chunk_log] == [(17001 + 17002) % 4]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"allocated_tokens": 3000}, "3000"),
        ({"dst_embedding_indices": [0, 16]}, "block 16"),
        ({"dst_embedding_indices": [3, 3]}, "twice"),
        ({"allocated_tokens": 257}, "do not fit"),
        ({"required_dst_info_num": 2}, "1 ranks"),
    ],
)
def test_an_init_that_does_not_fit_is_refused_with_the_reason_and_takes_nothing(
    change: dict[str, object], reason: str
) -> None:
    wire = Wire()
    room = wire.room()
    wire.announce(room, 2000)
    (answer,) = wire.inject_to_encoder(init_of(room, wire.rank, **change))
    assert isinstance(answer, Progress) and answer.window == -1 and answer.sent_tokens == 0
    assert reason in answer.refused and not answer.metadata
    assert not wire.encoder.rooms[room].transfer_infos
    # The right one is still taken.
    assert wire.inject_to_encoder(init_of(room, wire.rank)) == []


def test_a_repeated_init_is_answered_and_changes_nothing() -> None:
    wire = Wire()
    room = wire.room()
    wire.announce(room, 2000)
    wire.inject_to_encoder(init_of(room, wire.rank))
    wire.compute(room)
    before = frozen(wire.encoder.rooms[room])
    assert wire.inject_to_encoder(init_of(room, wire.rank)) == [Progress(room=room, window=-1, sent_tokens=0)]
    assert frozen(wire.encoder.rooms[room]) == before and len(wire.chunk_log) == 1


def test_a_second_init_does_not_overwrite_the_progress_of_the_first() -> None:
    wire, room = at_partial()
    before = frozen(wire.encoder.rooms[room])
    (answer,) = wire.inject_to_encoder(init_of(room, wire.rank, dst_embedding_indices=[9, 8], allocated_tokens=7))
    assert isinstance(answer, Progress) and answer.sent_tokens == 1024 and "another Init" in answer.refused
    assert frozen(wire.encoder.rooms[room]) == before


def test_an_init_in_a_later_window_gets_the_confirmed_state_and_changes_nothing() -> None:
    wire, room = at_partial()
    wire.deliver_to_encoder(wire.rank)
    before = frozen(wire.encoder.rooms[room])
    (answer,) = wire.inject_to_encoder(init_of(room, wire.rank))
    assert answer == Progress(room=room, window=0, sent_tokens=1024, metadata=metadata_of(room))
    assert frozen(wire.encoder.rooms[room]) == before
    wire.settle()
    assert wire.succeeded(room)


def foreign(wire: Wire) -> Rank:
    """A rank of another language server, registered at the same encoder."""
    session = replace(
        wire.rank.session, mooncake_session_id="10.9.9.9:9", peer="foreign", server="ff" * 8, incarnation="9"
    )
    wire.encoder.register(session, wire.now)
    return Rank(9, "9", session, wire.rank.core, bytearray(), "foreign", "shm")


def test_another_server_can_neither_join_nor_shorten_nor_abort_a_room() -> None:
    wire = Wire()
    room = wire.start(10)
    rank = foreign(wire)
    before = wire.encoder.rooms[room].deadline
    (answer,) = wire.inject_to_encoder(init_of(room, rank, deadline=0.0, allocated_tokens=5), rank)
    assert isinstance(answer, Progress) and SERVER in answer.refused
    (answer,) = wire.inject_to_encoder(resume_of(room, rank, deadline=0.0), rank)
    assert isinstance(answer, Progress) and answer.refused
    with pytest.raises(ProtocolError, match="aborts"):
        wire.inject_to_encoder(Abort(room=room, mooncake_session_id=rank.session_id, reason=""), rank)
    assert wire.encoder.rooms[room].deadline == before
    wire.tick(0.5)
    wire.settle()
    assert wire.succeeded(room)


def test_another_server_cannot_abort_a_room_that_is_not_announced_yet() -> None:
    wire = Wire()
    room = wire.room()
    rank = foreign(wire)
    for name in (room, "no room of ours"):
        with pytest.raises(ProtocolError):
            wire.inject_to_encoder(Abort(room=name, mooncake_session_id=rank.session_id, reason=""), rank)
    assert not len(wire.encoder.tombstones)
    wire.expect(room)
    wire.announce(room, 10)
    wire.compute(room)
    wire.settle()
    assert wire.succeeded(room)


@pytest.mark.parametrize("source_first", [True, False])
def test_one_rank_too_many_does_not_make_a_complete_room_incomplete(source_first: bool) -> None:
    wire = Wire()
    room = wire.room()
    wire.expect(room)
    wire.announce(room, 10)
    wire.deliver()
    if source_first:
        wire.compute(room)
    extra = replace(wire.rank.session, mooncake_session_id="10.0.0.1:17999", peer="extra")
    wire.encoder.register(extra, wire.now)
    rank = Rank(1, extra.incarnation, extra, wire.rank.core, bytearray(), "extra", "shm")
    (answer,) = wire.inject_to_encoder(init_of(room, rank, allocated_tokens=10), rank)
    assert isinstance(answer, Progress) and "all 1 ranks" in answer.refused
    if not source_first:
        wire.compute(room)
    wire.settle()
    assert wire.succeeded(room)


def test_ranks_that_contradict_each_other_on_their_number_are_refused() -> None:
    wire = Wire(ranks=2)
    room = wire.room()
    wire.announce(room, 10)
    assert wire.inject_to_encoder(init_of(room, wire.ranks[0], allocated_tokens=10), wire.ranks[0]) == []
    third = replace(wire.ranks[1].session, size=3)
    wire.encoder.register(third, wire.now)
    (answer,) = wire.inject_to_encoder(
        init_of(room, wire.ranks[1], allocated_tokens=10, required_dst_info_num=3), wire.ranks[1]
    )
    assert isinstance(answer, Progress) and "required_dst_info_num=3, but another rank sent 2" in answer.refused
    assert wire.encoder.rooms[room].required_dst_info_num == 2


@pytest.mark.parametrize("kind", ["init", "resume", "abort"])
def test_a_session_that_the_peer_did_not_register_is_a_protocol_error(kind: str) -> None:
    wire = Wire(ranks=2)
    room = wire.start(2000)
    wire.deliver()
    before = frozen(wire.encoder.rooms[room])
    message = {
        "init": init_of(room, wire.ranks[0]),
        "resume": resume_of(room, wire.ranks[0]),
        "abort": Abort(room=room, mooncake_session_id=wire.ranks[0].session_id, reason=""),
    }[kind]
    with pytest.raises(ProtocolError, match="not registered by this peer"):
        wire.encoder.on_message(wire.ranks[1].peer, message, wire.now)  # type: ignore[arg-type]
    assert frozen(wire.encoder.rooms[room]) == before


# -- Resume --------------------------------------------------------------------------------------------------------


def test_a_resume_queues_new_work_on_the_stored_queue() -> None:
    wire, room = at_partial()
    stored = wire.encoder.rooms[room].queue_idx
    # Another session of the server joins: computed anew, the index would be another.
    wire.encoder.register(replace(wire.rank.session, mooncake_session_id="10.0.0.9:17002", peer="x", rank=1), wire.now)
    wire.encoder._queues = 3
    wire.deliver_to_encoder(wire.rank)
    assert [chunk.queue_idx for chunk in wire.chunk_log] == [stored, stored]
    assert wire.begin_write() is not None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"window": 2}, "window 2, but window 1 is next"),
        ({"window": 7}, "window 7, but"),
        ({"sent_tokens": 0}, "sent_tokens=0, but 1024 rows"),
        ({"sent_tokens": 1023}, "1023"),
        ({"sent_tokens": 2000}, "2000"),
        ({"allocated_tokens": 977}, "976 rows remain"),
        ({"dst_embedding_indices": [0, 1]}, "do not fit"),
        ({"dst_embedding_indices": [*range(7), 16]}, "block 16"),
        ({"dst_embedding_indices": [*range(7), 0]}, "twice"),
    ],
)
def test_a_resume_that_does_not_fit_gets_the_confirmed_state_and_changes_nothing(
    change: dict[str, object], reason: str
) -> None:
    wire, room = at_partial()
    before = frozen(wire.encoder.rooms[room])
    (answer,) = wire.inject_to_encoder(resume_of(room, wire.rank, **change))
    assert isinstance(answer, Progress) and (answer.window, answer.sent_tokens) == (0, 1024)
    assert reason in answer.refused
    assert frozen(wire.encoder.rooms[room]) == before and len(wire.chunk_log) == 1
    assert wire.inject_to_encoder(resume_of(room, wire.rank)) == []  # the right one is still taken
    assert len(wire.chunk_log) == 2


def test_a_repeated_resume_is_answered_and_queues_nothing() -> None:
    wire, room = at_partial()
    resume = wire.deliver_to_encoder(wire.rank)
    assert isinstance(resume, Resume)
    before = frozen(wire.encoder.rooms[room])
    expected = [Progress(room=room, window=0, sent_tokens=1024, metadata=metadata_of(room))]
    assert wire.inject_to_encoder(resume) == expected
    write = wire.begin_write()
    assert write is not None
    assert wire.inject_to_encoder(resume) == expected  # in mid-write
    assert len(wire.chunk_log) == 2
    wire.end_write(write)
    # Confirmed meanwhile; the room has ended: the completion is repeated.
    assert wire.inject_to_encoder(resume) == [Done(room=room, window=1, total_tokens=2000)]
    assert before == (SenderState.TRANSFERRING, 1, 1, {wire.rank.session_id: (
        WindowState.OFFERED, 1, 1024, 976, list(range(8)))})  # fmt: skip


def test_an_early_resume_in_mid_write_is_refused_not_applied() -> None:
    wire, room, write = at_writing()
    before = frozen(wire.encoder.rooms[room])
    (answer,) = wire.inject_to_encoder(resume_of(room, wire.rank))
    assert answer == Progress(room=room, window=-1, sent_tokens=0, refused="window 0 is writing", refused_window=1)
    assert frozen(wire.encoder.rooms[room]) == before
    wire.end_write(write)


def test_an_early_resume_before_the_source_is_known_is_refused_not_lost() -> None:
    wire = Wire()
    room = wire.room()
    wire.announce(room, 2000)
    (answer,) = wire.inject_to_encoder(resume_of(room, wire.rank))
    assert answer == Progress(room=room, window=-1, sent_tokens=0, refused="Resume before Init", refused_window=1)
    wire.inject_to_encoder(init_of(room, wire.rank))
    (answer,) = wire.inject_to_encoder(resume_of(room, wire.rank))
    assert isinstance(answer, Progress) and answer.refused == "window 0 is offered"
    assert not wire.chunk_log


@pytest.mark.parametrize("message", [init_of, resume_of])
def test_an_offer_for_an_unknown_room_gets_a_negative_answer(message: object) -> None:
    wire = Wire()
    room = wire.room()
    (answer,) = wire.inject_to_encoder(message(room, wire.rank))  # type: ignore[operator]
    assert isinstance(answer, Failed) and answer.code == 404 and answer.drained


# -- writing -------------------------------------------------------------------------------------------------------


def test_a_second_worker_gets_nothing_while_one_serves_the_room() -> None:
    wire, room, write = at_writing(ranks=2)
    assert wire.encoder.begin_write(room) is None
    wire.end_write(write)
    assert [other.session.rank for other in wire.writing] == [1 - write.session.rank]


def test_a_window_is_written_once() -> None:
    wire, room, write = at_writing()
    wire.end_write(write)
    assert wire.encoder.begin_write(room) is None
    with pytest.raises(IllegalTransition):
        wire.encoder.on_written(write, LANDED, wire.now)


def test_nothing_is_written_before_the_source_is_there_or_for_an_unknown_room() -> None:
    wire = Wire()
    room = wire.room()
    wire.announce(room, 2000)
    wire.inject_to_encoder(init_of(room, wire.rank))
    assert wire.encoder.begin_write(room) is None
    assert wire.encoder.begin_write("unknown") is None


def test_a_window_offered_while_another_is_written_is_not_forgotten() -> None:
    wire, room, write = at_writing(ranks=2)
    first, second = wire.ranks if write.session.rank == 0 else reversed(wire.ranks)
    wire.end_write(write)  # continues with the second session
    wire.deliver_to_rank(first)
    wire.copy_out(first)
    wire.deliver_to_encoder(first)
    assert wire.begin_write() is None  # the worker that takes the Resume's chunk finds the room busy
    assert not any(wire.chunks)
    wire.end_write(wire.writing[0])
    assert [(other.session.rank, other.window) for other in wire.writing] == [(first.index, 1)]
    wire.settle()
    assert wire.succeeded(room) and second.ended[room].success


def test_a_resume_of_one_session_never_touches_the_others_blocks() -> None:
    wire = Wire(ranks=2, first_offer=1024)
    room = wire.start(2000)
    slow, fast = wire.ranks
    # The slow rank's Progress is not delivered: it stays in its window 0.
    wire.settle(until=lambda: bool(slow.inbox) and b"progress" in slow.inbox[0])
    while wire.deliver_to_rank(fast) or wire.deliver_to_encoder(fast) or wire.copy_out(fast):
        pass
    infos = wire.encoder.rooms[room].transfer_infos
    untouched = infos[slow.session_id]
    assert (untouched.state, untouched.window, untouched.sent_tokens) == (WindowState.PARTIAL, 0, 1024)
    before = bytes(slow.memory)
    wire.work()
    while wire.deliver_to_rank(fast) or wire.copy_out(fast):
        pass
    assert infos[fast.session_id].state is WindowState.DONE and fast.ended[room].success
    assert infos[slow.session_id].state is WindowState.PARTIAL and bytes(slow.memory) == before
    assert wire.encoder.rooms[room].poll() is Poll.Transferring and room not in wire.encoder_ended
    wire.settle()
    assert wire.succeeded(room)


def test_a_failed_write_fails_the_room_for_all_its_sessions_and_says_who() -> None:
    wire, room, write = at_writing(ranks=2)
    wire.end_write(write, "link broke")
    wire.deliver()
    for rank in wire.ranks:
        assert not rank.ended[room].success and write.session.mooncake_session_id in rank.ended[room].reason
    assert wire.encoder_ended[room].code == 502
    wire.assert_baseline()


def test_a_failing_session_leaves_the_window_that_the_other_writes_alone() -> None:
    wire, room, write = at_writing(ranks=2)
    writer, other = wire.ranks if write.session.rank == 0 else reversed(wire.ranks)
    wire.abort(room, other)
    wire.deliver()
    assert room in wire.encoder_ended
    failed = only(wire.to_rank, Failed)
    assert [message.drained for message in failed] == [False]  # to the writer: a write is under way
    assert writer.core.quarantine and not other.core.quarantine
    assert writer.core.allocator.quarantined_count == len(write.blocks)
    wire.end_write(write)  # asserts that the blocks are still this window's
    wire.deliver()
    wire.assert_baseline()


def test_what_was_done_for_one_session_stays_done_when_the_other_fails() -> None:
    wire = Wire(ranks=2)
    room = wire.start(100)
    wire.deliver()
    write = wire.begin_write()
    assert write is not None
    wire.end_write(write)
    first = wire.ranks[write.session.rank]
    wire.deliver_to_rank(first)
    wire.copy_out(first)
    wire.end_write(wire.writing[0], "link broke")
    wire.deliver()
    assert first.ended[room].success and not wire.ranks[1 - first.index].ended[room].success
    wire.assert_baseline()


# -- Abort, Drained ------------------------------------------------------------------------------------------------


def abort_of(room: str, rank: Rank) -> Abort:
    return Abort(room=room, mooncake_session_id=rank.session_id, reason="client gone")


def test_an_abort_in_mid_write_is_answered_only_when_the_data_call_has_returned() -> None:
    wire, room, write = at_writing()
    assert wire.inject_to_encoder(abort_of(room, wire.rank)) == []
    assert wire.inject_to_encoder(abort_of(room, wire.rank)) == []
    assert not wire.encoder_ended[room].success
    wire.end_write(write)
    assert only(under_way(wire.rank), Drained) == [Drained(room=room)]
    assert not wire.encoder.rooms


def under_way(rank: Rank) -> list[Message]:
    """What is on its way to ``rank``."""
    return [decode_from_encoder(frame, 1 << 20) for frame in rank.inbox]


@pytest.mark.parametrize("when", ["announced", "offered", "partial", "resumed", "success", "unknown"])
def test_an_abort_while_nothing_is_written_is_answered_at_once_and_again(when: str) -> None:
    wire, room = at_partial()
    if when == "unknown":
        room = wire.room()
    elif when in ("announced", "offered"):
        room = wire.room()
        wire.announce(room, 2000)
        if when == "offered":
            wire.inject_to_encoder(init_of(room, wire.rank))
    elif when == "resumed":
        wire.deliver_to_encoder(wire.rank)
    elif when == "success":
        wire.settle()
    assert wire.inject_to_encoder(abort_of(room, wire.rank)) == [Drained(room=room)]
    assert wire.inject_to_encoder(abort_of(room, wire.rank)) == [Drained(room=room)]
    assert room not in wire.encoder.rooms
    assert wire.encoder.begin_write(room) is None, "an aborted room begins no further write"
    assert wire.begin_write() is None


def test_drained_is_never_sent_after_a_write_in_doubt_even_without_the_tombstone() -> None:
    wire, room, write = at_writing()
    wire.end_write(write, "timeout", in_doubt=True)
    assert [message.drained for message in only(under_way(wire.rank), Failed)] == [False]
    for seconds in (0.0, sender.TOMBSTONE_SECONDS + 1):
        wire.tick(seconds)
        assert wire.inject_to_encoder(abort_of(room, wire.rank)) == []
        for offer in (init_of(room, wire.rank), resume_of(room, wire.rank)):
            (answer,) = wire.inject_to_encoder(offer)
            assert isinstance(answer, Failed) and not answer.drained
    assert room not in wire.encoder.tombstones
    wire.settle()
    assert wire.rank.core.allocator.quarantined_count == len(write.blocks)


def test_a_write_that_ends_in_doubt_after_an_abort_does_not_drain_either() -> None:
    wire, room, write = at_writing()
    wire.abort(room)
    wire.deliver()
    wire.end_write(write, "timeout", in_doubt=True)
    wire.deliver()
    assert not only(wire.to_rank, Drained)
    assert wire.rank.core.allocator.quarantined_count == len(write.blocks)


def test_a_doubt_about_one_session_does_not_hold_the_blocks_of_the_other() -> None:
    wire, room, write = at_writing(ranks=2)
    other = wire.ranks[1 - write.session.rank]
    wire.drop(other)  # the Failed is lost
    wire.end_write(write, "timeout", in_doubt=True)
    wire.abort(room, other)
    assert other.core.quarantine
    wire.reconnect(other)
    wire.settle()
    assert not other.core.quarantine and wire.ranks[write.session.rank].core.quarantine


def test_an_offer_repeated_during_a_write_of_a_finished_room_gets_no_proof() -> None:
    wire, room, write = at_writing()
    wire.drop()  # the Failed that follows is lost
    wire.perform_encoder(wire.encoder.fail(room, "out of memory", 500, wire.now))
    wire.reconnect()
    wire.deliver()
    assert [message.drained for message in only(wire.to_rank, Failed)] == [False]
    assert wire.rank.core.allocator.quarantined_count == len(write.blocks)
    wire.end_write(write)
    wire.deliver()
    wire.assert_baseline()


# -- deadlines -----------------------------------------------------------------------------------------------------


def test_a_room_that_nobody_takes_ends_at_the_send_timeout() -> None:
    wire = Wire(send_timeout=20.0)
    room = wire.room()
    wire.announce(room, 10)
    wire.tick(19.9)
    assert room not in wire.encoder_ended
    wire.tick(0.2)
    assert wire.encoder_ended[room].code == 504 and "0 of unknown ranks" in wire.encoder_ended[room].reason


def test_a_room_whose_other_rank_never_says_init_ends_and_says_so() -> None:
    wire = Wire(ranks=2, send_timeout=500.0)
    wire.drop(wire.ranks[1])
    room = wire.start(100, timeout=10.0)
    wire.deliver()
    wire.tick(9.9)
    assert "1 of 2 ranks" in wire.encoder_ended[room].reason


@pytest.mark.parametrize("left", [0.0, 0.5, 10.0, 60.0])
def test_the_encoders_deadline_is_never_later_than_the_language_sides(left: float) -> None:
    wire = Wire(send_timeout=300.0)
    room = wire.room()
    wire.expect(room, timeout=60.0)
    wire.now += 60.0 - left
    wire.announce(room, 100)
    wire.deliver()
    assert wire.encoder.rooms[room].deadline <= wire.rank.core.rooms[room].deadline
    if left >= 10:
        assert wire.encoder.rooms[room].deadline >= wire.now + 0.9 * left


def test_the_deadline_of_the_language_side_is_not_put_off_by_resumes_or_repetition() -> None:
    wire, room = at_partial()
    before = wire.encoder.rooms[room].deadline
    wire.now += 20.0
    wire.inject_to_encoder(resume_of(room, wire.rank, deadline=1e6))
    assert wire.encoder.rooms[room].deadline == before
    wire.inject_to_encoder(resume_of(room, wire.rank, deadline=5.0))
    assert wire.encoder.rooms[room].deadline == wire.now + 5.0


def test_a_deadline_in_mid_write_drains_when_the_call_returns() -> None:
    wire, room, write = at_writing()
    wire.tick(100.0)
    assert wire.encoder_ended[room].code == 504
    wire.deliver()
    assert wire.rank.core.quarantine
    wire.end_write(write)
    wire.deliver()
    wire.assert_baseline()


def test_a_room_is_released_soon_if_its_language_server_is_lost_and_stays_lost() -> None:
    wire = Wire(claim_timeout=30.0, send_timeout=600.0)
    gone, back = wire.room(), wire.room()
    wire.announce(gone, 10)
    wire.perform_encoder(wire.encoder.session_lost(wire.rank.session_id, "silent", wire.now))
    wire.tick(29.0)
    assert gone not in wire.encoder_ended
    wire.tick(1.5)
    assert wire.encoder_ended[gone].code == 504 and SERVER in wire.encoder_ended[gone].reason
    wire.announce(back, 10)
    wire.tick(20.0)
    wire.reconnect()
    wire.tick(20.0)
    assert back not in wire.encoder_ended


# -- sessions ------------------------------------------------------------------------------------------------------


def test_a_language_rank_that_dies_between_partial_and_resume_frees_the_room() -> None:
    wire, room = at_partial()
    wire.perform_encoder(wire.encoder.session_lost(wire.rank.session_id, "silent for 10 s", wire.now))
    assert wire.encoder_ended[room].reason == "silent for 10 s"
    assert not wire.encoder.rooms and not wire.encoder.sessions
    assert wire.encoder.session_lost(wire.rank.session_id, "again", wire.now) == []


def test_a_lost_session_fails_only_its_own_rooms() -> None:
    wire = Wire(ranks=2)
    room = wire.start(100)
    rank = foreign(wire)
    other = "ff" * 8 + "-" + "00" * 8
    wire.announce(other, 10)
    wire.inject_to_encoder(init_of(other, rank, required_dst_info_num=2, allocated_tokens=10), rank)
    wire.perform_encoder(wire.encoder.session_lost(rank.session_id, "gone", wire.now))
    assert other in wire.encoder_ended
    wire.settle()
    assert wire.succeeded(room)


def test_a_language_server_restarted_on_the_same_address_does_not_inherit_rooms() -> None:
    wire, room, write = at_writing()
    reborn = replace(wire.rank.session, incarnation="new", server="ee" * 8, peer="connection-new")
    actions = wire.encoder.register(reborn, wire.now)
    (ended,) = [action for action in actions if isinstance(action, Ended)]
    assert (ended.room, ended.reason, ended.code) == (room, "the language server was restarted", 502)
    assert ended.peer == wire.rank.session_id
    answers = wire.encoder.on_written(write, LANDED, wire.now)
    assert [action.peer for action in answers if isinstance(action, Send)] == [wire.rank.peer]
    assert not wire.encoder.rooms


def test_one_failure_does_not_blacklist_the_session() -> None:
    wire, _, write = at_writing()
    wire.end_write(write, "link broke")
    room = wire.start(100)
    wire.settle()
    assert wire.succeeded(room)


# -- nothing grows -------------------------------------------------------------------------------------------------


def test_tables_return_to_baseline_and_remembered_completions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "DONE_LIMIT", 8)
    wire = Wire()
    rooms = [wire.start(50) for _ in range(20)]
    wire.settle()
    assert all(wire.succeeded(room) for room in rooms)
    wire.assert_baseline()
    assert len(wire.encoder.replies._done) == 8
    assert len(wire.encoder.tombstones) == 20
    wire.tick(sender.TOMBSTONE_SECONDS + 1)
    assert len(wire.encoder.tombstones) == 0


def test_a_completion_no_longer_remembered_is_answered_as_ended_and_drained() -> None:
    wire = Wire()
    first = wire.start(50)
    wire.deliver()
    wire.begin_write()
    wire.end_write(wire.writing[0])
    wire.drop()  # its Done is lost
    wire.encoder.tick(wire.now + replies.DONE_SECONDS)
    wire.reconnect()
    wire.settle()
    assert not wire.rank.ended[first].success and wire.rank.ended[first].code == 410
    wire.assert_baseline()


def test_a_window_of_a_revoked_epoch_is_refused_and_one_of_a_known_epoch_is_written() -> None:
    wire = Wire(first_offer=1024)
    room = wire.room()
    wire.announce(room, 2000)
    rank = wire.rank
    wire.encoder.register(replace(rank.session, epochs=(0, 1)), wire.now)
    (answer,) = wire.encoder.on_message(rank.peer, init_of(room, rank, epoch=2), wire.now)
    assert isinstance(answer, Send) and "epoch 2 is not registered" in getattr(answer.message, "refused", "")
    wire.encoder.retire(rank.session_id, 0)
    (answer,) = wire.encoder.on_message(rank.peer, init_of(room, rank, epoch=0), wire.now)
    assert isinstance(answer, Send) and "epoch 0 is not registered" in getattr(answer.message, "refused", "")
    wire.encoder.on_message(rank.peer, init_of(room, rank, epoch=1), wire.now)
    wire.encoder.add_source(room, [0], b"", None, wire.now)
    write = wire.encoder.begin_write(room)
    assert write is not None and write.epoch == 1


def test_a_session_gets_its_share_of_writes_and_rooms_behind_an_aborted_one_follow() -> None:
    wire = Wire()
    wire.encoder.register(replace(wire.rank.session, most_writes=1), wire.now)
    first, second, third = (wire.start(50) for _ in range(3))
    wire.deliver()
    write = wire.encoder.begin_write(first)
    assert write is not None
    assert wire.encoder.begin_write(second) is None and wire.encoder.begin_write(third) is None
    actions = wire.encoder.on_written(write, LANDED, wire.now)
    assert [action.room for action in actions if isinstance(action, TransferEmbeddingChunk)] == [second]
    wire.encoder.fail(second, "aborted in its turn", 499, wire.now)
    assert wire.encoder.begin_write(second) is None
    actions = wire.encoder.tick(wire.now)
    assert [action.room for action in actions if isinstance(action, TransferEmbeddingChunk)] == [third]
    write = wire.encoder.begin_write(third)
    assert write is not None
    wire.encoder.on_written(write, LANDED, wire.now)
    wire.encoder.tick(wire.now)
    assert not wire.encoder.write_slots.deferred and not wire.encoder.write_slots.writes
