"""Hazards of the original proposal that two joined cores show best; tests/test_lessons.py lists all hazards."""

from __future__ import annotations

from sglang_mm_conn.core.messages import Done, Progress, Resume
from sglang_mm_conn.core.states import Poll
from tests.core.harness import Wire, only


def test_progress_carries_window_and_count_so_two_partial_confirmations_differ() -> None:
    wire = Wire(blocks=1, block_rows=10)
    room = wire.start(35)
    wire.settle()
    confirmed = [(message.window, message.sent_tokens) for message in only(wire.to_rank, Progress)]
    assert confirmed == [(0, 10), (1, 20), (2, 30)]
    assert [(message.window, message.total_tokens) for message in only(wire.to_rank, Done)] == [(3, 35)]
    assert wire.succeeded(room)


def test_the_same_blocks_handed_out_again_do_not_hide_a_needed_resume() -> None:
    wire = Wire(blocks=2, block_rows=10)
    room = wire.start(100)
    wire.settle()
    resumes = only(wire.to_encoder, Resume)
    assert len(resumes) == 4 and {tuple(resume.dst_embedding_indices) for resume in resumes} == {(0, 1)}
    assert wire.succeeded(room)


def test_a_result_has_the_announced_length_and_not_that_of_the_last_window() -> None:
    wire = Wire(blocks=1, block_rows=10)
    room = wire.start(23)
    wire.settle(until=lambda: bool(wire.rank.copies))
    (copy,) = wire.rank.copies
    assert (copy.first_token, copy.tokens, copy.total_tokens) == (0, 10, 23)
    wire.copy_out()
    wire.settle(until=lambda: bool(wire.rank.copies))
    (copy,) = wire.rank.copies
    assert (copy.first_token, copy.tokens, copy.total_tokens) == (10, 10, 23)
    wire.settle()
    assert wire.succeeded(room) and len(wire.rank.results[room]) == 23 * 4


def test_a_failed_room_is_not_revived_by_a_completion_in_flight() -> None:
    wire = Wire()
    room = wire.start(100)
    wire.settle(until=lambda: bool(wire.rank.inbox) and b"done" in wire.rank.inbox[-1])
    wire.abort(room)
    wire.settle()
    assert wire.rank.core.rooms[room].poll() is Poll.Failed and not wire.rank.ended[room].success
    wire.assert_baseline()
