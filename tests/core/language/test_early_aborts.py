"""Aborts of rooms that no encoder process has announced yet."""

from __future__ import annotations

from sglang_mm_conn.core.language import early_aborts
from sglang_mm_conn.core.language.early_aborts import EarlyAborts
from sglang_mm_conn.core.language.receiver_room import Peer, ReceiverRoom
from sglang_mm_conn.core.messages import Abort
from tests.core.harness import ENCODER, Wire, only, sends


def peer(incarnation: str, *urls: str) -> Peer:
    return Peer(incarnation, "10.0.0.1:17001", "shm", exclusive_lock=True, urls=urls)


def room(name: str, encoder: str = ENCODER) -> ReceiverRoom:
    return ReceiverRoom(name, encoder, 60.0, 0.0, 1)


def test_a_room_that_is_given_up_before_it_is_announced_is_never_encoded() -> None:
    wire = Wire()
    name = wire.room()
    wire.expect(name)
    wire.abort(name)
    wire.settle()
    wire.announce(name, 100)
    assert wire.encoder_ended[name].code == 499 and not wire.encoder.rooms
    wire.settle()
    wire.assert_baseline()


def test_every_process_of_the_encoder_hears_it_and_no_other_encoder_does() -> None:
    peers = [peer("a", ENCODER), peer("b", "http://other"), peer("c", "http://alias", ENCODER)]
    aborts = EarlyAborts().give_up(room("1"), "the client has gone", peers, 0.0)
    assert sends(aborts) == [Abort(room="1", mooncake_session_id="10.0.0.1:17001", reason="the client has gone")] * 2
    assert [action.peer for action in aborts] == ["a", "c"]  # type: ignore[union-attr]


def test_an_encoder_that_is_frozen_hears_it_when_it_is_back() -> None:
    wire = Wire()
    name = wire.room()
    wire.expect(name)
    wire.silent(wire.rank)
    wire.abort(name)
    wire.reconnect()
    wire.settle()
    wire.announce(name, 100)
    assert wire.encoder_ended[name].code == 499
    wire.settle()
    wire.assert_baseline()


def test_what_an_absent_encoder_must_hear_is_bounded() -> None:
    aborts = EarlyAborts()
    for number in range(early_aborts._LIMIT + 1):
        assert aborts.give_up(room(str(number)), "", [], float(number)) == []
    assert aborts.registered(peer("b", "http://other"), 0.0) == []
    told = [message.room for message in only(sends(aborts.registered(peer("a", ENCODER), 1.0)), Abort)]
    assert told == [str(number) for number in range(1, early_aborts._LIMIT + 1)]
    now = early_aborts._LIMIT + early_aborts.SECONDS - 1
    assert len(aborts.registered(peer("c", ENCODER), now)) == 1  # each process of an encoder hears it
    assert aborts.registered(peer("a", ENCODER), now + 1) == []
