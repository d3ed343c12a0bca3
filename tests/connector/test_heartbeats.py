"""What an encoder's heartbeats say of its server, and how all its rooms fail at once."""

from __future__ import annotations

from sglang_mm_conn.connector.encoder.endpoint import ServerStatus
from sglang_mm_conn.core.actions import Ended
from sglang_mm_conn.core.messages import Failed, Heartbeat
from sglang_mm_conn.core.rooms import new_room_base
from tests.connector.test_registrations import Ground

SERVER = "5e" * 8


def heartbeats(ground: Ground, peer: str) -> list[tuple[int, bool]]:
    return [(said.load, said.draining) for said in ground.heard(peer) if isinstance(said, Heartbeat)]


def announce(ground: Ground, ended: list[Ended]) -> str:
    room = new_room_base(SERVER)
    ground.endpoint.announce(room, 4, 1, "float32", ended.append)
    return room


def test_by_default_the_load_is_the_number_of_open_rooms() -> None:
    ground, ended = Ground(), list[Ended]()
    ground.register("rank", server=SERVER)
    ground.endpoint._on_tick()
    for _ in range(3):
        announce(ground, ended)
    ground.runtime.now += 1.0
    ground.endpoint._on_tick()
    assert heartbeats(ground, "rank") == [(0, False), (3, False)]


def test_heartbeats_say_what_the_server_says_and_go_to_every_peer_at_once_when_told() -> None:
    ground = Ground()
    ground.register("a")
    ground.register("b", mooncake_session_id="10.0.0.2:1", incarnation="other")
    ground.endpoint.server_status = lambda: ServerStatus(7, True)
    for _ in range(2):
        ground.endpoint.send_heartbeats()
    assert heartbeats(ground, "a") == heartbeats(ground, "b") == [(7, True)] * 2


def test_all_rooms_fail_with_the_reason_and_the_status_given() -> None:
    ground, ended = Ground(), list[Ended]()
    ground.register("rank", server=SERVER)
    rooms = {announce(ground, ended) for _ in range(3)}
    ground.endpoint.fail_all("the encoder has drained", 503)
    failures = [said for said in ground.heard("rank") if isinstance(said, Failed)]
    assert {said.room for said in failures} == {one.room for one in ended} == rooms
    assert {(said.reason, said.code) for said in failures} == {("the encoder has drained", 503)}
    assert not ground.endpoint.core.rooms
    ground.endpoint.fail_all("again", 503)
    assert len(ended) == 3
