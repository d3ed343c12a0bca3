"""Owns room names: a room is one embedding part on its way to one language server, and no two share a name.

A room base is ``<server>-<nonce>``: the language server's incarnation (random, one process life) and a nonce drawn for
every dispatch. A room is the base and the part suffix of sglang. So these never share a room: two servers, two requests
with the same client-chosen id, a retry and the old encode that still runs, a server before and after a restart.
"""

from __future__ import annotations

import re
import secrets

from sglang_mm_conn.core.errors import ProtocolError

_ID = re.compile(r"[0-9a-f]{16}")
_ROOM = re.compile(r"([0-9a-f]{16})-[0-9a-f]{16}(_local_part_[0-9]{1,6})?")


def new_id() -> str:
    """A random id of 64 bits as 16 hex digits, used as incarnation and as nonce."""
    return secrets.token_hex(8)


def new_room_base(server: str) -> str:
    """The base of the rooms of one dispatch of language server ``server`` (an id from ``new_id``)."""
    if not _ID.fullmatch(server):
        raise ProtocolError(f"server id {server!r} is not 16 hex digits")
    return f"{server}-{new_id()}"


def server_of(room: str) -> str:
    """The language server's incarnation in a room name. Raises ProtocolError if ``room`` is no room name."""
    match = _ROOM.fullmatch(room)
    if match is None:
        raise ProtocolError(f"{room!r} is not a room name")
    return match[1]


def part_room(room_base: str, part: int) -> str:
    """The room of part ``part`` under ``room_base``."""
    return f"{room_base}_local_part_{part}"
