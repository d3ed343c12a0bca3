"""What an earlier prototype of this connector got wrong, and the test that shows each hazard is ruled out.

Only hazards that can be decided without sockets, threads and sglang are listed; a test that is renamed or removed
breaks this file.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sglang_mm_conn.core.messages import Done, Progress, Resume
from sglang_mm_conn.core.states import Poll
from tests.core import (
    test_blocks,
    test_joined_machines,
    test_layout,
    test_messages,
    test_receiver,
    test_rooms,
    test_sender,
    test_sharding,
    test_states,
    test_worked_example,
)
from tests.core.harness import Wire, only


def test_progress_carries_the_count_and_the_window_so_that_a_second_partial_is_told_from_the_first() -> None:
    wire = Wire(blocks=1, block_rows=10)
    room = wire.start(35)
    wire.settle()
    told = [(message.window, message.sent_tokens) for message in only(wire.to_rank, Progress)]
    assert told == [(0, 10), (1, 20), (2, 30)]
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
    wire.settle(until=lambda: bool(wire.rank.moves))
    (move,) = wire.rank.moves
    assert (move.first_token, move.tokens, move.total_tokens) == (0, 10, 23)
    wire.move()
    wire.settle(until=lambda: bool(wire.rank.moves))
    (move,) = wire.rank.moves
    assert (move.first_token, move.tokens, move.total_tokens) == (10, 10, 23)
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


HERE = [
    test_progress_carries_the_count_and_the_window_so_that_a_second_partial_is_told_from_the_first,
    test_the_same_blocks_handed_out_again_do_not_hide_a_needed_resume,
    test_a_result_has_the_announced_length_and_not_that_of_the_last_window,
    test_a_failed_room_is_not_revived_by_a_completion_in_flight,
]

LESSONS: dict[str, list[Callable[..., None] | type]] = {
    # fixed by the prototype along the way
    "1 resume queues work": [
        test_sender.test_a_resume_queues_new_work_on_the_stored_queue,
        test_worked_example.test_2000_tokens_with_1024_offered_go_in_two_windows_on_the_stored_queue,
    ],
    "2 offer is the real capacity": [
        test_receiver.test_the_offer_is_the_smallest_of_needed_free_and_set,
        test_receiver.test_allocated_tokens_is_the_capacity_of_the_blocks_also_for_narrower_rows,
    ],
    "3 length after a resume": [HERE[2], test_receiver.test_any_number_of_resumes_gives_the_right_bytes],
    "4 gather once, not on every poll": [test_receiver.test_rows_are_gathered_once_however_often_the_status_is_told],
    "5 once-only guard by window, not by blocks": [HERE[1]],
    "6 monotonic status": [
        test_states.test_poll_of_a_receiver_never_goes_back_not_on_a_resume_either,
        test_states.test_poll_of_a_sender_never_goes_back,
    ],
    "7 no success after a partial": [
        test_receiver.test_success_needs_done_and_the_move_of_the_last_rows,
        test_receiver.test_a_completion_that_contradicts_the_offer_fails_the_room_and_frees_no_block,
    ],
    "8 a room is queued once": [
        test_sender.test_a_repeated_resume_is_answered_and_queues_nothing,
        test_sender.test_a_repeated_init_is_answered_and_changes_nothing,
    ],
    "9 info lives as long as the room": [
        test_sender.test_tables_return_to_baseline_and_remembered_completions_are_bounded
    ],
    "10 allocation order counts": [
        test_layout.test_blocks_out_of_order_keep_the_order_of_allocation,
        test_layout.test_runs_cover_exactly_the_bytes_in_token_order_whatever_the_blocks_numbers,
    ],
    "11 capacity check the right way round": [test_layout.test_bad_blocks_and_lengths_are_refused_before_a_byte_moves],
    "13 one resume serves one rank": [test_sender.test_a_resume_of_one_session_never_touches_the_others_blocks],
    "14 no double free on failure": [
        test_receiver.test_each_proof_frees_the_blocks_once,
        test_receiver.test_whoever_waits_for_blocks_holds_none_and_the_longest_wait_is_served_first,
    ],
    "18 contradicting shapes refused": [
        test_receiver.test_two_announcements_that_contradict_fail_the_room,
        test_messages.test_another_version_is_refused_naming_both,
    ],
    "19 only valid bytes": [test_layout.test_runs_cover_exactly_the_bytes_in_token_order_whatever_the_blocks_numbers],
    # still wrong at the prototype's end: corruption
    "late write after abort": [
        test_receiver.test_an_aborted_rooms_late_write_lands_in_quarantine_not_in_the_next_requests_blocks,
        test_receiver.test_what_is_no_proof_leaves_the_blocks_in_quarantine,
        test_joined_machines.TestJoined,
    ],
    "one rank's failure and the other's source": [
        test_sender.test_a_failing_session_leaves_the_window_that_the_other_writes_alone
    ],
    "blocks freed twice": [
        test_blocks.test_blocks_freed_twice_are_not_shared_by_two_requests,
        test_receiver.test_a_move_reported_twice_is_refused_and_frees_nothing_twice,
    ],
    "progress overwritten by a second init": [
        test_sender.test_a_second_init_does_not_overwrite_the_progress_of_the_first
    ],
    "resume applied unchecked": [
        test_sender.test_a_resume_that_does_not_fit_is_answered_with_the_truth_and_changes_nothing,
        test_sender.test_an_early_resume_in_mid_write_is_refused_not_applied,
    ],
    "early resume only logged": [test_sender.test_an_early_resume_before_the_source_is_known_is_refused_not_lost],
    "room reuse": [
        test_rooms.test_every_dispatch_has_a_room_of_its_own,
        test_receiver.test_a_stale_success_is_not_found_by_a_room_of_the_same_name,
    ],
    "status without a count": [HERE[0]],
    # hangs
    "hold and wait": [
        test_receiver.test_many_rooms_larger_than_the_pool_share_it_without_a_deadlock_and_none_starves,
        test_receiver.test_an_embedding_larger_than_the_pool_passes_through_it,
    ],
    "no timeout": [
        test_receiver.test_every_state_ends_at_the_deadline_and_says_why,
        test_receiver.test_a_room_that_waits_for_blocks_ends_at_its_deadline_too,
        test_sender.test_a_room_that_nobody_takes_ends_at_the_send_timeout,
    ],
    "resume for an unknown room": [test_sender.test_an_offer_for_an_unknown_room_gets_a_negative_answer],
    "language side dies between partial and resume": [
        test_sender.test_a_language_rank_that_dies_between_partial_and_resume_frees_the_room
    ],
    "second partial like the first": [HERE[0]],
    "a rank that nobody addressed": [test_sender.test_a_room_whose_other_rank_never_says_init_ends_and_says_so],
    "head of the line": [test_receiver.test_the_head_of_the_queue_does_not_block_what_is_behind_it],
    # threads: what a core can do for them
    "a bad frame": [
        test_messages.test_a_damaged_frame_is_a_valid_message_or_a_protocol_error,
        test_messages.test_random_bytes_are_a_valid_message_or_a_protocol_error,
    ],
    "failed overwritten by a later status": [
        HERE[3],
        test_receiver.test_a_final_state_is_final_whatever_comes_later,
        test_states.test_an_illegal_move_is_refused_and_the_state_is_unchanged,
    ],
    # failure of one destination
    "only the failing rank was told": [
        test_sender.test_a_failed_write_fails_the_room_for_all_its_sessions_and_says_who
    ],
    "one error blacklists the session": [test_sender.test_one_failure_does_not_blacklist_the_session],
    "restart inside the heartbeat": [
        test_receiver.test_an_encoder_restarted_within_the_heartbeat_is_noticed_and_its_rooms_fail
    ],
    "tables that grow": [test_receiver.test_tables_return_to_baseline_after_successes_failures_and_aborts],
    "forged indices, lengths, sessions": [
        test_sender.test_an_init_that_does_not_fit_is_refused_with_the_reason_and_takes_nothing,
        test_sender.test_a_session_that_the_peer_did_not_register_is_a_protocol_error,
    ],
    "IPv6 session ids": [test_sharding.test_the_port_is_behind_the_last_colon_also_of_ipv6],
    "queue index shifts when a session joins": [
        test_sender.test_a_resume_queues_new_work_on_the_stored_queue,
        test_sender.test_one_rank_too_many_does_not_make_a_complete_room_incomplete,
    ],
    "two workers serve one room": [test_sender.test_a_second_worker_gets_nothing_while_one_serves_the_room],
}


@pytest.mark.parametrize("lesson", LESSONS)
def test_every_lesson_has_a_test_that_is_collected(lesson: str) -> None:
    for shown in LESSONS[lesson]:
        assert shown.__name__.startswith(("test_", "JoinedMachine")) and callable(shown)


def test_no_test_stands_for_nothing() -> None:
    assert all(LESSONS.values())
    named = {shown for tests in LESSONS.values() for shown in tests}
    assert set(HERE) <= named
