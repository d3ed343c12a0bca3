"""What the original proposal of this connector got wrong, and the tests that rule each hazard out.

The proposal is in a public fork of sglang (sgl-project/sglang#7933 and #12665, never merged). Every fault that its
author fixed, and every one that remained, is a hazard here. Where this design excludes it, the named test shows the
property that does. A test that is renamed, removed or skipped breaks this file.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

CORE_RECEIVER = "tests/core/language/test_receiver.py"
CORE_SENDER = "tests/core/encoder/test_sender.py"
RECEIVER_MACHINE = "tests/core/language/test_receiver_machine.py::TestReceiver"
SENDER_MACHINE = "tests/core/encoder/test_sender_machine.py::TestSender"
JOINED = "tests/core/test_joined_machines.py::TestJoined"
HERE = "tests/core/test_proposal_hazards.py"
FAULTS = "tests/connector/test_faults.py"
TRANSFER = "tests/connector/test_transfer.py"
THREADS = "tests/connector/test_threads.py"
LEAKS = "tests/connector/test_leaks.py"
AUTHENTICATION = "tests/control/test_authentication.py"
BOOTSTRAP = "tests/control/test_bootstrap.py"
STAGING = "tests/datapath/test_mooncake_staging.py"
ANSWERS = "tests/servers/test_answers.py::test_answers_equal_colocated_though_every_embedding_needs_resumes"

# Faults that the proposal's author fixed, numbered for reference.
FIXED: dict[str, list[str]] = {
    "1 a resume changed the status but queued no work": [
        f"{CORE_SENDER}::test_a_resume_queues_new_work_on_the_stored_queue",
        "tests/connector/test_worked_example.py::test_2000_tokens_arrive_in_windows_of_1024_and_976_by_one_resume_on_one_queue",
        SENDER_MACHINE,
    ],
    "2 what was asked for was offered, not what was allocated": [
        f"{CORE_RECEIVER}::test_the_offer_is_the_smallest_of_needed_free_and_set",
        f"{CORE_RECEIVER}::test_allocated_tokens_is_the_capacity_of_the_blocks_also_for_narrower_rows",
    ],
    "3 after a resume the length came from a block that has none": [
        f"{HERE}::test_a_result_has_the_announced_length_and_not_that_of_the_last_window",
        f"{CORE_RECEIVER}::test_any_number_of_resumes_gives_the_right_bytes",
    ],
    "4 every poll gathered, freed and resumed again": [
        f"{CORE_RECEIVER}::test_rows_are_gathered_once_however_often_the_status_is_told",
    ],
    "5 the once-only guard compared blocks, which came again": [
        f"{HERE}::test_the_same_blocks_handed_out_again_do_not_hide_a_needed_resume",
    ],
    "6 a resume set the status back": [
        "tests/core/test_states.py::test_poll_of_a_receiver_never_goes_back_not_on_a_resume_either",
        "tests/core/test_states.py::test_poll_of_a_sender_never_goes_back",
    ],
    "7 success after a part": [
        f"{CORE_RECEIVER}::test_success_needs_done_and_the_last_rows_copied_out",
        f"{CORE_RECEIVER}::test_a_completion_that_contradicts_the_offer_fails_the_room_and_frees_no_block",
        RECEIVER_MACHINE,
    ],
    "8 a room was queued twice": [
        f"{CORE_SENDER}::test_a_repeated_resume_is_answered_and_queues_nothing",
        f"{CORE_SENDER}::test_a_repeated_init_is_answered_and_changes_nothing",
        f"{CORE_SENDER}::test_a_window_is_written_once",
    ],
    "9 transfer info dropped too early or never": [
        f"{CORE_SENDER}::test_tables_return_to_baseline_and_remembered_completions_are_bounded",
        SENDER_MACHINE,
    ],
    "10 blocks were taken to be contiguous or ascending": [
        "tests/core/test_layout.py::test_blocks_out_of_order_keep_the_order_of_allocation",
        "tests/memory/test_pool.py::test_what_is_read_is_what_was_written_for_scattered_blocks",
        f"{TRANSFER}::test_token_order_is_allocation_order_when_the_free_blocks_lie_in_pieces",
    ],
    "11 the capacity check stood the wrong way round": [
        "tests/core/test_layout.py::test_bad_blocks_and_lengths_are_refused_before_a_byte_moves",
    ],
    "12 multimodal requests taken for text, positions lost": [ANSWERS],
    "13 one rank's resume was served to all ranks": [
        f"{CORE_SENDER}::test_a_resume_of_one_session_never_touches_the_others_blocks",
        f"{TRANSFER}::test_a_resume_of_one_rank_writes_nothing_to_a_rank_whose_resume_has_not_come",
    ],
    "14 a failed allocation failed the request and freed twice": [
        f"{CORE_RECEIVER}::test_whoever_waits_for_blocks_holds_none_and_the_longest_wait_is_served_first",
        f"{CORE_RECEIVER}::test_each_proof_frees_the_blocks_once",
    ],
    "15 a cached view pointed into a freed block": [
        "tests/memory/test_pool.py::test_rows_copied_out_are_no_view_of_blocks_that_the_next_room_is_written_to",
    ],
    "16 a warm-up wrote into a live block": [
        "tests/memory/test_pool.py::test_a_writer_that_comes_and_goes_changes_no_byte_of_the_pool",
        f"{STAGING}::test_opening_a_link_writes_nothing_so_that_no_warm_up_lands_in_a_live_block",
    ],
    "17 deepstack rows only with the first block": [ANSWERS],
    "18 the sides disagreed on their buffers and only warned": [
        f"{FAULTS}::test_two_sides_that_do_not_fit_refuse_at_once_and_name_both_values",
        "tests/core/test_messages.py::test_another_version_is_refused_naming_both",
        f"{CORE_RECEIVER}::test_two_announcements_that_contradict_fail_the_room",
    ],
    "19 fields below the smallest write, whole slots sent": [
        f"{TRANSFER}::test_one_token_rooms",
        "tests/core/test_layout.py::test_runs_cover_exactly_the_bytes_in_token_order_whatever_the_blocks_numbers",
    ],
}

# Faults that remained.
CORRUPTION: dict[str, list[str]] = {
    "an abort freed blocks that were still written": [
        f"{CORE_RECEIVER}::test_a_late_write_of_an_aborted_room_lands_in_quarantine_not_in_reused_blocks",
        f"{CORE_RECEIVER}::test_what_is_no_proof_leaves_the_blocks_in_quarantine",
        f"{FAULTS}::test_blocks_of_a_writer_frozen_in_mid_write_wait_until_it_answers_or_is_gone",
        RECEIVER_MACHINE,
        JOINED,
    ],
    "one rank's failure freed the source that another's transfer read": [
        f"{CORE_SENDER}::test_a_failing_session_leaves_the_window_that_the_other_writes_alone",
        SENDER_MACHINE,
    ],
    "blocks were freed twice": [
        "tests/core/test_blocks.py::test_blocks_freed_twice_are_not_shared_by_two_requests",
        f"{CORE_RECEIVER}::test_a_copy_reported_twice_is_refused_and_frees_nothing_twice",
    ],
    "what the previous tenant left was read as fresh": [
        f"{TRANSFER}::test_metadata_with_tensors_comes_once_and_is_that_of_its_own_room_after_resumes",
        f"{TRANSFER}::test_rooms_of_mixed_sizes_at_once_keep_their_bytes_apart",
        RECEIVER_MACHINE,
    ],
    "a second init overwrote progress": [
        f"{CORE_SENDER}::test_a_second_init_does_not_overwrite_the_progress_of_the_first",
    ],
    "a resume was applied unchecked": [
        f"{CORE_SENDER}::test_a_resume_that_does_not_fit_gets_the_confirmed_state_and_changes_nothing",
        f"{CORE_SENDER}::test_an_early_resume_in_mid_write_is_refused_not_applied",
        SENDER_MACHINE,
    ],
    "an early resume was only logged": [
        f"{CORE_SENDER}::test_an_early_resume_before_the_source_is_known_is_refused_not_lost",
    ],
    "a stale success served a new request of the same room": [
        "tests/core/test_rooms.py::test_every_dispatch_has_a_room_of_its_own",
        f"{CORE_RECEIVER}::test_a_stale_success_is_not_found_by_a_room_of_the_same_name",
        "tests/servers/test_answers.py::test_request_ids_are_not_the_identity_of_an_embedding",
    ],
    "the status had no token count": [
        f"{HERE}::test_progress_carries_window_and_count_so_two_partial_confirmations_differ",
    ],
}

HANGS: dict[str, list[str]] = {
    "who waited for blocks held blocks": [
        f"{CORE_RECEIVER}::test_many_rooms_larger_than_the_pool_share_it_without_deadlock_or_starvation",
        "tests/servers/test_answers.py::test_eight_clients_at_once_on_a_pool_smaller_than_one_embedding",
    ],
    "a remainder larger than the pool waited for ever": [
        f"{CORE_RECEIVER}::test_an_embedding_larger_than_the_pool_passes_through_it",
        f"{TRANSFER}::test_an_embedding_five_times_the_pool_passes_through_it",
    ],
    "most states had no timeout, on either side": [
        f"{CORE_RECEIVER}::test_every_state_ends_at_the_deadline_and_says_why",
        f"{CORE_RECEIVER}::test_a_room_that_waits_for_blocks_ends_at_its_deadline_too",
        f"{CORE_SENDER}::test_a_room_that_nobody_takes_ends_at_the_send_timeout",
        f"{FAULTS}::test_a_room_that_outlives_its_deadline_fails_on_both_sides_in_time",
        RECEIVER_MACHINE,
        SENDER_MACHINE,
    ],
    "a resume for an unknown room got no answer": [
        f"{CORE_SENDER}::test_an_offer_for_an_unknown_room_gets_a_negative_answer",
    ],
    "the encoder kept a room whose language side died between part and resume": [
        f"{CORE_SENDER}::test_a_language_rank_that_dies_between_partial_and_resume_frees_the_room",
        f"{LEAKS}::test_language_processes_that_come_and_go_leave_nothing_behind_in_the_encoder",
    ],
    "a second part looked like the first": [
        f"{HERE}::test_progress_carries_window_and_count_so_two_partial_confirmations_differ",
    ],
    "ranks that nobody addressed blocked the rest": [
        f"{CORE_SENDER}::test_a_room_whose_other_rank_never_says_init_ends_and_says_so",
        "tests/servers/test_encoder_processes.py::test_tensor_parallel_ranks_encode_together_and_rank_0_sends",
    ],
    "the head of the queue blocked all behind it": [
        f"{CORE_RECEIVER}::test_the_head_of_the_queue_does_not_block_what_is_behind_it",
        f"{TRANSFER}::test_language_process_short_of_blocks_does_not_starve_another_at_its_encoder",
    ],
}

THREAD_HAZARDS: dict[str, list[str]] = {
    "a worker died of any exception": [
        f"{FAULTS}::test_a_failed_data_call_ends_its_room_and_the_worker_lives_on",
    ],
    "one bad frame killed the receiving thread": [
        f"{FAULTS}::test_a_stranger_s_frames_hurt_nobody_and_move_nothing",
        f"{AUTHENTICATION}::test_garbage_on_the_control_port_hurts_nobody",
        "tests/core/test_messages.py::test_a_damaged_frame_is_a_valid_message_or_a_protocol_error",
        "tests/core/test_messages.py::test_random_bytes_are_a_valid_message_or_a_protocol_error",
    ],
    "threads started before their fields existed": [
        f"{THREADS}::test_threads_start_when_every_field_that_they_use_is_there",
    ],
    "sockets shared by threads without a lock": [f"{THREADS}::test_each_control_socket_is_touched_by_one_thread"],
    "status updates were not atomic": [
        f"{THREADS}::test_a_status_changes_under_the_lock_whichever_thread_changes_it",
        "tests/core/test_states.py::test_an_illegal_transition_is_refused_and_the_state_is_unchanged",
    ],
    "Failed was overwritten by a later status": [
        f"{CORE_RECEIVER}::test_a_final_state_is_final_whatever_comes_later",
        f"{HERE}::test_a_failed_room_is_not_revived_by_a_completion_in_flight",
    ],
}

DESTINATIONS: dict[str, list[str]] = {
    "only the failing rank was told": [
        f"{CORE_SENDER}::test_a_failed_write_fails_the_room_for_all_its_sessions_and_says_who",
        SENDER_MACHINE,
    ],
    "one error blacklisted the session": [
        f"{CORE_SENDER}::test_one_failure_does_not_blacklist_the_session",
        f"{STAGING}::test_after_a_failed_call_the_matter_is_in_doubt_and_the_engine_is_used_no_more",
    ],
    "an encoder restarted within the heartbeat was not noticed": [
        f"{CORE_RECEIVER}::test_an_encoder_restarted_within_the_heartbeat_is_noticed_and_its_rooms_fail",
        f"{FAULTS}::test_a_restart_that_no_look_up_can_see_is_noticed_by_the_new_incarnation",
    ],
}

LEAK_HAZARDS: dict[str, list[str]] = {
    "status, infos and tables grew with every request": [
        f"{CORE_RECEIVER}::test_tables_return_to_baseline_after_successes_failures_and_aborts",
        f"{LEAKS}::test_300_rooms_with_aborts_leave_nothing_behind",
    ],
    "sockets grew": [f"{LEAKS}::test_encoders_that_come_and_go_leave_nothing_behind_in_the_language_process"],
}

SECURITY: dict[str, list[str]] = {
    "no authentication": [
        f"{AUTHENTICATION}::test_a_stranger_is_refused_and_logged_once_with_its_address_while_friends_talk",
        f"{AUTHENTICATION}::test_beyond_loopback_a_key_is_needed_or_the_word_insecure",
    ],
    "forged pointers were written to": [
        f"{CORE_SENDER}::test_an_init_that_does_not_fit_is_refused_with_the_reason_and_takes_nothing",
        "tests/core/test_layout.py::test_bad_blocks_and_lengths_are_refused_before_a_byte_moves",
    ],
    "forged resumes were accepted": [
        f"{CORE_SENDER}::test_a_session_that_the_peer_did_not_register_is_a_protocol_error",
        f"{CORE_SENDER}::test_another_server_can_neither_join_nor_shorten_nor_abort_a_room",
    ],
    "forged statuses were accepted": [
        f"{CORE_RECEIVER}::test_a_message_of_a_process_that_is_not_registered_is_a_protocol_error",
        f"{CORE_RECEIVER}::test_a_proof_of_another_process_is_none",
        RECEIVER_MACHINE,
    ],
    "the registration had no lengths": [
        "tests/memory/test_segment.py::test_a_segment_of_another_size_is_refused_naming_both",
        f"{FAULTS}::test_two_sides_that_do_not_fit_refuse_at_once_and_name_both_values",
    ],
}

ADDRESSING: dict[str, list[str]] = {
    "IPv6 addresses were split at their colons": [
        "tests/core/test_sharding.py::test_the_port_is_behind_the_last_colon_also_of_ipv6",
        "tests/datapath/test_mooncake_engines.py::test_a_session_id_brackets_an_ipv6_address",
        f"{BOOTSTRAP}::test_the_control_address_has_the_host_of_the_url_also_of_ipv6",
    ],
    "a look-up of what was not ready answered 500": [
        f"{BOOTSTRAP}::test_look_up_before_the_encoder_is_ready_is_told_to_come_again_not_of_an_error",
        f"{TRANSFER}::test_a_language_process_that_registers_late_still_hears_the_announcement",
    ],
}

PERFORMANCE: dict[str, list[str]] = {
    "the rooms of one queue blocked one another": [
        f"{FAULTS}::test_a_frozen_destination_does_not_hold_up_another_one_on_the_same_queue",
    ],
    "the queue changed when a session joined": [
        f"{CORE_SENDER}::test_a_resume_queues_new_work_on_the_stored_queue",
        f"{CORE_SENDER}::test_one_rank_too_many_does_not_make_a_complete_room_incomplete",
        SENDER_MACHINE,
    ],
    "two workers served one room": [
        f"{CORE_SENDER}::test_a_second_worker_gets_nothing_while_one_serves_the_room",
        SENDER_MACHINE,
    ],
    "pools of threads were made and never used": [f"{THREADS}::test_every_pool_of_threads_has_work_to_do"],
    "as many copies as language ranks": [
        "tests/connector/test_follower.py::test_one_copy_crosses_and_every_rank_of_the_host_has_it",
        "tests/memory/test_results.py::test_reading_makes_no_copy",
        "tests/servers/test_tensor_parallel.py::test_two_ranks_over_mooncake_register_once",
    ],
}

CHAPTERS = {
    "fixed": FIXED, "corruption": CORRUPTION, "hangs": HANGS, "threads": THREAD_HAZARDS, "destinations": DESTINATIONS,
    "leaks": LEAK_HAZARDS, "security": SECURITY, "addressing": ADDRESSING, "performance": PERFORMANCE,
}  # fmt: skip
LESSONS = {f"{chapter}: {hazard}": tests for chapter, lines in CHAPTERS.items() for hazard, tests in lines.items()}


@cache
def collected(path: str) -> frozenset[str]:
    """What pytest collects from the file: its test functions and classes that nothing skips, found by reading it."""
    found: set[str] = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not any("skip" in ast.unparse(mark) or "xfail" in ast.unparse(mark) for mark in node.decorator_list):
                found.add(node.name)
        elif isinstance(node, ast.Assign) and ast.unparse(node.value).endswith(".TestCase"):
            found.update(ast.unparse(target) for target in node.targets)
    return frozenset(name for name in found if name.startswith(("test_", "Test")))


@pytest.mark.parametrize("lesson", LESSONS)
def test_every_hazard_is_ruled_out_by_tests_that_exist(lesson: str) -> None:
    assert LESSONS[lesson], "a hazard without a test"
    for shown in LESSONS[lesson]:
        path, _, name = shown.partition("::")
        assert name in collected(path), f"{shown} does not exist, or is skipped"


def test_no_hazard_was_left_out() -> None:
    """19 faults were fixed, and so many of each kind remained."""
    assert [int(line.split()[0]) for line in FIXED] == list(range(1, 20))
    count = {chapter: len(lines) for chapter, lines in CHAPTERS.items()}
    assert count == {
        "fixed": 19, "corruption": 9, "hangs": 8, "threads": 6, "destinations": 3, "leaks": 2, "security": 5,
        "addressing": 2, "performance": 5,
    }  # fmt: skip


def test_a_test_that_is_missing_or_skipped_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text("@pytest.mark.skip\ndef test_a(): ...\ndef test_b(): ...\ndef help(): ...\nTestC = Made.TestCase\n")
    assert collected(str(file)) == {"test_b", "TestC"}
