"""Owns one HTTP exchange with an encoder: without proxies and redirects, bounded in time and size."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3

from sglang_mm_conn.control.authentication import DeploymentKey, NotAuthentic, is_loopback
from sglang_mm_conn.core.errors import ConnError, ProtocolError

NONCE, SIGNATURE = "X-Mm-Conn-Nonce", "X-Mm-Conn-Signature"
_CONNECT_SECONDS = 2.0
READ_SECONDS = 5.0
_MAX_BYTES = 1 << 20


class EncoderAbsent(ConnError):
    """The encoder's URL does not answer. ``refused``: the connection was refused, so no process listens there.
    ``silent``: nothing at all answered, which may be the network's fault, or that of a busy encoder."""

    def __init__(self, message: str, *, refused: bool = False, silent: bool = False) -> None:
        super().__init__(message)
        self.refused = refused
        self.silent = silent


@dataclass(frozen=True)
class Answer:
    """Status and body of an answer, and its header SIGNATURE."""

    status: int
    body: bytes
    signature: str


class _Limit(requests.adapters.HTTPAdapter):
    """Ends an exchange that takes too long, wherever it is: timeouts of reads never end a trickle of bytes.

    Attributes:
        seconds: the longest time from a connection to the end of the answer.
        reached: whether it has passed.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.reached = False
        self._timers: list[threading.Timer] = []

    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> Any:
        pool = super().get_connection_with_tls_context(*args, **options)
        kind = pool.ConnectionCls
        watch = self._watch

        class Watched(kind):  # type: ignore[misc, valid-type]
            def connect(self) -> None:
                super().connect()
                watch(self.sock)

        pool.ConnectionCls = Watched
        return pool

    def _watch(self, connection: socket.socket) -> None:
        timer = threading.Timer(self.seconds, self._cut, (connection,))
        timer.daemon = True
        self._timers.append(timer)
        timer.start()

    def _cut(self, connection: socket.socket) -> None:
        self.reached = True
        with contextlib.suppress(OSError):  # it is closed
            connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> _Limit:
        return self

    def __exit__(self, *_: object) -> None:
        for timer in self._timers:
            timer.cancel()


def normalized(encoder_url: str) -> str:
    """``encoder_url`` as the one name of this encoder: without a trailing slash."""
    return encoder_url.strip().rstrip("/")


def exchange(
    url: str, headers: Mapping[str, str], body: bytes | None = None, *, read_seconds: float = READ_SECONDS
) -> Answer:
    """GET ``url``, or POST ``body`` to it.

    ``read_seconds``: the longest wait for each piece of the answer. The whole answer may take twice as long.

    Raises EncoderAbsent, also if the answer is 502, 503 or 504. Raises NotAuthentic if it is 401.
    """
    limit = _Limit(2 * read_seconds)
    try:
        with requests.Session() as http, limit:
            http.trust_env = False  # no HTTP proxy between the servers of one cluster
            http.mount("http://", limit)
            http.mount("https://", limit)
            timeout = (_CONNECT_SECONDS, read_seconds)
            if body is None:
                answer = http.get(url, headers=headers, timeout=timeout, stream=True, allow_redirects=False)
            else:
                answer = http.post(url, body, headers=headers, timeout=timeout, stream=True, allow_redirects=False)
            found = Answer(
                answer.status_code,
                answer.raw.read(_MAX_BYTES, decode_content=True),
                answer.headers.get(SIGNATURE, ""),
            )
    except requests.ConnectionError as error:
        refused = f"[Errno {errno.ECONNREFUSED}]" in str(error)
        cause = "the connection is refused" if refused else str(error)
        raise EncoderAbsent(f"{url}: {cause}", refused=refused, silent=not refused) from None
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise EncoderAbsent(f"{url}: {error}", silent=True) from None
    if limit.reached:  # the answer may have been cut
        raise EncoderAbsent(f"{url}: no whole answer within {limit.seconds:g} s", silent=True)
    if found.status in (502, 503, 504):
        raise EncoderAbsent(f"{url} answered HTTP {found.status}")
    if found.status == 401:
        raise NotAuthentic(f"{url} wants this deployment's key: set SGLANG_MM_CONN_KEY_FILE to the encoder's file")
    return found


def host_of(encoder_url: str) -> str:
    """Raises ProtocolError if ``encoder_url`` is not an HTTP URL with a host and, if any, a valid port."""
    try:
        parts = urlsplit(encoder_url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # urlsplit or the port
        valid = False
    if not valid:
        raise ProtocolError(f"encoder URL {encoder_url!r} is not of the form http://host:port")
    return str(parts.hostname)


def check_reach(encoder_url: str, key: DeploymentKey | None, *, insecure: bool) -> None:
    """Raise NotAuthentic if no key is set and the encoder is not on loopback, unless ``insecure``. Raises ProtocolError
    as ``host_of`` does."""
    host = host_of(encoder_url)
    if key is None and not insecure and not is_loopback(host):
        raise NotAuthentic(
            f"encoder {encoder_url} is not on a loopback address and SGLANG_MM_CONN_KEY_FILE is not set "
            "(or SGLANG_MM_CONN_INSECURE=1 on a network where every host is trusted)"
        )


def check_signature(url: str, answer: Answer, key: DeploymentKey | None, purpose: str, nonce: str) -> None:
    """Raise NotAuthentic, naming ``url``, unless ``answer`` is signed for ``nonce``. Without a key it need not be."""
    if key is None:
        return
    try:
        key.verify(answer.signature, purpose, nonce.encode(), answer.body)
    except NotAuthentic as error:
        raise NotAuthentic(f"{url}: {error}") from None
