"""The state of each encoder: the evidence for it, probes, and trials of an encoder that fails."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest

from sglang_mm_conn.core.dispatch.encoders import (
    FAILURES_IN_A_ROW,
    FIRST_PROBE_SECONDS,
    FIRST_TRIAL_SECONDS,
    Encoder,
    EncoderStatus,
    StateChange,
)
from sglang_mm_conn.core.dispatch.fleet import MOST_PROBE_SECONDS, MOST_TRIAL_SECONDS, QUIET_SECONDS, Fleet
from sglang_mm_conn.core.states import EncoderState

A, B = "http://a:1", "http://b:1"
PEER_TIMEOUT = 10.0  # the default of Fleet
UP, SUSPECT, DRAINING, DOWN = EncoderState.UP, EncoderState.SUSPECT, EncoderState.DRAINING, EncoderState.DOWN


def well(fleet: Fleet, url: str = A, now: float = 100.0, *, draining: bool = False) -> list[StateChange]:
    return fleet.probed(url, draining=draining, prefix_cache=False, now=now)


def fleet_of(state: EncoderState, now: float = 100.0) -> tuple[Fleet, Encoder]:
    """A fleet of encoder A in ``state``; no probe is under way."""
    fleet = Fleet()
    fleet.know([A])
    fleet.due_probes(now)
    if state is not SUSPECT:
        well(fleet, now=now, draining=state is DRAINING)
    if state is SUSPECT:
        well(fleet, now=now)
        lost(fleet, SUSPECT, "cut off")
        fleet.due_probes(now)
        fleet.encoders[A].probing = False
    if state is DOWN:
        lost(fleet, DOWN, "refused")
        fleet.due_probes(now)
        fleet.encoders[A].probing = False
    assert fleet.encoders[A].state is state
    return fleet, fleet.encoders[A]


def report(fleet: Fleet, now: float = 101.0, **fields: object) -> list[StateChange]:
    status = EncoderStatus(**{"url": A, "connected": True, **fields})  # type: ignore[arg-type]
    return fleet.reported_one(status, now)


def lost(
    fleet: Fleet, to: EncoderState | None, reason: str, url: str = A, *, began: float = 100.0, now: float = 100.0
) -> list[StateChange]:
    return fleet.lost(url, to, reason, began=began, now=now)


def silent(fleet: Fleet, now: float) -> list[StateChange]:
    """A probe of A is not answered in time; heartbeats arrive."""
    return report(fleet, now) + fleet.probe_failed(A, "timed out", silent=True, now=now)


def states(changes: list[StateChange]) -> list[EncoderState]:
    return [change.new for change in changes]


def usable(fleet: Fleet, now: float = 200.0) -> list[str]:
    return [one.url for one in fleet.usable(now)]


# -- known encoders ------------------------------------------------------------------------------------------------


def test_a_new_encoder_is_suspect_and_gets_no_part_before_it_was_probed() -> None:
    fleet = Fleet()
    fleet.know([A])
    assert fleet.encoders[A].state is SUSPECT and usable(fleet) == [] and fleet.undecided
    assert fleet.due_probes(100.0) == [A]
    assert well(fleet) == [StateChange(A, SUSPECT, UP, "it answers")]
    assert usable(fleet) == [A] and not fleet.undecided


def test_exactly_the_named_encoders_are_known_and_a_known_one_keeps_its_state() -> None:
    fleet, one = fleet_of(UP)
    fleet.know([A, B, B])
    assert list(fleet.encoders) == [A, B] and fleet.encoders[A] is one
    fleet.know([B])
    assert list(fleet.encoders) == [B]
    fleet.know(iter([A]))
    assert list(fleet.encoders) == [A] and fleet.encoders[A].state is SUSPECT


def test_events_about_unknown_encoders_change_nothing() -> None:
    fleet, _ = fleet_of(UP)
    assert well(fleet, B) == []
    assert fleet.probe_failed(B, "", silent=False, now=102.0) == []
    assert fleet.reported_one(EncoderStatus(B, True), 1.0) == []
    assert fleet.delivered(B, 1.0) == fleet.erred(B, "", began=1.0, now=1.0) == lost(fleet, DOWN, "", B) == []
    fleet.posted(B, 1.0)
    fleet.probe_now(B)
    assert list(fleet.encoders) == [A] and fleet.encoders[A].state is UP


# -- every state from every evidence -------------------------------------------------------------------------------


@pytest.mark.parametrize("start", EncoderState)
@pytest.mark.parametrize("target", EncoderState)
def test_every_state_is_reached_from_every_other_one(start: EncoderState, target: EncoderState) -> None:
    fleet, one = fleet_of(start)
    ways: dict[EncoderState, Callable[[], list[StateChange]]] = {
        UP: lambda: well(fleet),
        DRAINING: lambda: well(fleet, draining=True),
        DOWN: lambda: lost(fleet, DOWN, "refused"),
        SUSPECT: lambda: lost(fleet, SUSPECT, "cut off"),
    }
    if target is SUSPECT and start is DRAINING:
        assert ways[SUSPECT]() == []  # a part was cut off, but it still gets no new one
        return
    if target is SUSPECT and start is DOWN:
        report(fleet)
        lost(fleet, DOWN, "refused")
        ways[SUSPECT] = lambda: fleet.probe_failed(A, "timed out", silent=True, now=102.0)
    changes = ways[target]()
    assert one.state is target
    assert [(change.url, change.old, change.new) for change in changes] == (
        [(A, start, target)] if start is not target else []
    )
    assert all(change.reason == one.reason != "" for change in changes)


def test_only_an_encoder_that_is_up_gets_parts() -> None:
    assert {state: usable(fleet_of(state)[0]) for state in EncoderState} == {
        UP: [A], SUSPECT: [], DRAINING: [], DOWN: []
    }  # fmt: skip


def test_only_an_encoder_that_is_suspect_or_just_probed_is_undecided() -> None:
    assert {state: fleet_of(state)[0].undecided for state in EncoderState} == {
        UP: False, SUSPECT: True, DRAINING: False, DOWN: False
    }  # fmt: skip
    fleet, _ = fleet_of(UP)
    lost(fleet, None, "the room failed")
    assert fleet.undecided  # a probe follows
    fleet.due_probes(100.0)
    assert fleet.undecided
    well(fleet)
    assert not fleet.undecided


# -- probes --------------------------------------------------------------------------------------------------------


def probe_times(fleet: Fleet, begin: float, seconds: float, answer: Callable[[float], object]) -> list[float]:
    """The times at which A is probed; ``answer`` is called at once."""
    times = []
    for tick in range(int(seconds * 100)):
        now = begin + tick / 100
        if fleet.due_probes(now):
            times.append(now)
            answer(now)
    return times


def test_an_encoder_that_does_not_answer_is_probed_ever_less_often() -> None:
    fleet, _ = fleet_of(DOWN)
    times = probe_times(fleet, 100.0, 60, lambda now: fleet.probe_failed(A, "refused", silent=False, now=102.0))
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert gaps[0] <= 2 * FIRST_PROBE_SECONDS
    assert all(after >= before - 0.011 for before, after in itertools.pairwise(gaps))
    # It is used again within 5 s of its return, whenever that is.
    assert MOST_PROBE_SECONDS - 0.01 <= gaps[-1] <= MOST_PROBE_SECONDS + 0.011


def test_two_probes_of_an_encoder_are_never_under_way_at_once() -> None:
    fleet, _ = fleet_of(DOWN)
    assert len(probe_times(fleet, 100.0, 60, lambda now: fleet.probe_now(A))) == 1


def test_a_doubt_is_probed_at_once_and_the_intervals_begin_anew() -> None:
    fleet, one = fleet_of(DOWN)
    probe_times(fleet, 100.0, 60, lambda now: fleet.probe_failed(A, "refused", silent=False, now=102.0))
    assert one.probe_delay == MOST_PROBE_SECONDS
    fleet.probe_now(A)
    assert fleet.due_probes(160.0) == [A] and one.probe_at == 160.0 + FIRST_PROBE_SECONDS


def test_an_encoder_that_is_down_comes_back_with_a_probe() -> None:
    fleet, _ = fleet_of(DOWN)
    assert states(well(fleet)) == [UP] and usable(fleet) == [A]


def test_an_answer_to_a_probe_from_before_a_loss_proves_nothing() -> None:
    """The encoder may have answered and died while the answer was on its way."""
    fleet, one = fleet_of(SUSPECT)
    fleet.probe_now(A)
    assert fleet.due_probes(100.0) == [A]
    lost(fleet, DOWN, "refused")
    heard = one.heard_at
    assert well(fleet, now=101.0) == [] and one.state is DOWN and one.heard_at == heard
    assert fleet.due_probes(101.0) == [A]
    assert states(well(fleet, now=102.0)) == [UP]


def test_an_encoder_that_is_up_is_probed_only_when_nothing_was_heard_of_it() -> None:
    fleet, _ = fleet_of(UP)
    times = probe_times(fleet, 100.0, 14, lambda now: well(fleet, now=now))
    assert times == pytest.approx([100.0 + QUIET_SECONDS, 100.0 + 2 * QUIET_SECONDS])
    assert probe_times(fleet, 114.0, 0.5, lambda now: None) == []
    fleet, one = fleet_of(UP)
    report(fleet, 100.0)
    assert fleet.due_probes(100.0) == [A]  # the first report of a connection may be an old one
    well(fleet)
    for now in range(101, 150):
        report(fleet, float(now))
        assert fleet.due_probes(float(now)) == []
    assert one.heard_at == 100.0  # what the scheduler's side says keeps probes away, and is no sign of life


def test_an_encoder_that_drains_is_probed_until_it_ends() -> None:
    fleet, _ = fleet_of(DRAINING)
    times = probe_times(fleet, 100.0, 10, lambda now: well(fleet, now=now, draining=True))
    assert times == pytest.approx([100.0 + MOST_PROBE_SECONDS * number for number in range(1, 5)])
    assert states(fleet.probe_failed(A, "refused", silent=False, now=102.0)) == [DOWN]


def test_a_probe_proves_life_when_it_began_not_when_its_answer_came() -> None:
    fleet, one = fleet_of(UP)
    lost(fleet, None, "lost")
    fleet.due_probes(103.0)
    well(fleet, now=104.5)
    assert one.heard_at == 103.0
    fleet.delivered(A, 105.0)
    well(fleet, now=106.0)
    assert one.heard_at == 105.0  # never back


def test_an_encoder_that_is_doubted_is_probed_until_it_answers() -> None:
    fleet, one = fleet_of(UP)
    report(fleet)
    fleet.probe_now(A)
    times = probe_times(fleet, 102.0, 10, lambda now: silent(fleet, now))
    assert usable(fleet) == [A] and len(times) >= 6
    fleet.due_probes(112.0)
    well(fleet, now=112.0)
    assert not one.doubted and fleet.due_probes(112.0 + QUIET_SECONDS - 0.1) == []


def test_a_busy_encoder_owes_an_answer_to_a_probe_and_stays_up() -> None:
    for state in (UP, DRAINING):
        fleet, one = fleet_of(state)
        report(fleet, draining=state is DRAINING)
        fleet.probe_now(A)
        fleet.due_probes(102.0)
        assert (
            fleet.probe_failed(A, "timed out", silent=True, now=102.0) == [] and one.state is state and not one.probing
        )


def test_a_busy_encoder_that_is_suspect_stays_so_until_it_answers() -> None:
    fleet, one = fleet_of(SUSPECT)
    one.status = EncoderStatus(A, True)
    assert fleet.probe_failed(A, "timed out", silent=True, now=102.0) == [] and one.state is SUSPECT


def test_a_suspect_encoder_that_answers_no_probe_for_too_long_is_down() -> None:
    fleet, one = fleet_of(UP)
    report(fleet)
    well(fleet, now=101.0)
    lost(fleet, SUSPECT, "cut off", now=101.0)
    changes: list[tuple[float, StateChange]] = []
    probe_times(fleet, 101.0, 60, lambda now: changes.extend((now, change) for change in silent(fleet, now)))
    ((at, change),) = changes  # it stays so
    assert (change.old, change.new, change.reason) == (SUSPECT, DOWN, "timed out") and not fleet.undecided
    assert 101.0 + PEER_TIMEOUT <= at <= 101.0 + PEER_TIMEOUT + MOST_PROBE_SECONDS + 0.1
    fleet.due_probes(170.0)
    assert states(well(fleet, now=170.0)) == [UP] and one.silent_since == math.inf


def test_an_answer_in_between_begins_the_silence_anew() -> None:
    answers: list[Callable[[Fleet], object]] = [
        lambda fleet: fleet.probed(A, draining=False, prefix_cache=False, now=108.0),
        lambda fleet: fleet.delivered(A, 108.0),
        lambda fleet: fleet.erred(A, "out of memory", began=108.0, now=108.0),
        lambda fleet: (report(fleet, 108.0, connected=False), report(fleet, 108.0)),
    ]
    for answer in answers:
        fleet, one = fleet_of(SUSPECT)
        one.status = EncoderStatus(A, True)
        probe_times(fleet, 101.0, 7, lambda now, fleet=fleet: silent(fleet, now))  # type: ignore[misc]
        answer(fleet)
        lost(fleet, SUSPECT, "cut off", began=109.0, now=109.0)
        probe_times(fleet, 109.0, 9, lambda now, fleet=fleet: silent(fleet, now))  # type: ignore[misc]
        assert one.state is SUSPECT


def test_a_busy_encoder_that_lost_no_part_stays_up_however_long_it_is_silent() -> None:
    for state in (UP, DRAINING):
        fleet, one = fleet_of(state)
        report(fleet, draining=state is DRAINING)
        for tick in range(600):
            now = 102.0 + tick
            report(fleet, now, draining=state is DRAINING)
            if fleet.due_probes(now):
                assert fleet.probe_failed(A, "timed out", silent=True, now=now) == [] and one.state is state
        lost(fleet, SUSPECT, "cut off", began=700.0, now=702.0)
        fleet.due_probes(702.0)
        fleet.probe_failed(A, "timed out", silent=True, now=704.0)
        assert one.state is (SUSPECT if state is UP else DRAINING)  # its silence counts from the loss on


def test_nobody_waits_for_the_probe_of_an_encoder_that_is_silent_for_too_long() -> None:
    fleet, one = fleet_of(UP)
    report(fleet)
    well(fleet, now=101.0)
    lost(fleet, None, "the room failed", now=101.0)
    probe_times(fleet, 101.0, 8, lambda now: silent(fleet, now))
    assert fleet.undecided
    probe_times(fleet, 109.0, 8, lambda now: silent(fleet, now))
    assert one.state is UP and not fleet.undecided


def test_the_time_of_silence_is_the_peer_timeout() -> None:
    fleet = Fleet(peer_timeout=3.0)
    fleet.know([A])
    fleet.due_probes(100.0)
    fleet.encoders[A].status = EncoderStatus(A, True)
    assert fleet.probe_failed(A, "timed out", silent=True, now=102.9) == []
    assert states(fleet.probe_failed(A, "timed out", silent=True, now=103.0)) == [DOWN]


@pytest.mark.parametrize(("start", "first"), [(UP, [SUSPECT]), (SUSPECT, []), (DRAINING, [DOWN]), (DOWN, [])])
def test_silence_without_a_control_connection_is_the_end_after_the_peer_timeout(
    start: EncoderState, first: list[EncoderState]
) -> None:
    fleet, one = fleet_of(start)  # a busy encoder may not be registered yet

    def silent(now: float) -> list[StateChange]:
        one.probing, one.probed_at = True, now - 2.0
        return fleet.probe_failed(A, "timed out", silent=True, now=now)

    assert states(silent(102.0)) == first and fleet.undecided == (start in (UP, SUSPECT))
    silent(109.9)
    assert (one.state is DOWN) == (start in (DRAINING, DOWN))
    silent(110.0)
    assert one.state is DOWN and not fleet.undecided


def test_an_encoder_that_refuses_or_answers_wrongly_is_down_also_with_a_connection() -> None:
    fleet, _ = fleet_of(UP)
    report(fleet)
    assert states(fleet.probe_failed(A, "refused", silent=False, now=102.0)) == [DOWN]


def test_a_probe_says_whether_the_encoder_keeps_embeddings() -> None:
    fleet, one = fleet_of(UP)
    fleet.probed(A, draining=False, prefix_cache=True, now=101.0)
    assert one.prefix_cache
    well(fleet)
    assert not one.prefix_cache


# -- the scheduler's side ------------------------------------------------------------------------------------------


def test_an_encoder_whose_control_connection_comes_up_is_up_and_probed() -> None:
    for state in (SUSPECT, DOWN):
        fleet, one = fleet_of(state)
        assert report(fleet) == [StateChange(A, state, UP, "it is registered")]
        assert one.heard_at == 100.0 and one.connected_at == 101.0  # a frozen process is connected, too
        assert one.undecided and fleet.due_probes(101.0) == [A]


def test_repeated_standings_change_nothing() -> None:
    """The scheduler's side still says connected for some seconds after the process has died."""
    for state in (SUSPECT, DOWN):
        fleet, one = fleet_of(UP)
        report(fleet)
        lost(fleet, state, "lost")
        for tick in range(100):
            assert report(fleet, 101.0 + tick / 10) == [] and one.state is state


