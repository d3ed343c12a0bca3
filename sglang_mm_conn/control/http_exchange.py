"""Owns one HTTP exchange with an encoder: without proxies and redirects, bounded in time and size."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp

from sglang_mm_conn.control.authentication import DeploymentKey, NotAuthentic, is_loopback, new_nonce
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


def normalized(encoder_url: str) -> str:
    """``encoder_url`` as the one name of this encoder: without a trailing slash."""
    return encoder_url.strip().rstrip("/")


async def exchange(
    url: str, headers: Mapping[str, str], body: bytes | None = None, *, read_seconds: float = READ_SECONDS
) -> Answer:
    """GET ``url``, or POST ``body`` to it, over a connection of its own.

    ``read_seconds``: the longest wait for each piece of the answer. The whole exchange may take twice as long.

    Raises EncoderAbsent, also if the answer is 502, 503 or 504. Raises NotAuthentic if it is 401.
    """
    limit = aiohttp.ClientTimeout(total=2 * read_seconds, sock_connect=_CONNECT_SECONDS, sock_read=read_seconds)
    method = "GET" if body is None else "POST"
    try:
        # Without trust_env no HTTP proxy stands between the servers of one cluster.
        async with (
            aiohttp.ClientSession(timeout=limit) as http,
            http.request(method, url, data=body, headers=headers, allow_redirects=False) as answer,
        ):
            content = await read_at_most(answer.content, _MAX_BYTES)
            found = Answer(answer.status, content, answer.headers.get(SIGNATURE, ""))
    except aiohttp.ClientConnectorError as error:
        refused = is_refused(error)
        cause = "the connection is refused" if refused else str(error.os_error)
        raise EncoderAbsent(f"{url}: {cause}", refused=refused, silent=not refused) from None
    except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
        raise EncoderAbsent(f"{url}: no whole answer in time ({2 * read_seconds:g} s)", silent=True) from None
    except (aiohttp.ClientError, OSError) as error:
        raise EncoderAbsent(f"{url}: {type(error).__name__}: {error}", silent=True) from None
    if found.status in (502, 503, 504):
        raise EncoderAbsent(f"{url} answered HTTP {found.status}")
    if found.status == 401:
        raise NotAuthentic(f"{url} wants this deployment's key: set SGLANG_MM_CONN_KEY_FILE to the encoder's file")
    return found


def is_refused(error: aiohttp.ClientConnectorError) -> bool:
    """Whether the connection was refused, at one of the addresses of the host at least."""
    refused = f"[Errno {errno.ECONNREFUSED}]" in str(error.os_error)  # aiohttp joins the texts of several errors
    return refused or isinstance(error.os_error, ConnectionRefusedError)


async def read_at_most(content: aiohttp.StreamReader, limit: int) -> bytes:
    """The first ``limit`` bytes of ``content``."""
    found = await content.read(limit)
    while not content.at_eof() and len(found) < limit:
        found += await content.read(limit - len(found))
    return found


def signed_ask(key: DeploymentKey | None, purpose: str) -> tuple[dict[str, str], str]:
    """The headers of a GET for ``purpose``, signed with ``key`` if there is one, and the nonce of its answer."""
    nonce = new_nonce()
    return {} if key is None else {NONCE: nonce, SIGNATURE: key.sign(purpose, nonce.encode())}, nonce


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
