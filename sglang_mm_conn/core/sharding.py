"""Owns the shard rule, which picks the transfer queue of a room, and the form of session ids."""

from __future__ import annotations

from collections.abc import Iterable

from sglang_mm_conn.core.errors import ProtocolError


def session_at(host: str, port: int) -> str:
    """The session id ``host:port``; an IPv6 address is bracketed."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def session_port(mooncake_session_id: str) -> int:
    """The port of a session id ``host:port`` (the host may be an IPv6 address, bracketed or not).

    Raises ProtocolError unless a port from 1 to 65535 follows the last colon.
    """
    host, colon, text = mooncake_session_id.rpartition(":")
    if not colon or not host or not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= 65535:
        raise ProtocolError(f"session id {mooncake_session_id!r} is not host:port")
    return int(text)


def port_sum_queue_index(mooncake_session_ids: Iterable[str], queues: int) -> int:
    """Port-sum queue index (P6): the sum of the ports of the room's sessions, modulo the number of queues.

    The sender core computes it once, when the room is complete, and stores it with the room. The sum changes when a
    session joins, so a resume that computed it again could put one room on two queues concurrently.
    """
    return sum(session_port(session) for session in mooncake_session_ids) % queues
