"""The dispatcher's HTTP requests: what each way in which a post or a probe can end means."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import pytest
from aiohttp import web

from sglang_mm_conn.connector.dispatch import posts
from sglang_mm_conn.connector.dispatch.posts import Posts, json_body
from sglang_mm_conn.control.authentication import NotAuthentic
from sglang_mm_conn.control.bootstrap import EncoderAbsent
from sglang_mm_conn.core.dispatch.verdicts import DELIVERED, DRAINING, STATE_HEADER, TryEnd, Verdict
from sglang_mm_conn.core.errors import ProtocolError
from tests.connector.dispatch.encoders import Answer, FakeEncoder, cut, error, free_port, hang, plain, wait_for

MakeEncoder = Callable[..., FakeEncoder]
ROOM = "room"
Result = TypeVar("Result")


def with_posts(use: Callable[[Posts], Awaitable[Result]]) -> Result:
    async def run() -> Result:
        sender = Posts(None, insecure=False)
        try:
            return await use(sender)
        finally:
            await sender.close()

    return asyncio.run(run())


def post(url: str, body: bytes = b'{"req_id":"room"}') -> TryEnd:
    return with_posts(lambda sender: asyncio.wait_for(sender.post(url, ROOM, body), 10))


def test_a_part_is_posted_as_json_and_null_says_that_it_has_arrived(encoder: MakeEncoder) -> None:
    one = encoder()
    content = {"req_id": ROOM, "mm_items": [{"url": "data:," + "x" * 20_000_000}]}
    assert post(one.url, json_body(content)) is DELIVERED
    assert one.bodies == [content]


def test_one_connection_carries_all_posts_that_follow_each_other(encoder: MakeEncoder) -> None:
    one = encoder()

    async def several(sender: Posts) -> None:
        for number in range(20):
            one.encode = error(500) if number % 2 else encoder_default
            await sender.post(one.url, ROOM, b'{"req_id":"room"}')

    encoder_default = one.encode
    with_posts(several)
    assert len(one.connections) == 20 and len(set(one.connections)) == 1


def test_posts_at_once_do_not_wait_for_each_other(encoder: MakeEncoder) -> None:
    one = encoder()
    together = asyncio.Event()

    async def wait(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if len(one.bodies) == 200:
            together.set()
        await together.wait()
        return web.Response(body=b"null")

    one.encode = wait

    async def many(sender: Posts) -> list[TryEnd]:
        return await asyncio.gather(*(sender.post(one.url, ROOM, b'{"req_id":"room"}') for _ in range(200)))

    assert with_posts(many) == [DELIVERED] * 200


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (error(400, "bad image"), Verdict.INPUT),
        (error(500, "out of memory"), Verdict.ERROR),
        (plain(500, "Internal Server Error"), Verdict.ERROR),
        (plain(500, "x" * 300_000), Verdict.ERROR),
        (plain(502, "<html>"), Verdict.ERROR),
        (error(503, "no worker"), Verdict.LOST),
        (error(503, "the encoder is draining", {STATE_HEADER: DRAINING}), Verdict.DRAINS),
        (plain(200, "<html>It works!</html>"), Verdict.STRANGER),
        (plain(200, "x" * 300_000), Verdict.STRANGER),
        (plain(404, "not found"), Verdict.STRANGER),
        (plain(302, "", {"Location": "/elsewhere"}), Verdict.STRANGER),
        (plain(307, "", {"Location": "http://127.0.0.1:1/encode"}), Verdict.STRANGER),
        (cut, Verdict.CUT_OFF),
    ],
)
def test_each_way_in_which_a_post_ends_has_its_verdict(
    answer: Answer, verdict: Verdict, encoder: MakeEncoder
) -> None:  # fmt: skip
    one = encoder(answer)
    assert post(one.url).verdict is verdict and len(one.bodies) == 1


def test_a_port_where_nothing_listens_refuses() -> None:
    end = post(f"http://127.0.0.1:{free_port()}")
    assert (end.verdict, end.code) == (Verdict.REFUSED, 502) and "cannot be reached" in end.reason


def test_an_address_that_does_not_answer_may_be_the_networks_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posts, "_CONNECT_SECONDS", 0.2)
    began = time.monotonic()
    with socket.socket() as full, ExitStack() as waiting:
        full.bind(("127.0.0.1", 0))
        full.listen(0)  # nobody accepts, so only the first connections are made
        for _ in range(3):
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        assert post(f"http://127.0.0.1:{full.getsockname()[1]}").verdict is Verdict.CUT_OFF
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("url", ["http://", "ftp://127.0.0.1:1", "http://127.0.0.1:99999999", "nonsense"])
def test_a_url_that_is_none_is_that_of_a_stranger(url: str) -> None:
    assert post(url).verdict in (Verdict.STRANGER, Verdict.CUT_OFF, Verdict.REFUSED)


async def answered_by(data: bytes) -> tuple[asyncio.Server, str]:
    """A server that answers everything with ``data`` and closes the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        writer.write(data)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("data", "verdict"),
    [
        (b"", Verdict.CUT_OFF),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nnu", Verdict.CUT_OFF),
        (b"HTTP/1.1 200 OK\r\nContent-Le", Verdict.CUT_OFF),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", Verdict.STRANGER),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnull", Verdict.DELIVERED),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnull", Verdict.CUT_OFF),
    ],
)
def test_raw_answers_of_all_kinds_have_a_verdict(data: bytes, verdict: Verdict) -> None:
    async def run(sender: Posts) -> TryEnd:
        server, url = await answered_by(data)
        async with server:
            return await asyncio.wait_for(sender.post(url, ROOM, b'{"req_id":"room"}'), 10)

    assert with_posts(run).verdict is verdict


