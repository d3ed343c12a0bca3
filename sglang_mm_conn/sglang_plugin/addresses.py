"""The addresses of a server: where it listens, and where other hosts reach it."""

from __future__ import annotations

import ipaddress
import socket

from sglang.srt.utils.network import get_local_ip_auto


def bind_address(host: str | None) -> str:
    """What ``--host`` stands for: ZeroMQ binds no names."""
    if not host:
        return "0.0.0.0" if host == "" else "127.0.0.1"
    return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])


def reached_at(host: str | None) -> str:
    """Where the Mooncake peers of a server with this ``--host`` find it: there, if that is an address for others.

    sglang's own answer (SGLANG_HOST_IP, then the address of the default route) would send an encoder to another network
    of a host that has several, or to itself where the variable names loopback.
    """
    address = bind_address(host)
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if parsed.is_loopback or parsed.is_unspecified:
        return str(get_local_ip_auto(host))
    return address
