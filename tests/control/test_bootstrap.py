"""Where an encoder's control sockets are: asked too early, asked by IPv6, answered by something else."""

from __future__ import annotations

import contextlib
import errno
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp
import msgspec
import pytest
import requests
from aiohttp.client_reqrep import ConnectionKey

from sglang_mm_conn.control import bootstrap
from sglang_mm_conn.control.authentication import DeploymentKey
from sglang_mm_conn.control.bootstrap import (
    ROUTE,
    BootstrapInfo,
    EncoderAbsent,
    Worker,
    control_address,
    look_up,
    normalized,
)
from sglang_mm_conn.control.bootstrap_server import StandaloneBootstrap
from sglang_mm_conn.control.http_exchange import is_refused
from sglang_mm_conn.core.errors import ProtocolError
from sglang_mm_conn.core.messages import PROTOCOL_VERSION

# Eight threads look an encoder up at once, each in the middle of another's first decoding of an answer; a fresh copy
# of the module has decoded none.
MANY_AT_ONCE = """
import importlib, sys, threading

from sglang_mm_conn.control import bootstrap, http_exchange
from sglang_mm_conn.core.messages import PROTOCOL_VERSION

BODY = b'{"version":%d,"workers":[{"incarnation":"1","control_port":2}]}' % PROTOCOL_VERSION


async def exchange(*_, **__):
    return http_exchange.Answer(200, BODY, "")


http_exchange.exchange = exchange
sys.setswitchinterval(1e-6)
for _ in range(300):
    importlib.reload(bootstrap)
    start = threading.Barrier(8)

    def look_up():
        start.wait()
        assert bootstrap.look_up("http://127.0.0.1:1").workers[0].control_port == 2

    threads = [threading.Thread(target=look_up) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""

INFO = BootstrapInfo(PROTOCOL_VERSION, [Worker("0123456789abcdef", 4711)])


def has_ipv6_loopback() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_look_up_before_the_encoder_is_ready_is_told_to_come_again_not_of_an_error() -> None:
    ready: list[tuple[BootstrapInfo, DeploymentKey | None]] = []
    server = StandaloneBootstrap("127.0.0.1", 0, lambda: ready[0] if ready else None)
    try:
        assert requests.get(server.url + ROUTE, timeout=5).status_code == 503
        with pytest.raises(EncoderAbsent) as absent:
            look_up(server.url)
        assert not absent.value.refused  # nobody may take it for an encoder that is gone
        ready.append((INFO, None))
        assert look_up(server.url) == INFO
    finally:
        server.close()


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:30000", "tcp://127.0.0.1:4711"),
        ("http://host.example:30000/", "tcp://host.example:4711"),
        ("http://[::1]:30000", "tcp://[::1]:4711"),
        ("http://[fe80::1:2]:30000", "tcp://[fe80::1:2]:4711"),
    ],
)
def test_the_control_address_has_the_host_of_the_url_also_of_ipv6(url: str, address: str) -> None:
    assert control_address(url, INFO.workers[0]) == address


def test_a_url_without_a_host_is_refused() -> None:
    with pytest.raises(ProtocolError, match="is not of the form"):
        control_address("http:///x", INFO.workers[0])


@pytest.mark.skipif(not has_ipv6_loopback(), reason="this machine has no IPv6 loopback address")
def test_a_look_up_goes_over_ipv6() -> None:
    server = StandaloneBootstrap("::1", 0, lambda: (INFO, None))
    try:
        assert look_up(server.url) == INFO
    finally:
        server.close()


def test_first_look_ups_on_several_threads_at_once_do_not_crash_the_process() -> None:
    run = subprocess.run([sys.executable, "-c", MANY_AT_ONCE], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("url", ["127.0.0.1:30000", "http://:30000", "", "ftp://a:1", "http://[bad", "http://a:99999"])
def test_a_url_that_is_none_of_an_encoder_is_refused_before_a_request(url: str) -> None:
    with pytest.raises(ProtocolError, match="is not of the form http://host:port"):
        look_up(url)


@pytest.mark.parametrize("port", [-5, 0, 65536])
def test_a_control_port_that_cannot_be_one_is_refused(port: int) -> None:
    with pytest.raises(msgspec.ValidationError):
        bootstrap._INFO.decode(msgspec.json.encode(BootstrapInfo(3, [Worker("a", port)])))


@pytest.mark.parametrize("url", ["http://a:1", "http://a:1/", " http://a:1// ", "http://a:1/\n"])
def test_an_encoder_has_one_name_however_its_url_is_written(url: str) -> None:
    assert normalized(url) == "http://a:1"


@contextmanager
def served(answer: bytes | None) -> Iterator[str]:
    """The URL of a server that accepts and sends ``answer``; None: it sends nothing, and keeps the connection."""
    done = threading.Event()

    def serve() -> None:
        with listener.accept()[0] as connection:
            connection.recv(4096)
            if answer is None:
                done.wait(10)
            else:
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        done.set()
        thread.join()


@pytest.mark.parametrize(
    ("answer", "refused", "silent"),
    [
        (None, False, True),
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n", False, False),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", False, False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", False, True),
    ],
)
def test_silence_is_told_from_an_answer_that_says_no(answer: bytes | None, refused: bool, silent: bool) -> None:
    with served(answer) as url, pytest.raises(EncoderAbsent) as absent:
        look_up(url, read_seconds=0.2)
    assert (absent.value.refused, absent.value.silent) == (refused, silent)


@pytest.mark.parametrize(
    "begin",
    [
        b"HTTP/1.1 200 OK\r\nX-Long: ",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n{",
    ],
)
def test_a_server_that_sends_a_byte_now_and_then_is_left_in_the_end(begin: bytes) -> None:
    """Each byte comes before a read would time out."""

    def serve() -> None:
        with listener.accept()[0] as connection, contextlib.suppress(OSError):
            connection.recv(4096)
            connection.sendall(begin)
            for _ in range(200):
                time.sleep(0.05)
                connection.sendall(b" ")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        before = time.monotonic()
        with pytest.raises(EncoderAbsent) as absent:
            look_up(f"http://127.0.0.1:{listener.getsockname()[1]}", read_seconds=0.3)
        took = time.monotonic() - before
        thread.join()
    assert 0.5 < took < 5.0 and absent.value.silent and not absent.value.refused


def test_a_port_where_nothing_listens_is_refused_and_not_silent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(EncoderAbsent) as absent:
        look_up(f"http://127.0.0.1:{port}")
    assert absent.value.refused and not absent.value.silent


@pytest.mark.parametrize(
    ("cause", "refused"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 1)"), True),
        # What aiohttp makes of a host with two addresses: no route to one, nothing listens at the other.
        (OSError("Multiple exceptions: [Errno 101] Connect call failed, [Errno 111] Connect call failed"), True),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), False),
        (OSError("Multiple exceptions: [Errno 101] Connect call failed, [Errno 113] Connect call failed"), False),
    ],
)
def test_a_connection_that_one_address_of_the_host_refuses_is_refused(cause: OSError, refused: bool) -> None:
    key = ConnectionKey("encoder", 1, False, True, None, None, None)
    assert is_refused(aiohttp.ClientConnectorError(key, cause)) == refused


def test_what_an_encoder_says_of_itself_arrives_and_an_older_one_says_less() -> None:
    info = BootstrapInfo(PROTOCOL_VERSION, INFO.workers, draining=True, prefix_cache=True)
    server = StandaloneBootstrap("127.0.0.1", 0, lambda: (info, None))
    try:
        assert look_up(server.url) == info
    finally:
        server.close()
    assert bootstrap._INFO.decode(b'{"version":3,"workers":[]}') == BootstrapInfo(3, [])