def test_repeated_standings_of_an_encoder_that_is_not_connected_change_nothing() -> None:
    fleet, one = fleet_of(UP)
    for _ in range(10):
        assert report(fleet, connected=False) == [] and one.state is UP


def test_a_lost_control_connection_makes_suspect_and_a_probe_follows() -> None:
    fleet, one = fleet_of(UP)
    report(fleet)
    assert states(report(fleet, connected=False)) == [SUSPECT] and one.probe_at == -math.inf
    fleet.due_probes(102.0)
    assert states(well(fleet, now=102.0)) == [UP]


def test_a_lost_control_connection_says_nothing_new_of_one_that_drains_or_is_down() -> None:
    for state in (DRAINING, DOWN):
        fleet, one = fleet_of(state)
        one.status = EncoderStatus(A, True, draining=state is DRAINING)
        assert report(fleet, connected=False) == [] and one.state is state


def test_an_encoder_that_falls_silent_is_down() -> None:
    for state in (UP, SUSPECT, DRAINING):
        fleet, one = fleet_of(state)
        one.status = EncoderStatus(A, True)
        assert states(report(fleet, connected=False, silences=1)) == [DOWN]
        assert one.reason == "it fell silent" and fleet.due_probes(101.0) == [A]
        assert report(fleet, connected=False, silences=1) == []  # repeated
        assert states(report(fleet, connected=True, silences=1)) == [UP]


