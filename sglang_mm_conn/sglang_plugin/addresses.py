"""The addresses of a server: the one to bind, and the one at which other hosts reach it."""

from __future__ import annotations

import ipaddress
import socket

from sglang.srt.utils.network import get_local_ip_auto


def bind_address(host: str | None) -> str:
    """The IP address of ``--host``, since ZeroMQ binds no host names."""
    if not host:
        return "0.0.0.0" if host == "" else "127.0.0.1"
    return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])


def reached_at(host: str | None) -> str:
    """The address at which Mooncake peers reach a server with this ``--host``.

    That of ``--host``, if it is an address of this machine and neither loopback nor unspecified; else sglang's choice
    (SGLANG_HOST_IP, or the address of the default route). A node may be given the ``--host`` of the first node.

    sglang's choice is not used for all, since on a machine with several networks it may be an address on another one,
    and an encoder would connect to itself if SGLANG_HOST_IP is loopback.
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
