"""The state tables: an illegal transition raises and changes nothing; final states are final."""

from __future__ import annotations

from enum import Enum
from typing import Any

import pytest

from sglang_mm_conn.core.encoder.sender_room import SenderRoom
from sglang_mm_conn.core.errors import IllegalTransition
from sglang_mm_conn.core.language.receiver_room import ReceiverRoom
from sglang_mm_conn.core.states import (
    DRAIN_TRANSITIONS,
    ENCODER_TRANSITIONS,
    RECEIVER_TRANSITIONS,
    SENDER_TRANSITIONS,
    WINDOW_TRANSITIONS,
    DrainState,
    EncoderState,
    Poll,
    ReceiverState,
    SenderState,
    StateMachine,
    WindowState,
)

Table = dict[Any, frozenset[Any]]
TABLES: list[tuple[Table, type[Enum]]] = [
    (RECEIVER_TRANSITIONS, ReceiverState),
    (SENDER_TRANSITIONS, SenderState),
    (WINDOW_TRANSITIONS, WindowState),
    (DRAIN_TRANSITIONS, DrainState),
    (ENCODER_TRANSITIONS, EncoderState),
]
TRANSITIONS = [(table, start, target) for table, states in TABLES for start in states for target in states]


@pytest.mark.parametrize(
    ("table", "start", "target"),
    [transition for transition in TRANSITIONS if transition[2] not in transition[0][transition[1]]],
)
def test_an_illegal_transition_is_refused_and_the_state_is_unchanged(table: Table, start: Enum, target: Enum) -> None:
    machine: StateMachine[Any] = StateMachine(table, start)
    with pytest.raises(IllegalTransition, match=f"{start.value} -> {target.value}"):
        machine.transition_to(target)
    assert machine.state is start


@pytest.mark.parametrize(
    ("table", "start", "target"),
    [transition for transition in TRANSITIONS if transition[2] in transition[0][transition[1]]],
)
def test_an_allowed_transition_is_made(table: Table, start: Enum, target: Enum) -> None:
    machine: StateMachine[Any] = StateMachine(table, start)
    machine.transition_to(target)
    assert machine.state is target


@pytest.mark.parametrize(
    ("table", "states", "final"),
    [
        (RECEIVER_TRANSITIONS, ReceiverState, {"success", "failed"}),
        (SENDER_TRANSITIONS, SenderState, {"success", "failed"}),
        (WINDOW_TRANSITIONS, WindowState, {"done", "closed", "in_doubt"}),
    ],
)
def test_success_and_failed_are_final_and_every_other_state_can_fail(
    table: Table, states: type[Enum], final: set[str]
) -> None:
    assert {state.value for state in states if StateMachine(table, state).final} == final
    failures = {"failed", "closed"}
    assert all(table[state] and {target.value for target in table[state]} & failures
               for state in states if state.value not in final)  # fmt: skip


def test_no_state_of_an_encoder_is_final_and_each_can_follow_each_other() -> None:
    for state in EncoderState:
        assert ENCODER_TRANSITIONS[state] == set(EncoderState) - {state}


def receiver_poll(state: ReceiverState, window: int) -> Poll:
    room = ReceiverRoom(
        "room", "encoder", 1.0, 0.0, 1, machine=StateMachine(RECEIVER_TRANSITIONS, state), window=window
    )
    return room.poll()


def sender_poll(state: SenderState) -> Poll:
    return SenderRoom(
        "room", "server", 1, 1, "float32", 1.0, 0.0, machine=StateMachine(SENDER_TRANSITIONS, state)
    ).poll()


def test_poll_of_a_receiver_never_goes_back_not_on_a_resume_either() -> None:
    for start, targets in RECEIVER_TRANSITIONS.items():
        for window in (-1, 0, 3):
            if window >= 0 and start is ReceiverState.EXPECTED:
                continue  # a room that was not announced has no window
            if window < 0 and start in (ReceiverState.OFFERED, ReceiverState.COPYING, ReceiverState.SUCCESS):
                continue  # these have one
            for target in targets:
                after = window + 1 if target is ReceiverState.OFFERED else window
                poll = receiver_poll(target, after)
                assert poll is Poll.Failed or poll >= receiver_poll(start, window)


def test_poll_of_a_sender_never_goes_back() -> None:
    for start, targets in SENDER_TRANSITIONS.items():
        for target in targets:
            assert target is SenderState.FAILED or sender_poll(target) > sender_poll(start)


def test_poll_values_are_those_of_sglangs_kvpoll() -> None:
    assert [(poll.name, poll.value) for poll in Poll] == [
        ("Failed", 0), ("Bootstrapping", 1), ("WaitingForInput", 2), ("Transferring", 3), ("Success", 4),
    ]  # fmt: skip
