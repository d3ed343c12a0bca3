"""Room names are never shared, and contain their language server."""

from __future__ import annotations

import pytest

from sglang_mm_conn.core.errors import ProtocolError
from sglang_mm_conn.core.rooms import new_id, new_room_base, part_room, server_of

SERVER = "0123456789abcdef"


def test_a_part_has_a_room_of_its_own_under_the_base_and_names_the_server() -> None:
    base = new_room_base(SERVER)
    assert part_room(base, 7) == f"{base}_local_part_7" != part_room(base, 8)
    assert server_of(part_room(base, 7)) == SERVER


def test_every_dispatch_has_a_room_of_its_own() -> None:
    assert len({new_room_base(SERVER) for _ in range(1000)}) == 1000


def test_ids_of_two_process_lives_differ_and_fit_a_room_name() -> None:
    one, two = new_id(), new_id()
    assert one != two
    assert server_of(new_room_base(one)) == one != server_of(new_room_base(two))


@pytest.mark.parametrize("suffix", ["", "_local_part_0", "_local_part_31"])
def test_a_room_names_its_server_with_or_without_a_part(suffix: str) -> None:
    assert server_of(new_room_base(SERVER) + suffix) == SERVER


@pytest.mark.parametrize(
    "room",
    ["", SERVER, f"{SERVER}-", f"{SERVER}-{SERVER}x", f"{SERVER}-{SERVER}\n", f"{SERVER.upper()}-{SERVER}",
     f"x{SERVER}-{SERVER}", f"{SERVER}-{SERVER}_local_part_", f"{SERVER}-{SERVER}_local_part_1234567", "cmpl-1234",
     f"{SERVER}-{SERVER}_local_part_\u0661", f"../{SERVER}-{SERVER}"],
)  # fmt: skip
def test_a_name_that_is_none_of_ours_is_refused(room: str) -> None:
    with pytest.raises(ProtocolError, match="room name"):
        server_of(room)


@pytest.mark.parametrize("server", ["", "x", SERVER + "0", SERVER.upper(), SERVER[:-1] + "g"])
def test_a_server_that_is_no_id_is_refused(server: str) -> None:
    with pytest.raises(ProtocolError, match="16 hex"):
        new_room_base(server)
