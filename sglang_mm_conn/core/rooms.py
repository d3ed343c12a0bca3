"""Room names: one embedding part on its way to one language server, never to be confused with another.

A room base is ``<server>-<nonce>``: the language server's incarnation (random, one process life) and a nonce drawn at
every dispatch. A room is the base with sglang's own part suffix. So two servers, a client-chosen request id used
twice, a retry while the old encode still runs, and a restart never share a room.
"""

from __future__ import annotations

import re
import secrets

from sglang_mm_conn.core.errors import ProtocolError

_ID = re.compile(r"[0-9a-f]{16}")
_ROOM = re.compile(r"([0-9a-f]{16})-[0-9a-f]{16}(_local_part_[0-9]{1,6})?")


def new_id() -> str:
    """A random id of 64 bits as 16 hex digits; serves as incarnation and as nonce."""
    return secrets.token_hex(8)


def new_room_base(server: str) -> str:
    """The base of the rooms of one dispatch of language server ``server`` (an id from ``new_id``)."""
    if not _ID.fullmatch(server):
        raise ProtocolError(f"server id {server!r} is not 16 hex digits")
    return f"{server}-{new_id()}"


def server_of(room: str) -> str:
    """The language server's incarnation in a room name. Raises ProtocolError where ``room`` is none of ours."""
    match = _ROOM.fullmatch(room)
    if match is None:
        raise ProtocolError(f"{room!r} is not a room name")
    return match[1]
