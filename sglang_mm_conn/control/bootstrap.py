"""Owns the look-up of an encoder's control sockets, over a route on the encoder's HTTP port.

Language servers know that port already, so they need no other address.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
import requests
import urllib3

from sglang_mm_conn.control.authentication import DeploymentKey, NotAuthentic, is_loopback, new_nonce
from sglang_mm_conn.core.errors import ConnError, ProtocolError
from sglang_mm_conn.core.messages import PROTOCOL_VERSION

ROUTE = "/conn_multimodal"
NONCE, SIGNATURE = "X-Mm-Conn-Nonce", "X-Mm-Conn-Signature"
_ASK, _ANSWER = "bootstrap ask", "bootstrap answer"
_CONNECT_SECONDS = 2.0
_READ_SECONDS = 5.0
_MAX_BYTES = 1 << 20


class Worker(msgspec.Struct, frozen=True):
    """One encoder process: its incarnation and control port."""

    incarnation: str
    control_port: Annotated[int, msgspec.Meta(ge=1, le=65535)]


class BootstrapInfo(msgspec.Struct, frozen=True):
    """The answer of the route.

    Attributes:
        version: of the control protocol.
        workers: the processes that hold embeddings.
        draining: whether the encoder takes no new work.
        prefix_cache: whether it keeps the embeddings of earlier items (``--enable-prefix-mm-cache``).
    """

    version: int
    workers: list[Worker]
    draining: bool = False
    prefix_cache: bool = False


# Made at import. Hazard: msgspec analyses a struct at its first use, and if two threads do that at the same time, the
# process crashes (seen: SIGSEGV of a language server that started with two encoders).
_INFO = msgspec.json.Decoder(BootstrapInfo)


class EncoderAbsent(ConnError):
    """The encoder's URL does not answer. ``refused``: the connection was refused, so no process listens there.
    ``silent``: nothing at all answered, which may be the network's fault, or that of a busy encoder."""

    def __init__(self, message: str, *, refused: bool = False, silent: bool = False) -> None:
        super().__init__(message)
        self.refused = refused
        self.silent = silent


def answer_request(info: BootstrapInfo, key: DeploymentKey | None, headers: Mapping[str, str]) -> tuple[bytes, str]:
    """The encoder's side: the body of the answer, and the value of its header SIGNATURE. Raises NotAuthentic."""
    body = msgspec.json.encode(info)
    if key is None:
        return body, ""
    nonce = headers.get(NONCE, "")
    key.verify(headers.get(SIGNATURE, ""), _ASK, nonce.encode("utf-8", "replace"))
    return body, key.sign(_ANSWER, nonce.encode("utf-8", "replace"), body)


def normalized(encoder_url: str) -> str:
    """``encoder_url`` as the one name of this encoder: without a trailing slash."""
    return encoder_url.strip().rstrip("/")


def look_up(
    encoder_url: str,
    key: DeploymentKey | None = None,
    *,
    insecure: bool = False,
    read_seconds: float = _READ_SECONDS,
) -> BootstrapInfo:
    """Ask an encoder for its control sockets. ``read_seconds``: the longest wait for each piece of the answer.

    Raises EncoderAbsent. Raises ProtocolError if the answer is no bootstrap answer of this version. Raises NotAuthentic
    if either side lacks the key, or if no key is set and the encoder is not on loopback (``insecure`` allows that).
    """
    host = _host_of(encoder_url)
    if key is None and not insecure and not is_loopback(host):
        raise NotAuthentic(
            f"encoder {encoder_url} is not on a loopback address and SGLANG_MM_CONN_KEY_FILE is not set "
            "(or SGLANG_MM_CONN_INSECURE=1 on a network where every host is trusted)"
        )
    url = normalized(encoder_url) + ROUTE
    nonce = new_nonce()
    headers = {} if key is None else {NONCE: nonce, SIGNATURE: key.sign(_ASK, nonce.encode())}
    try:
        with requests.Session() as http:
            http.trust_env = False  # no HTTP proxy between the servers of one cluster
            answer = http.get(
                url, headers=headers, timeout=(_CONNECT_SECONDS, read_seconds), stream=True, allow_redirects=False
            )  # fmt: skip
            body = answer.raw.read(_MAX_BYTES, decode_content=True)
            status = answer.status_code
            signature = answer.headers.get(SIGNATURE, "")
    except requests.ConnectionError as error:
        refused = f"[Errno {errno.ECONNREFUSED}]" in str(error)
        cause = "the connection is refused" if refused else str(error)
        raise EncoderAbsent(f"{url}: {cause}", refused=refused, silent=not refused) from None
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise EncoderAbsent(f"{url}: {error}", silent=True) from None
    if status in (502, 503, 504):
        raise EncoderAbsent(f"{url} answered HTTP {status}")
    if status == 401:
        raise NotAuthentic(f"{url} wants this deployment's key: set SGLANG_MM_CONN_KEY_FILE to the encoder's file")
    if status != 200:
        raise ProtocolError(
            f"{url} answered HTTP {status}: is the encoder started with "
            "--disaggregation-transfer-backend conn_multimodal?"
        )
    if key is not None:
        try:
            key.verify(signature, _ANSWER, nonce.encode(), body)
        except NotAuthentic as error:
            raise NotAuthentic(f"{url}: {error}") from None
    try:
        info = _INFO.decode(body)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"{url} sent a malformed bootstrap answer: {error}") from None
    if info.version != PROTOCOL_VERSION:
        raise ProtocolError(f"{url} uses protocol version {info.version}, this side {PROTOCOL_VERSION}")
    return info


def _host_of(encoder_url: str) -> str:
    """Raises ProtocolError if ``encoder_url`` is not an HTTP URL with a host and, if any, a valid port."""
    try:
        parts = urlsplit(encoder_url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # urlsplit or the port
        valid = False
    if not valid:
        raise ProtocolError(f"encoder URL {encoder_url!r} is not of the form http://host:port")
    return str(parts.hostname)


def control_address(encoder_url: str, worker: Worker) -> str:
    """The ZMQ address of ``worker``: the host of the encoder's URL with the worker's port. Raises ProtocolError."""
    host = _host_of(encoder_url)
    return f"tcp://[{host}]:{worker.control_port}" if ":" in host else f"tcp://{host}:{worker.control_port}"
