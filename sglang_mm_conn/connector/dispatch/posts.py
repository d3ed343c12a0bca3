"""Owns the HTTP requests of a dispatcher to encoders: posts of parts over kept connections, and probes."""

from __future__ import annotations

import io
import json
from functools import partial
from http import HTTPStatus
from typing import Any

import aiohttp
import msgspec

from sglang_mm_conn.control.authentication import DeploymentKey
from sglang_mm_conn.control.bootstrap import BootstrapInfo, probe
from sglang_mm_conn.control.http_exchange import is_refused, read_at_most
from sglang_mm_conn.core.dispatch.verdicts import STATE_HEADER, TryEnd, Verdict, of_answer

_CONNECT_SECONDS = 2.0
_PROBE_SECONDS = 2.0
# Shorter than the 5 s after which uvicorn closes an idle connection: one that it is just closing would break a post.
_KEEP_SECONDS = 3.0
_MOST_ANSWER_BYTES = 1 << 16


class Posts:
    """One HTTP session for all encoders. Used on one event loop."""

    def __init__(self, key: DeploymentKey | None, *, insecure: bool) -> None:
        connections = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_SECONDS)
        # No limit for the answer: it comes when the embedding is delivered. The request has a deadline.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)
        self._session = aiohttp.ClientSession(connector=connections, timeout=timeout)
        self._probe = partial(probe, key=key, insecure=insecure, read_seconds=_PROBE_SECONDS)

    async def post(self, url: str, room: str, body: bytes) -> TryEnd:
        """Post ``body`` to the encoder at ``url``, and say how that ended."""
        try:
            async with self._session.post(
                f"{url}/encode",
                data=io.BytesIO(body),
                headers={"Content-Type": "application/json"},
                allow_redirects=False,
            ) as answer:
                # sglang's answer to bad media repeats them.
                content = await read_at_most(answer.content, _MOST_ANSWER_BYTES + 2 * len(body))
                return of_answer(room, answer.status, content, answer.headers.get(STATE_HEADER, ""))
        except (aiohttp.ClientResponseError, aiohttp.InvalidURL) as error:
            return _bad_gateway(Verdict.STRANGER, f"no encoder answers there ({type(error).__name__}: {error})")
        except aiohttp.ClientConnectorError as error:
            verdict = Verdict.REFUSED if is_refused(error) else Verdict.CUT_OFF  # a network may recover
            return _bad_gateway(verdict, f"it cannot be reached ({error})")
        except (aiohttp.ClientError, OSError) as error:
            return _bad_gateway(Verdict.CUT_OFF, f"the connection broke ({type(error).__name__}: {error})")

    async def probe(self, url: str) -> BootstrapInfo:
        """The encoder's answer to a look-up, over a new connection: only that proves that it takes some.

        Raises what ``control.bootstrap.probe`` raises.
        """
        return await self._probe(url)

    async def close(self) -> None:
        await self._session.close()


def _bad_gateway(verdict: Verdict, reason: str) -> TryEnd:
    return TryEnd(verdict, int(HTTPStatus.BAD_GATEWAY), reason)


def json_body(content: Any) -> bytes:
    """``content`` as JSON. msgspec is several times as fast as the standard library, which takes more strings."""
    try:
        return msgspec.json.encode(content)
    except (TypeError, ValueError, OverflowError, UnicodeEncodeError):  # for example a lone surrogate
        return json.dumps(content).encode()
