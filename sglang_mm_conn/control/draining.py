"""Owns the order to drain, over a route on the encoder's HTTP port: its two exchanges, and the client's side.

GET answers with the encoder's status and a challenge. POST brings the order together with that challenge, which the
encoder takes once: so an order that was overheard cannot be sent again. With a key both sides sign what they send, as
on the bootstrap route; the signature of an order covers the challenge.
"""

from __future__ import annotations

import asyncio

import msgspec

from sglang_mm_conn.control.authentication import DeploymentKey, NotAuthentic
from sglang_mm_conn.control.bootstrap import ROUTE
from sglang_mm_conn.control.http_exchange import (
    NONCE,
    SIGNATURE,
    Answer,
    check_reach,
    check_signature,
    exchange,
    normalized,
    signed_ask,
)
from sglang_mm_conn.core.errors import ConnError, ProtocolError

DRAIN_ROUTE = ROUTE + "/drain"
ASK, ANSWER, ORDER, DONE = "drain ask", "drain answer", "drain order", "drain done"  # what a signature is for
_TEXT = 300
_ATTEMPTS = 3


class DrainStatus(msgspec.Struct, frozen=True):
    """The status of an encoder.

    Attributes:
        draining: whether it refuses new work.
        ending: whether it ends when it holds nothing any more (it got SIGTERM).
        held: requests to /encode that it holds.
        challenge: what the next order must bring; only in the answer to GET.
    """

    draining: bool
    ending: bool
    held: int
    challenge: str = ""


class DrainOrder(msgspec.Struct, frozen=True):
    """The body of POST: drain, or take new work again."""

    drain: bool


# Made at import, see bootstrap.py.
_STATUS = msgspec.json.Decoder(DrainStatus)


def ask_status(encoder_url: str, key: DeploymentKey | None, *, insecure: bool = False) -> DrainStatus:
    """The status of an encoder. Raises EncoderAbsent, ProtocolError, NotAuthentic, each with the URL and the cause."""
    check_reach(encoder_url, key, insecure=insecure)
    url = normalized(encoder_url) + DRAIN_ROUTE
    headers, nonce = signed_ask(key, ASK)
    answer = asyncio.run(exchange(url, headers))
    return _status(url, answer, key, ANSWER, nonce)


def order(encoder_url: str, key: DeploymentKey | None, *, drain: bool, insecure: bool = False) -> DrainStatus:
    """Tell an encoder to drain, or to take new work again. Returns its status then.

    Raises what ``ask_status`` raises, and ConnError if the encoder cannot take new work again.
    """
    body = msgspec.json.encode(DrainOrder(drain))
    url = normalized(encoder_url) + DRAIN_ROUTE
    for attempt in range(_ATTEMPTS):
        challenge = ask_status(encoder_url, key, insecure=insecure).challenge
        signature = "" if key is None else key.sign(ORDER, challenge.encode(), body)
        headers = {NONCE: challenge, SIGNATURE: signature, "Content-Type": "application/json"}
        answer = asyncio.run(exchange(url, headers, body))
        if answer.status != 412 or attempt == _ATTEMPTS - 1:  # 412: somebody else's order came between
            break
    return _status(url, answer, key, DONE, challenge)


def _status(url: str, answer: Answer, key: DeploymentKey | None, purpose: str, nonce: str) -> DrainStatus:
    said = answer.body[:_TEXT].decode("utf-8", "replace")
    if answer.status == 403:
        raise NotAuthentic(f"{url}: {said}")
    if answer.status == 404:
        raise ProtocolError(
            f"{url} answered HTTP 404: is this an encoder (--encoder-only) started with "
            "--disaggregation-transfer-backend conn_multimodal?"
        )
    if answer.status != 200:
        raise ConnError(f"{url} answered HTTP {answer.status}: {said}")
    check_signature(url, answer, key, purpose, nonce)
    try:
        return _STATUS.decode(answer.body)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"{url} sent a malformed answer: {error}") from None