def test_one_silent_process_of_several_loses_the_parts_and_a_probe_decides() -> None:
    fleet, one = fleet_of(UP)
    report(fleet)
    changes = report(fleet, silences=1)
    assert states(changes) == [SUSPECT] and changes[0].loses and one.undecided
    again = report(fleet, silences=2)
    assert again[0].loses and one.state is SUSPECT, "another one, while the first is in doubt"


def test_what_the_scheduler_has_forgotten_of_an_encoder_holds_no_longer() -> None:
    fleet, one = fleet_of(UP)
    assert states(fleet.reported([EncoderStatus(one.url, False, refusal="wrong key")], 100.0)) == [DOWN]
    assert well(fleet, now=101.0) == [] and one.state is DOWN
    fleet.reported([], 700.0)
    assert states(well(fleet, now=701.0)) == [UP]


def test_silences_from_before_the_first_report_say_nothing() -> None:
    fleet, one = fleet_of(UP)
    assert report(fleet, silences=5) == [] and one.state is UP


def test_an_encoder_that_refuses_this_server_is_down_whatever_a_probe_says() -> None:
    fleet, one = fleet_of(UP)
    assert states(report(fleet, connected=False, refusal="wrong model")) == [DOWN] and one.reason == "wrong model"
    assert report(fleet, connected=False, refusal="wrong model") == []
    assert well(fleet, now=102.0) == [] and (one.state, one.reason) == (DOWN, "wrong model")
    assert states(report(fleet, 103.0)) == [UP]


