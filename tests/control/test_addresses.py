"""Addresses for logs are had from descriptors that another library owns, and may have closed."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from sglang_mm_conn.control.addresses import UNKNOWN_ADDRESS, peer_address
from tests.control.test_bootstrap import has_ipv6_loopback


@pytest.fixture
def scope() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("family", "host"),
    [
        (socket.AF_INET, "127.0.0.1"),
        pytest.param(
            socket.AF_INET6, "::1",
            marks=pytest.mark.skipif(not has_ipv6_loopback(), reason="this machine has no IPv6 loopback address"),
        ),
    ],
)  # fmt: skip
def test_a_connection_tells_its_remote_host_and_stays_open(scope: ExitStack, family: int, host: str) -> None:
    listener = scope.enter_context(socket.create_server((host, 0), family=family))
    there = scope.enter_context(socket.create_connection(listener.getsockname()[:2]))
    here = scope.enter_context(listener.accept()[0])
    assert peer_address(here.fileno()) == host
    here.sendall(b"still open")
    assert there.recv(10) == b"still open"


def file(scope: ExitStack) -> int:
    return scope.enter_context(tempfile.TemporaryFile()).fileno()


def event(scope: ExitStack) -> int:
    fd = os.eventfd(0)
    scope.callback(os.close, fd)
    return fd


def local_socket(scope: ExitStack) -> int:
    ours, theirs = socket.socketpair()
    scope.enter_context(theirs)
    return scope.enter_context(ours).fileno()


def listener(scope: ExitStack) -> int:
    return scope.enter_context(socket.create_server(("127.0.0.1", 0))).fileno()


def closed(scope: ExitStack) -> int:
    fd = os.eventfd(0)
    os.close(fd)
    return fd


@pytest.mark.parametrize("whose", [file, event, local_socket, listener, closed])
def test_a_number_that_is_something_elses_by_now_is_neither_kept_nor_closed(
    scope: ExitStack, whose: Callable[[ExitStack], int]
) -> None:
    fd = whose(scope)
    before = descriptors()
    assert peer_address(fd) == UNKNOWN_ADDRESS
    assert descriptors() == before
