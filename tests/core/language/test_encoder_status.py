"""What a language rank tells the dispatchers of its encoders."""

from __future__ import annotations

from sglang_mm_conn.core.actions import EncoderRefused
from sglang_mm_conn.core.dispatch.encoders import EncoderStatus
from sglang_mm_conn.core.language.registration import FORGET_SECONDS, Registrations
from sglang_mm_conn.core.messages import Heartbeat, RefusalKind, Refused
from tests.core.language.test_registration import OTHER, PEER_TIMEOUT, URL, grant, known, made, ready


def status(core: Registrations, url: str = URL) -> EncoderStatus:
    (one,) = [one for one in core.statuses() if one.url == url]
    return one


def test_an_encoder_is_connected_once_a_process_of_it_is_registered() -> None:
    core, _ = made()
    assert core.statuses() == []
    core, _ = known()
    assert status(core) == EncoderStatus(URL, False)
    core.connected("a", 101.0)
    assert not status(core).connected
    core.registered("a", grant(), 102.0)
    assert status(core) == EncoderStatus(URL, True)


def test_a_connection_that_breaks_is_lost_only_with_its_process() -> None:
    core, _ = ready()
    core.disconnected("a", 101.0)
    assert status(core).connected  # it may come back; a look-up finds out
    core.absent(URL, "timed out", connection_refused=False)
    assert status(core).connected
    core.tick(105.0)
    core.absent(URL, "refused", connection_refused=True)
    assert status(core) == EncoderStatus(URL, False)


def test_a_heartbeat_says_how_loaded_the_encoder_is_and_whether_it_drains() -> None:
    core, _ = ready()
    core.heartbeat("a", Heartbeat(incarnation="a", load=7, draining=True))
    assert status(core) == EncoderStatus(URL, True, load=7, draining=True)
    core.heartbeat("a", Heartbeat(incarnation="a"))
    assert status(core) == EncoderStatus(URL, True)
    core.heartbeat("unknown", Heartbeat(incarnation="unknown", load=9))
    assert status(core) == EncoderStatus(URL, True)


def test_loads_of_all_processes_of_an_encoder_are_added() -> None:
    core, _ = ready()
    core.disconnected("a", 101.0)
    core.looked_up(URL, {"a": 7, "b": 8}, 101.0)
    core.heartbeat("a", Heartbeat(incarnation="a", load=2))
    core.heartbeat("b", Heartbeat(incarnation="b", load=3, draining=True))
    assert status(core) == EncoderStatus(URL, True, load=5, draining=True)


def test_a_process_that_falls_silent_is_counted_once_for_each_of_its_urls() -> None:
    core, _ = ready()
    core.use(OTHER, 100.0)
    core.looked_up(OTHER, {"a": 7}, 100.0)
    for _ in range(3):
        core.tick(100.0 + PEER_TIMEOUT + 0.1)
    assert status(core) == EncoderStatus(URL, False, silences=1)
    assert status(core, OTHER) == EncoderStatus(OTHER, False, silences=1)


def test_an_encoder_whose_control_port_is_silent_is_refused_until_registered() -> None:
    core, _ = known()  # its HTTP port answers look-ups
    assert not status(core).refusal
    for now in (100.0 + PEER_TIMEOUT + 0.1, 100.2 + 2 * PEER_TIMEOUT):
        assert EncoderRefused(URL, f"encoder {URL} is silent for 10 s on its control port") in core.tick(now)
        core.looked_up(URL, {"a": 7}, now)
        assert status(core).refusal and not status(core).connected
    core.connected("a", now)
    core.registered("a", grant(), now)
    assert status(core) == EncoderStatus(URL, True)


def test_one_silent_process_of_several_refuses_no_request() -> None:
    core, _ = ready()
    core.disconnected("a", 105.0)
    core.looked_up(URL, {"a": 7, "b": 8}, 105.0)
    core.connected("a", 105.0)
    core.registered("a", grant(), 105.0)
    core.seen("a", 105.0)
    core.tick(105.1 + PEER_TIMEOUT - 0.2)
    core.seen("a", 114.9)
    assert core.tick(105.1 + PEER_TIMEOUT) and not status(core).refusal and core.is_usable(URL, 116.0)


def test_every_silence_is_counted() -> None:
    core, _ = ready()
    now = 100.0
    for number in range(1, 4):
        now += PEER_TIMEOUT + 0.1
        core.tick(now)
        assert status(core).silences == number
        core.looked_up(URL, {"a": 7}, now)
        core.connected("a", now)
        core.registered("a", grant(), now)


def test_an_end_that_was_seen_otherwise_is_no_silence() -> None:
    core, _ = ready()
    core.disconnected("a", 101.0)
    core.looked_up(URL, {"b": 8}, 102.0)
    assert status(core).silences == 0
    # A process that was never registered may be none at all.
    core.tick(102.0 + PEER_TIMEOUT + 0.1)
    assert status(core).silences == 0


def test_a_refusal_is_told_until_the_encoder_takes_this_server() -> None:
    core, _ = known()
    core.connected("a", 101.0)
    core.refused("a", Refused(reason="another model", kind=RefusalKind.MISMATCH), 101.0)
    assert "another model" in status(core).refusal and not status(core).connected
    core.tick(110.0)
    core.registered("a", grant(), 110.0)
    assert status(core) == EncoderStatus(URL, True)


def test_an_encoder_that_is_forgotten_is_told_no_more() -> None:
    core, _ = made()
    core.use(URL, 100.0)
    core.absent(URL, "nobody listens", connection_refused=True)
    assert status(core) == EncoderStatus(URL, False)
    core.tick(100.0 + FORGET_SECONDS + 1)
    assert core.statuses() == []
