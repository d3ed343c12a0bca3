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
    """Where the Mooncake peers of a server with this ``--host`` find it: there, if that is an address of this host for
    others. (Every node of a server may be given the first one's.)

    sglang's own answer (SGLANG_HOST_IP, say, or the address of the default route) would send an encoder to another
    network of a host that has several, or to itself where the variable names loopback.
    """
    address = bind_address(host)
    parsed = ipaddress.ip_address(address)
    if parsed.is_loopback or parsed.is_unspecified or not _is_local_address(address):
        return str(get_local_ip_auto(host))
    return address


def _is_local_address(address: str) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