def test_another_refusal_is_shown_to_operators() -> None:
    fleet, one = fleet_of(UP)
    report(fleet, refusal="wrong model")
    assert report(fleet, refusal="wrong key") == [] and one.reason == "wrong key"


def test_an_encoder_that_says_it_drains_gets_no_part_until_it_says_otherwise() -> None:
    fleet, _ = fleet_of(UP)
    report(fleet)
    assert states(report(fleet, draining=True)) == [DRAINING] and usable(fleet) == []
    assert report(fleet, draining=True) == []
    assert states(report(fleet, draining=False)) == [UP]


def test_reported_load_is_taken_over() -> None:
    fleet, one = fleet_of(UP)
    report(fleet, load=100)
    assert one.load.backlog > 0


# -- errors and trials ---------------------------------------------------------------------------------------------


def failing(now: float = 100.0) -> tuple[Fleet, Encoder]:
    """A fleet of A, which fails, and B, which is up."""
    fleet, one = fleet_of(UP, now)
    fleet.know([A, B])
    fleet.due_probes(now)
    well(fleet, B, now)
    for _ in range(FAILURES_IN_A_ROW):
        fleet.erred(A, "out of memory", began=now, now=now)
    assert one.state is SUSPECT and one.failing
    return fleet, one


def test_errors_in_a_row_make_suspect_and_an_embedding_in_between_does_not() -> None:
    fleet, one = fleet_of(UP)
    for _ in range(5):
        for _ in range(FAILURES_IN_A_ROW - 1):
            assert fleet.erred(A, "out of memory", began=100.0, now=100.0) == []
        assert fleet.delivered(A, 100.0) == []
    for _ in range(FAILURES_IN_A_ROW - 1):
        fleet.erred(A, "out of memory", began=100.0, now=100.0)
    (change,) = fleet.erred(A, "out of memory", began=100.0, now=100.0)
    assert change.new is SUSPECT and "out of memory" in change.reason
    assert fleet.erred(A, "out of memory", began=100.0, now=100.0) == []
    assert one.failed == 5 * (FAILURES_IN_A_ROW - 1) + FAILURES_IN_A_ROW + 1


