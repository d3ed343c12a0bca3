"""Owns the look-up of an encoder's control sockets, over a route on the encoder's HTTP port.

Language servers know that port already, so they need no other address.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated

import msgspec

from sglang_mm_conn.control.authentication import DeploymentKey
from sglang_mm_conn.control.http_exchange import (
    NONCE,
    READ_SECONDS,
    SIGNATURE,
    EncoderAbsent,
    check_reach,
    check_signature,
    exchange,
    host_of,
    normalized,
    signed_ask,
)
from sglang_mm_conn.core.errors import ProtocolError
from sglang_mm_conn.core.messages import PROTOCOL_VERSION

__all__ = [
    "NONCE", "ROUTE", "SIGNATURE", "BootstrapInfo", "EncoderAbsent", "Worker", "answer_request", "control_address",
    "look_up", "probe",
]  # fmt: skip

ROUTE = "/conn_multimodal"
_ASK, _ANSWER = "bootstrap ask", "bootstrap answer"


class Worker(msgspec.Struct, frozen=True):
    """One encoder process: its incarnation and control port."""

    incarnation: str
    control_port: Annotated[int, msgspec.Meta(ge=1, le=65535)]


class BootstrapInfo(msgspec.Struct, frozen=True):
    """The answer of the route.

    Attributes:
        version: of the control messages.
        workers: the encoder's processes that hold embeddings.
        draining: whether the encoder refuses new work.
        prefix_cache: whether it keeps embeddings for later requests (--enable-prefix-mm-cache).
    """

    version: int
    workers: list[Worker]
    draining: bool = False
    prefix_cache: bool = False


# Made at import. Hazard: msgspec analyses a struct at its first use, and if two threads do that at the same time, the
# process crashes (seen: SIGSEGV of a language server that started with two encoders).
_INFO = msgspec.json.Decoder(BootstrapInfo)


def answer_request(info: BootstrapInfo, key: DeploymentKey | None, headers: Mapping[str, str]) -> tuple[bytes, str]:
    """The encoder's side: the body of the answer, and the value of its header SIGNATURE. Raises NotAuthentic."""
    body = msgspec.json.encode(info)
    if key is None:
        return body, ""
    nonce = headers.get(NONCE, "")
    key.verify(headers.get(SIGNATURE, ""), _ASK, nonce.encode("utf-8", "replace"))
    return body, key.sign(_ANSWER, nonce.encode("utf-8", "replace"), body)


async def probe(
    encoder_url: str,
    key: DeploymentKey | None = None,
    *,
    insecure: bool = False,
    read_seconds: float = READ_SECONDS,
) -> BootstrapInfo:
    """Look an encoder up on an event loop. ``read_seconds``: the longest wait for each piece of the answer.

    Raises EncoderAbsent. Raises ProtocolError if the answer is no bootstrap answer of this version. Raises NotAuthentic
    if either side lacks the key, or if no key is set and the encoder is not on loopback (``insecure`` allows that).
    """
    check_reach(encoder_url, key, insecure=insecure)
    url = normalized(encoder_url) + ROUTE
    headers, nonce = signed_ask(key, _ASK)
    answer = await exchange(url, headers, read_seconds=read_seconds)
    if answer.status != 200:
        raise ProtocolError(
            f"{url} answered HTTP {answer.status}: is the encoder started with "
            "--disaggregation-transfer-backend conn_multimodal?"
        )
    check_signature(url, answer, key, _ANSWER, nonce)
    try:
        info = _INFO.decode(answer.body)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"{url} sent a malformed bootstrap answer: {error}") from None
    if info.version != PROTOCOL_VERSION:
        raise ProtocolError(f"{url} uses protocol version {info.version}, this side {PROTOCOL_VERSION}")
    return info


def look_up(
    encoder_url: str,
    key: DeploymentKey | None = None,
    *,
    insecure: bool = False,
    read_seconds: float = READ_SECONDS,
) -> BootstrapInfo:
    """Ask an encoder for its control sockets. Any thread without an event loop may call this; see ``probe``."""
    return asyncio.run(probe(encoder_url, key, insecure=insecure, read_seconds=read_seconds))


def control_address(encoder_url: str, worker: Worker) -> str:
    """The ZMQ address of ``worker``: the host of the encoder's URL with the worker's port. Raises ProtocolError."""
    host = host_of(encoder_url)
    return f"tcp://[{host}]:{worker.control_port}" if ":" in host else f"tcp://{host}:{worker.control_port}"
