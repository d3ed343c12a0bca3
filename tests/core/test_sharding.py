"""The port-sum queue index (P6)."""

from __future__ import annotations

import pytest

from sglang_mm_conn.core.errors import ProtocolError
from sglang_mm_conn.core.sharding import port_sum_queue_index, session_port


@pytest.mark.parametrize(
    ("sessions", "queues", "index"),
    [
        (["10.0.0.1:17000"], 4, 0),
        (["10.0.0.1:17001"], 4, 1),
        (["10.0.0.1:17001", "10.0.0.2:17002"], 4, 3),
        (["10.0.0.2:17002", "10.0.0.1:17001"], 4, 3),
        (["10.0.0.1:17001", "10.0.0.2:17002", "host:5"], 7, 34008 % 7),
        (["10.0.0.1:65535"], 1, 0),
    ],
)
def test_the_index_is_the_port_sum_modulo_the_queues(sessions: list[str], queues: int, index: int) -> None:
    assert port_sum_queue_index(sessions, queues) == index


@pytest.mark.parametrize(
    ("session", "port"),
    [
        ("10.0.0.1:1", 1),
        ("host.example:65535", 65535),
        ("[fe80::1%eth0]:17001", 17001),
        ("[::1]:80", 80),
        ("fe80::1:17001", 17001),
    ],
)
def test_the_port_is_behind_the_last_colon_also_of_ipv6(session: str, port: int) -> None:
    assert session_port(session) == port


@pytest.mark.parametrize(
    "session",
    ["", "host", "host:", ":80", "host:0", "host:65536", "host:-1", "host:+1", "host: 80", "host:8_0", "host:\u0663",
     "host:80\n", "[::1]", "host:1e3", "host:" + "9" * 200],
)  # fmt: skip
def test_a_session_id_without_a_port_is_refused(session: str) -> None:
    with pytest.raises(ProtocolError, match="host:port"):
        session_port(session)
