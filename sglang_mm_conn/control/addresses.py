"""Owns the look-up of a peer's address on a connection that another library owns."""

from __future__ import annotations

import socket

UNKNOWN_ADDRESS = "an address that was gone too soon"
_INTERNET = (socket.AF_INET, socket.AF_INET6)


def peer_address(fd: int) -> str:
    """The remote host of the connection ``fd``, for logs; UNKNOWN_ADDRESS if ``fd`` is no connection (any more).

    The library may have closed ``fd``, and the kernel may have reused the number for any other file, even a segment. So
    this only inspects the descriptor, and never duplicates or closes it. (With ``socket.setdefaulttimeout``, which no
    server here uses, inspecting it would make it non-blocking.)
    """
    try:
        borrowed = socket.socket(fileno=fd)
    except OSError:
        return UNKNOWN_ADDRESS
    try:
        return str(borrowed.getpeername()[0]) if borrowed.family in _INTERNET else UNKNOWN_ADDRESS
    except OSError:
        return UNKNOWN_ADDRESS
    finally:
        borrowed.detach()