def test_an_encoder_that_fails_gets_one_trial_at_growing_intervals() -> None:
    fleet, _ = failing()
    times = []
    for tick in range(300 * 10):
        now = 100.0 + tick / 10
        if A in usable(fleet, now):
            times.append(now)
            fleet.posted(A, now)
            fleet.erred(A, "out of memory", began=now, now=now)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert times[0] == pytest.approx(100.0 + FIRST_TRIAL_SECONDS)
    assert gaps[:5] == pytest.approx([2, 4, 8, 16, 32], abs=0.11)
    assert gaps[5:] == pytest.approx([MOST_TRIAL_SECONDS] * len(gaps[5:]), abs=0.11) and len(gaps) > 6


@pytest.mark.parametrize("state", [SUSPECT, DRAINING])
def test_an_encoder_whose_last_error_came_while_it_was_not_up_gets_its_trial(state: EncoderState) -> None:
    fleet, _ = fleet_of(state)
    fleet.know([A, B])
    fleet.due_probes(100.0)
    well(fleet, B, 100.0)
    for _ in range(FAILURES_IN_A_ROW):
        fleet.erred(A, "out of memory", began=100.0, now=100.0)
    well(fleet, A, 101.0)
    assert usable(fleet, 101.0) == [B] and usable(fleet, 100.0 + FIRST_TRIAL_SECONDS) == [B, A]


