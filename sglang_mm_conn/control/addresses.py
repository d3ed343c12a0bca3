"""Who is at the other end of a connection that another library owns."""

from __future__ import annotations

import socket

UNKNOWN_ADDRESS = "an address that was gone too soon"
_INTERNET = (socket.AF_INET, socket.AF_INET6)


def peer_address(fd: int) -> str:
    """The remote host of the connection ``fd``, for logs; UNKNOWN_ADDRESS where that is none (any more).

    Its owner may have closed it, and the number be anything else's by now, a segment's too: it is looked at, but never
    duplicated, and never closed. (With ``socket.setdefaulttimeout``, which no server here uses, looking would make it
    non-blocking.)
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
