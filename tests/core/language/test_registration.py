"""Registrations: what a language rank does about its encoders, event by event, and in a random walk over all events."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest

from sglang_mm_conn.core.actions import (
    Connect,
    Disconnect,
    EncoderRefused,
    Log,
    LookUp,
    ProcessLost,
    ProcessReady,
    RegistrationAction,
    SendHeartbeat,
    SendRegister,
    SendRetire,
)
from sglang_mm_conn.core.errors import ProtocolError
from sglang_mm_conn.core.language.encoder_records import FIRST_DELAY_SECONDS, MOST_DELAY_SECONDS
from sglang_mm_conn.core.language.registration import FORGET_SECONDS, RETRY_SECONDS, Registrations
from sglang_mm_conn.core.messages import RefusalKind, Refused, Registered
from sglang_mm_conn.core.states import LookUpState, RegistrationState

URL, OTHER = "http://encoder:1", "http://encoder.example:1"
SESSION = "10.0.0.1:5"
PEER_TIMEOUT, HEARTBEAT = 10.0, 1.0


class Path:
    session_id = SESSION

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def is_current(self, epoch: int) -> bool:
        return epoch == self._sessions.epoch


class Sessions:
    """Offers shm first and mooncake next, both as one session."""

    first_path = "shm"
    epoch = 0

    def __init__(self) -> None:
        self.paths = {"shm": Path(self), "mooncake": Path(self)}

    def other_path(self, refused: str) -> str | None:
        return "mooncake" if refused == "shm" else None


def made() -> tuple[Registrations, Sessions]:
    sessions = Sessions()
    return Registrations(sessions, peer_timeout=PEER_TIMEOUT, heartbeat=HEARTBEAT), sessions


def known(now: float = 100.0) -> tuple[Registrations, Sessions]:
    """Process "a" of URL is known, its connection is being opened."""
    core, sessions = made()
    assert core.use(URL, now) == [LookUp(URL)]
    assert core.looked_up(URL, {"a": 7}, now) == [Connect("a", URL, 7)]
    return core, sessions


def grant(**changes: Any) -> Registered:
    return Registered(**{"mooncake_session_id": SESSION, "epoch": 0, "incarnation": "a", **changes})


def ready(now: float = 100.0) -> tuple[Registrations, Sessions]:
    core, sessions = known(now)
    core.connected("a", now)
    core.registered("a", grant(), now)
    return core, sessions


def without_logs(actions: list[RegistrationAction]) -> list[RegistrationAction]:
    return [action for action in actions if not isinstance(action, Log)]


def test_a_process_is_looked_up_connected_registered_and_then_ready() -> None:
    core, _ = known()
    assert core.connected("a", 101.0) == [SendRegister("a", "shm", 0, 1)]
    actions = without_logs(core.registered("a", grant(), 102.0))
    assert actions == [SendRetire("a", "shm"), ProcessReady("a", SESSION, "shm", 0, (URL,))]
    assert core.is_usable(URL, 103.0) and core.use(URL, 103.0) == []


def test_a_url_is_looked_up_once_at_a_time_and_ever_less_often_while_nothing_answers() -> None:
    core, _ = made()
    now, times = 100.0, []
    core.use(URL, now)
    assert core.tick(now + 60) == [] and core.use(URL, now + 60) == []  # one is under way
    core.absent(URL, "nobody listens", connection_refused=False)
    for _ in range(4000):
        now += 0.01
        if LookUp(URL) in core.tick(now):
            times.append(now)
            core.absent(URL, "nobody listens", connection_refused=False)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert (
        all(after > before - 0.01 for before, after in itertools.pairwise(gaps))
        and gaps[0] < 2 * FIRST_DELAY_SECONDS
        and gaps[-1] <= MOST_DELAY_SECONDS + 0.02
    )


def test_the_same_cause_is_logged_once() -> None:
    core, _ = made()
    core.use(URL, 100.0)
    assert [type(one) for one in core.absent(URL, "nobody listens", connection_refused=False)] == [Log]
    core.tick(200.0)
    assert core.absent(URL, "nobody listens", connection_refused=False) == []


def test_a_url_whose_process_is_registered_through_another_one_is_no_longer_refused() -> None:
    core, _ = known()
    core.use(OTHER, 100.0)
    core.look_up_failed(OTHER, "HTTP 404", refuse=True)
    core.connected("a", 101.0)
    core.registered("a", grant(), 101.0)
    assert not core.is_usable(OTHER, 102.0)
    core.tick(102.0)
    assert core.looked_up(OTHER, {"a": 7}, 102.0) == [ProcessReady("a", SESSION, "shm", 0, (URL, OTHER))]
    assert core.is_usable(OTHER, 103.0) and core.use(OTHER, 103.0) == []


@pytest.mark.parametrize("sent", [False, True])
def test_an_encoder_that_waits_for_this_ranks_register_is_not_refused_as_silent(sent: bool) -> None:
    core, _ = known()
    core.connected("a", 100.0)
    if sent:
        core.register_sent("a", 101.0)
    actions = core.tick(101.1 + PEER_TIMEOUT)
    assert any(isinstance(action, ProcessLost) for action in actions)
    assert any(isinstance(action, EncoderRefused) for action in actions) == sent


def test_the_time_that_a_register_took_to_make_is_no_silence_of_the_encoder() -> None:
    core, _ = known()
    core.connected("a", 100.0)
    core.register_sent("a", 99.0 + PEER_TIMEOUT)
    core.register_sent("gone", 99.0)
    assert not any(isinstance(action, ProcessLost) for action in core.tick(101.0 + PEER_TIMEOUT))


def test_a_url_that_is_no_encoder_fails_every_request_until_it_is_one() -> None:
    core, _ = made()
    core.use(URL, 100.0)
    assert EncoderRefused(URL, "HTTP 404") in core.look_up_failed(URL, "HTTP 404", refuse=True)
    assert EncoderRefused(URL, "HTTP 404") in core.use(URL, 101.0)
    core.looked_up(URL, {"a": 7}, 102.0)
    core.connected("a", 103.0)
    core.registered("a", grant(), 104.0)
    assert core.use(URL, 105.0) == []


def test_a_look_up_that_failed_by_itself_fails_no_request() -> None:
    core, _ = made()
    core.use(URL, 100.0)
    assert without_logs(core.look_up_failed(URL, "RuntimeError: no thread", refuse=False)) == []


def test_a_restarted_encoder_loses_the_old_process_and_connects_to_the_new_one() -> None:
    core, _ = ready()
    core.disconnected("a", 101.0)
    (disconnect, lost, connect) = without_logs(core.looked_up(URL, {"b": 8}, 102.0))
    assert disconnect == Disconnect("a") and isinstance(lost, ProcessLost) and "restarted" in lost.reason
    assert connect == Connect("b", URL, 8) and core.encoders[URL].machine.state is LookUpState.RESOLVED


def test_a_refused_connection_loses_the_processes_and_no_answer_does_not() -> None:
    core, _ = ready()
    core.disconnected("a", 101.0)
    assert without_logs(core.absent(URL, "timeout", connection_refused=False)) == []
    core.tick(105.0)
    lost = core.absent(URL, "refused", connection_refused=True)[-1]
    assert isinstance(lost, ProcessLost) and lost.incarnation == "a"


def test_a_connection_that_comes_back_registers_again() -> None:
    core, _ = ready()
    assert core.disconnected("a", 101.0) == [LookUp(URL)] and not core.is_usable(URL, 101.0)
    assert core.connected("a", 102.0) == [SendRegister("a", "shm", 0, 2)]
    core.registered("a", grant(), 103.0)
    assert core.is_usable(URL, 104.0)


def test_two_urls_of_one_process_share_its_connection_and_are_both_told() -> None:
    core, _ = known()
    core.use(OTHER, 100.0)
    assert core.looked_up(OTHER, {"a": 7}, 100.0) == []
    core.connected("a", 101.0)
    refused = [
        one
        for one in core.refused("a", Refused(reason="no", kind=RefusalKind.MISMATCH), 102.0)
        if not isinstance(one, Log)
    ]
    assert refused == [EncoderRefused(URL, "refused this language server: no"),
                       EncoderRefused(OTHER, "refused this language server: no")]  # fmt: skip


def test_a_refusal_for_good_is_asked_again_after_a_while_and_not_before() -> None:
    core, _ = known()
    core.connected("a", 101.0)
    core.refused("a", Refused(reason="block size 1, here 2", kind=RefusalKind.MISMATCH), 101.0)
    assert core.processes["a"].machine.state is RegistrationState.REFUSED
    core.seen("a", 101.0 + RETRY_SECONDS)
    assert not any(isinstance(one, SendRegister) for one in core.tick(101.0 + RETRY_SECONDS - 0.1))
    assert SendRegister("a", "shm", 0, 2) in core.tick(101.0 + RETRY_SECONDS)


def test_a_refused_path_is_followed_by_the_other_and_a_second_refusal_is_final() -> None:
    core, _ = known()
    core.connected("a", 101.0)
    no_shm = Refused(reason="no such segment", kind=RefusalKind.DATA_PATH, data_path="shm")
    assert without_logs(core.refused("a", no_shm, 101.0)) == [SendRegister("a", "mooncake", 0, 2)]
    assert core.refused("a", no_shm, 101.0) == []  # it was offered twice
    no_mooncake = Refused(reason="none installed", kind=RefusalKind.DATA_PATH, data_path="mooncake")
    assert any(isinstance(one, EncoderRefused) for one in core.refused("a", no_mooncake, 102.0))


def test_a_registered_process_that_refuses_loses_its_rooms() -> None:
    core, _ = ready()
    core.register_again("shm")
    actions = core.refused("a", Refused(reason="no", kind=RefusalKind.MISMATCH), 102.0)
    assert isinstance(actions[0], ProcessLost) and not core.is_usable(URL, 103.0)


def test_an_encoder_that_forgot_the_session_is_told_it_at_the_next_tick() -> None:
    core, _ = ready()
    for _ in range(100):
        assert core.refused("a", Refused(reason="unknown", kind=RefusalKind.REGISTER_FIRST), 101.0) == []
    assert [one for one in core.tick(101.1) if isinstance(one, SendRegister)] == [SendRegister("a", "shm", 0, 2)]


def test_an_answer_to_nothing_changes_nothing() -> None:
    core, _ = ready()
    for _ in range(100):
        assert core.registered("a", grant(), 101.0) == []
        assert core.refused("a", Refused(reason="no", kind=RefusalKind.MISMATCH), 101.0) == []
    assert core.is_usable(URL, 102.0)


def test_another_process_on_the_port_is_not_taken_for_this_one() -> None:
    core, _ = known()
    core.connected("a", 101.0)
    lost = core.registered("a", grant(incarnation="b"), 102.0)[-1]
    assert isinstance(lost, ProcessLost) and "another process" in lost.reason


def test_a_session_that_is_not_this_ranks_is_an_error() -> None:
    core, _ = known()
    core.connected("a", 101.0)
    with pytest.raises(ProtocolError, match=r"10\.9\.9\.9:9"):
        core.registered("a", grant(mooncake_session_id="10.9.9.9:9"), 102.0)


def test_a_grant_of_an_old_epoch_makes_nobody_ready_and_is_asked_for_again() -> None:
    core, sessions = known()
    core.connected("a", 101.0)
    sessions.epoch = 1
    assert core.registered("a", grant(), 102.0) == [] and not core.is_usable(URL, 102.0)
    assert SendRegister("a", "shm", 0, 2) in core.tick(102.0)


def test_a_newer_epoch_is_offered_while_the_process_stays_ready() -> None:
    core, sessions = ready()
    sessions.epoch = 1
    assert core.register_again("mooncake") == []
    assert core.register_again("shm") == [SendRegister("a", "shm", 0, 2)] and core.is_usable(URL, 101.0)
    assert core.registered("a", grant(epoch=1), 102.0)[-1] == ProcessReady("a", SESSION, "shm", 1, (URL,))
    assert core.retired("shm") == [SendRetire("a", "shm")]


def test_a_silent_process_is_lost_and_its_slot_kept_until_nobody_writes_with_it() -> None:
    core, _ = ready()
    lost = [one for one in core.tick(100.0 + PEER_TIMEOUT + 0.1) if isinstance(one, ProcessLost)]
    assert [one.incarnation for one in lost] == ["a"]
    assert core.unused_slots(keep={"a"}) == [] and core.unused_slots(keep=set()) == [("a", 0)]


def test_a_ready_process_that_cannot_be_renewed_keeps_its_rooms_and_heartbeats() -> None:
    core, _ = ready()
    core.register_again("shm")
    actions = core.cannot_register("a", "no memory for another engine", 101.0)
    assert not any(isinstance(one, ProcessLost) for one in actions) and core.processes["a"].ready
    core.seen("a", 102.0)
    assert SendHeartbeat("a") in core.tick(102.0)
    assert SendRegister("a", "shm", 0, 3) in core.tick(101.0 + RETRY_SECONDS)


def test_a_look_up_that_fails_refuses_no_url_with_a_ready_process() -> None:
    core, _ = ready()
    core.disconnected("a", 101.0)
    core.connected("a", 101.0)
    core.registered("a", grant(), 101.0)
    assert without_logs(core.look_up_failed(URL, "HTTP 500", refuse=True)) == []
    assert core.use(URL, 102.0) == []


def test_heartbeats_go_to_ready_processes_only() -> None:
    core, _ = known()
    assert not any(isinstance(one, SendHeartbeat) for one in core.tick(100.5))
    core.connected("a", 101.0)
    core.registered("a", grant(), 101.0)
    assert SendHeartbeat("a") in core.tick(102.0) and SendHeartbeat("a") not in core.tick(102.5)


def test_an_encoder_that_is_not_used_and_not_there_is_forgotten() -> None:
    core, _ = made()
    core.use(URL, 100.0)
    core.absent(URL, "nobody listens", connection_refused=True)
    core.tick(100.0 + FORGET_SECONDS + 1)
    assert not core.encoders


class Walk:
    """Random events over three processes and two URLs, with what must hold after each of them."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.core, self.sessions = made()
        self.now = 100.0
        self.looking: set[str] = set()
        self.open: set[str] = set()  # control connections
        self.ready: set[str] = set()  # according to ProcessReady and ProcessLost
        self.numbers: list[int] = []

    def carry_out(self, actions: list[RegistrationAction]) -> None:
        for action in actions:
            match action:
                case LookUp(url):
                    assert url not in self.looking, "two concurrent look-ups of one URL"
                    self.looking.add(url)
                case Connect(incarnation, _, _):
                    assert incarnation not in self.open, "connected twice"
                    self.open.add(incarnation)
                case Disconnect(incarnation):
                    self.open.remove(incarnation)
                case SendRegister(incarnation, path, slot, number):
                    assert incarnation in self.open, "a Register to a process that was given up"
                    assert slot == self.core.slots[incarnation] and path in ("shm", "mooncake")
                    self.numbers.append(number)
                case SendHeartbeat(incarnation) | SendRetire(incarnation, _):
                    assert self.core.processes[incarnation].ready
                case ProcessReady(incarnation, session, _, epoch, _):
                    assert incarnation in self.open and session == SESSION and epoch == self.sessions.epoch
                    self.ready.add(incarnation)
                case ProcessLost(incarnation, reason):
                    assert reason
                    self.ready.discard(incarnation)
                case EncoderRefused(url, reason):
                    assert reason and url in self.core.encoders

    def check(self) -> None:
        core = self.core
        assert self.open == set(core.processes), "a connection without a process, or a process without one"
        assert self.numbers == sorted(set(self.numbers)), "numbers of registrations only rise"
        for incarnation, process in core.processes.items():
            assert process.machine.state is not RegistrationState.LOST and process.unanswered >= 0
            assert not process.ready or incarnation in self.ready, "READY, but without a ProcessReady"
            assert core.slots[incarnation] == process.slot
        assert len(set(core.slots.values())) == len(core.slots), "one writer slot for two processes"
        for url, encoder in core.encoders.items():
            assert (encoder.machine.state is LookUpState.LOOKING_UP) == (url in self.looking)
            assert all(core.processes.get(key) is one for key, one in encoder.processes.items())
            assert FIRST_DELAY_SECONDS <= encoder.delay <= MOST_DELAY_SECONDS
            assert core.is_usable(url, self.now) <= encoder.reachable

    def answer_look_up(self) -> list[RegistrationAction]:
        if not self.looking:
            return []
        url = self.chance.choice(sorted(self.looking))
        self.looking.remove(url)
        there = {key: number for number, key in enumerate("abc") if self.chance.random() < 0.6}
        return self.chance.choice([
            lambda: self.core.looked_up(url, there, self.now),
            lambda: self.core.looked_up(url, there, self.now),
            lambda: self.core.absent(url, "gone", connection_refused=self.chance.random() < 0.5),
            lambda: self.core.look_up_failed(url, "404", refuse=self.chance.random() < 0.5),
        ])()  # fmt: skip

    def step(self) -> None:
        core, chance = self.core, self.chance
        self.now += chance.choice((0.0, 0.1, 1.0, 4.0))
        url, process = chance.choice((URL, OTHER)), chance.choice("abcd")
        refusal = Refused(
            reason="no", kind=chance.choice(list(RefusalKind)),
            data_path=chance.choice(("shm", "mooncake")),
        )  # fmt: skip
        answer = grant(incarnation=chance.choice((process, process, process, "b")), epoch=chance.choice((0, 1)))
        events: list[Callable[[], list[RegistrationAction]]] = [
            lambda: core.use(url, self.now),
            self.answer_look_up,
            self.answer_look_up,
            lambda: core.connected(process, self.now) if process in self.open else [],
            lambda: core.disconnected(process, self.now) if process in self.open else [],
            lambda: core.registered(process, answer, self.now),
            lambda: core.registered(process, answer, self.now),
            lambda: core.refused(process, refusal, self.now),
            lambda: core.cannot_register(process, "no engine", self.now),
            lambda: core.register_again(chance.choice(("shm", "mooncake"))),
            lambda: core.retired("mooncake"),
            lambda: core.replace_slot(process) or [],  # type: ignore[func-returns-value]
            lambda: core.seen(process, self.now) or [],  # type: ignore[func-returns-value]
            lambda: core.tick(self.now),
            lambda: core.tick(self.now),
        ]
        if chance.random() < 0.02:
            self.sessions.epoch = 1
        if chance.random() < 0.1:
            for incarnation, _ in core.unused_slots(keep=set()):
                del core.slots[incarnation]
        self.carry_out(chance.choice(events)())
        self.check()


@pytest.mark.parametrize("seed", range(20))
def test_a_random_walk_keeps_every_rule(seed: int) -> None:
    walk = Walk(seed)
    for _ in range(600):
        walk.step()
    assert walk.numbers, "the walk registered no process"