def test_a_trial_that_takes_long_is_not_joined_by_another() -> None:
    fleet, one = failing()
    assert A in usable(fleet, 102.0)
    fleet.posted(A, 102.0)
    one.load.add(1.0, 102.0)
    assert usable(fleet, 500.0) == [B]
    one.load.remove(1.0)
    assert A in usable(fleet, 500.0)


def test_a_trial_that_succeeds_makes_up_again() -> None:
    fleet, one = failing()
    fleet.posted(A, 102.0)
    assert states(fleet.delivered(A, 103.0)) == [UP] and not one.failing
    for _ in range(FAILURES_IN_A_ROW):
        fleet.erred(A, "again", began=104.0, now=104.0)
    assert one.trial_at == 104.0 + FIRST_TRIAL_SECONDS


def test_an_encoder_that_fails_is_used_where_there_is_no_other() -> None:
    fleet, _ = failing()
    lost(fleet, DOWN, "refused", B)
    assert usable(fleet, 100.0) == [A]


def test_answers_to_probes_do_not_make_an_encoder_well_that_fails() -> None:
    fleet, one = failing()
    assert well(fleet, now=101.0) == [] and one.state is SUSPECT and not one.undecided
    fleet.reported_one(EncoderStatus(A, True), 101.0)
    assert one.state is SUSPECT