def test_a_post_that_nobody_waits_for_any_more_leaves_the_encoder(encoder: MakeEncoder) -> None:
    one = encoder(hang)

    async def cancelled(sender: Posts) -> None:
        task = asyncio.ensure_future(sender.post(one.url, ROOM, b'{"req_id":"room"}'))
        await asyncio.to_thread(wait_for, lambda: one.bodies, "the post")
        task.cancel()
        await asyncio.wait([task])
        await asyncio.to_thread(wait_for, lambda: one.left == 1, "the encoder to notice")

    with_posts(cancelled)


# -- probes --------------------------------------------------------------------------------------------------------


def probe(url: str, insecure: bool = False) -> Any:
    async def run() -> Any:
        sender = Posts(None, insecure=insecure)
        try:
            return await sender.probe(url)
        finally:
            await sender.close()

    return asyncio.run(run())


def test_a_probe_returns_what_the_encoder_says_of_itself(encoder: MakeEncoder) -> None:
    one = encoder(prefix_cache=True)
    assert probe(one.url) == one.info and probe(one.url + "/") == one.info and one.probes == 2


def test_a_probe_of_a_server_that_never_answers_ends_as_silent(
    encoder: MakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(posts, "_PROBE_SECONDS", 0.2)
    one = encoder()
    one.info = None
    with pytest.raises(EncoderAbsent) as absent:
        probe(one.url)
    assert absent.value.silent and not absent.value.refused


def test_a_probe_of_a_port_where_nothing_listens_is_refused_and_not_silent() -> None:
    with pytest.raises(EncoderAbsent) as absent:
        probe(f"http://127.0.0.1:{free_port()}")
    assert absent.value.refused and not absent.value.silent


def test_a_probe_over_a_network_without_a_key_is_not_made() -> None:
    with pytest.raises(NotAuthentic):
        probe("http://10.255.255.1:9")


def test_a_probe_of_another_server_fails() -> None:
    async def run(sender: Posts) -> None:
        server, url = await answered_by(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
        async with server:
            await sender.probe(url)

    with pytest.raises(ProtocolError, match="malformed"):
        with_posts(run)


# -- JSON ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        {"req_id": "r", "mm_items": [{"url": "data:,x", "fps": 2.5}], "time_stats_json": None},
        {"text": "\u00e4\u2028"},
        {"lone surrogate": "\ud800"},
        {"large": 1 << 70},
        {1: "a key that is a number"},
    ],
)
def test_content_arrives_as_the_standard_library_would_have_sent_it(content: dict[Any, Any]) -> None:
    assert json.loads(json_body(content)) == json.loads(json.dumps(content))
