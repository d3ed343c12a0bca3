"""The shard rule: which transfer queue serves a room."""

from __future__ import annotations

from collections.abc import Iterable

from sglang_mm_conn.core.errors import ProtocolError


def session_at(host: str, port: int) -> str:
    """The session id ``host:port``; an IPv6 address is bracketed."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def session_port(mooncake_session_id: str) -> int:
    """The port of a session id ``host:port`` (the host may be an IPv6 address, bracketed or not).

    Raises ProtocolError where there is no port from 1 to 65535 after the last colon.
    """
    host, colon, text = mooncake_session_id.rpartition(":")
    if not colon or not host or not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= 65535:
        raise ProtocolError(f"session id {mooncake_session_id!r} is not host:port")
    return int(text)


def port_sum_queue_index(mooncake_session_ids: Iterable[str], queues: int) -> int:
    """Port-sum queue index (seed): the sum of the ports of the room's sessions, modulo the number of queues.

    Computed once, when a room is complete, and stored with it: the sum changes when a session joins, so computing it
    again for a resume could put one room on two queues at once.
    """
    return sum(session_port(session) for session in mooncake_session_ids) % queues