def test_an_encoder_that_was_down_meanwhile_may_be_another_process_and_starts_anew() -> None:
    fleet, one = failing()
    fleet.probe_failed(A, "refused", silent=False, now=102.0)
    assert states(well(fleet, now=101.0)) == [UP] and one.errors == 0


def flap(fleet: Fleet, proof: EncoderState | None, now: float) -> None:
    """A part is posted to A at ``now`` and lost, a second later a probe is answered."""
    fleet.posted(A, now)
    lost(fleet, proof, "lost", began=now, now=now)
    fleet.due_probes(now)
    well(fleet, now=now + 1.0)


@pytest.mark.parametrize("proof", [DOWN, SUSPECT, None])
def test_an_encoder_that_loses_every_part_gets_trials_at_growing_intervals(
    proof: EncoderState | None,
) -> None:
    fleet, one = fleet_of(UP)
    fleet.know([A, B])
    fleet.due_probes(100.0)
    well(fleet, B)
    times = []
    for tick in range(300 * 10):
        now = 100.0 + tick / 10
        if one.state is not DOWN and A in usable(fleet, now):
            times.append(now)
            flap(fleet, proof, now)
    assert times[:3] == pytest.approx([100.0, 100.1, 100.2]) and one.state is SUSPECT and one.failing
    gaps = [after - before for before, after in itertools.pairwise(times[2:])]
    assert gaps[:6] == pytest.approx([2, 2, 4, 8, 16, 32], abs=0.11)
    assert gaps[6:] == pytest.approx([MOST_TRIAL_SECONDS] * len(gaps[6:]), abs=0.11) and len(gaps) > 7
    fleet.posted(A, 500.0)
    assert states(fleet.delivered(A, 501.0)) == [UP] and fleet.failing == [] and one.losses == 0


def test_the_reason_names_the_losses() -> None:
    fleet, one = fleet_of(UP)
    for number in range(FAILURES_IN_A_ROW):
        changes = lost(fleet, None, "the room failed", began=101.0 + number, now=101.0 + number)
    assert changes == [StateChange(A, UP, SUSPECT, "3 losses in a row, the last: the room failed")]
    lost(fleet, DOWN, "refused", began=105.0, now=105.0)
    fleet.due_probes(105.0)
    assert states(well(fleet, now=106.0)) == [SUSPECT] and one.reason == "it answers, but its last parts failed"
    assert well(fleet, now=107.0) == []


def test_parts_lost_with_one_process_are_one_loss_and_the_next_gets_work() -> None:
    fleet, one = fleet_of(UP)
    for death in range(FAILURES_IN_A_ROW - 1):
        now = 110.0 + 10 * death
        for number in range(8):  # all were posted before the first of them was lost
            lost(fleet, SUSPECT, "cut off", began=now - 1.0 + number / 100, now=now + number / 100)
        fleet.due_probes(now + 1.0)
        fleet.probe_failed(A, "refused", silent=False, now=now + 1.0)
        lost(fleet, None, "the room failed", began=now - 0.5, now=now + 1.5)
        fleet.due_probes(now + 2.0)
        assert states(well(fleet, now=now + 2.0)) == [UP] and usable(fleet, now + 2.0) == [A]
    assert one.losses == FAILURES_IN_A_ROW - 1


def test_a_part_that_an_encoder_does_not_take_while_it_drains_is_no_loss() -> None:
    fleet, one = fleet_of(UP)
    for number in range(10):
        lost(fleet, DRAINING, "it drains", began=101.0 + number, now=101.0 + number)
        fleet.due_probes(101.0 + number)
        well(fleet, now=101.0 + number)
    assert one.losses == 0 and one.state is UP


def test_an_embedding_in_between_forgives_the_losses() -> None:
    fleet, one = fleet_of(UP)
    for number in range(20):
        now = 101.0 + number
        lost(fleet, None, "the room failed", began=now, now=now)
        if number % 2:
            fleet.delivered(A, now)
        assert one.state is UP


def test_a_probe_is_awaited_of_an_encoder_that_fails_only_after_a_loss() -> None:
    fleet, one = fleet_of(UP)
    for number in range(FAILURES_IN_A_ROW):
        lost(fleet, None, "the room failed", began=101.0 + number, now=101.0 + number)
    assert fleet.failing == [one] and fleet.undecided
    fleet.due_probes(104.0)
    well(fleet, now=104.0)
    assert fleet.failing == [one] and not fleet.undecided


def test_an_embedding_of_an_encoder_that_drains_does_not_make_it_up() -> None:
    fleet, one = fleet_of(DRAINING)
    assert fleet.delivered(A, 101.0) == [] and one.state is DRAINING


def test_an_embedding_clears_a_suspicion() -> None:
    fleet, _ = fleet_of(SUSPECT)
    assert states(fleet.delivered(A, 101.0)) == [UP]


def test_a_lost_part_is_counted_and_followed_by_a_probe_whatever_it_proves() -> None:
    for proof in (None, SUSPECT, DRAINING, DOWN):
        fleet, one = fleet_of(UP)
        fleet.posted(A, 101.0)
        changes = lost(fleet, proof, "lost")
        assert states(changes) == ([] if proof is None else [proof])
        assert fleet.due_probes(101.0) == [A] and (one.tried, one.failed) == (1, 1)


def test_a_part_that_was_cut_off_proves_nothing_worse_than_what_is_known() -> None:
    for state in (SUSPECT, DRAINING, DOWN):
        fleet, one = fleet_of(state)
        assert lost(fleet, SUSPECT, "cut off") == [] and one.state is state
