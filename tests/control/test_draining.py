"""Draining over HTTP: the gate before /encode, and the order to drain with its key, its challenge and its loopback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import requests

from sglang_mm_conn.control import draining_server, http_exchange
from sglang_mm_conn.control.authentication import DeploymentKey, NotAuthentic, generate
from sglang_mm_conn.control.bootstrap import EncoderAbsent, look_up
from sglang_mm_conn.control.draining import ANSWER, DRAIN_ROUTE, ORDER, DrainOrder, DrainStatus, ask_status, order
from sglang_mm_conn.control.draining_server import Challenge, EncodeGate, HeldRequests
from sglang_mm_conn.control.http_exchange import NONCE, SIGNATURE
from sglang_mm_conn.core.encoder.draining import Draining
from sglang_mm_conn.core.errors import ConnError, ProtocolError
from tests.control.draining_app import App, Threaded

DRAIN = msgspec.json.encode(DrainOrder(True))
Message = MutableMapping[str, Any]


@pytest.fixture
def new_key(tmp_path: Path) -> Callable[[], DeploymentKey]:
    made: list[DeploymentKey] = []

    def new() -> DeploymentKey:
        path = tmp_path / f"key-{len(made)}"
        generate(str(path))
        made.append(DeploymentKey.load(str(path)))
        return made[-1]

    return new


def post(url: str, challenge: str, signature: str = "", body: bytes = DRAIN) -> requests.Response:
    headers = {NONCE: challenge, SIGNATURE: signature}
    return requests.post(url + DRAIN_ROUTE, body, headers=headers, timeout=5)


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited 10 s"
        time.sleep(0.01)


# -- the gate ------------------------------------------------------------------------------------------------------


def test_a_draining_encoder_refuses_new_encodes_and_nothing_else() -> None:
    with Threaded(App()) as server:
        assert requests.post(server.url + "/encode", b"x" * 1000, timeout=5).json() == {"status": "ok", "bytes": 1000}
        assert order(server.url, None, drain=True).draining
        refused = requests.post(server.url + "/encode", b"x" * (8 << 20), timeout=5)
        assert refused.status_code == 503 and refused.headers["X-Mm-Conn-State"] == "draining"
        assert refused.json() == {"status": "error", "message": "the encoder is draining", "req_id": None}
        assert requests.get(server.url + "/encode", timeout=5).status_code == 405
        assert requests.get(server.url + "/health", timeout=5).json() == {"encodes": 1}
        assert look_up(server.url).draining
        assert not order(server.url, None, drain=False).draining and not look_up(server.url).draining
        assert requests.post(server.url + "/encode", b"", timeout=5).ok
        assert server.app.notices == [True, False]


def test_a_connection_serves_on_after_a_refusal_of_a_large_request() -> None:
    with Threaded(App()) as server, requests.Session() as client:
        order(server.url, None, drain=True)
        assert client.post(server.url + "/encode", b"x" * (8 << 20), timeout=5).status_code == 503
        assert client.get(server.url + "/health", timeout=5).json() == {"encodes": 0}


def test_what_an_encoder_holds_is_counted_and_finished_while_it_drains() -> None:
    with Threaded(App()) as server, ThreadPoolExecutor(3) as clients:
        held = [clients.submit(requests.post, server.url + "/encode?seconds=1", timeout=9) for _ in range(3)]
        wait(lambda: ask_status(server.url, None).held == 3)
        assert order(server.url, None, drain=True).held == 3
        assert [one.result().status_code for one in held] == [200] * 3
        wait(lambda: ask_status(server.url, None).held == 0)


def test_a_request_that_fails_is_not_held_any_more() -> None:
    async def fails(scope: Message, receive: Any, send: Any) -> None:
        assert draining.held == 1
        raise RuntimeError("no")

    draining = Draining()
    gate = EncodeGate(fails, HeldRequests(draining))
    with pytest.raises(RuntimeError, match="no"):
        asyncio.run(gate({"type": "http", "path": "/encode", "method": "POST"}, _never, _never))
    assert draining.held == 0


async def _never(*_: Any) -> Any:
    raise AssertionError("nothing is read or sent")


@pytest.mark.parametrize("answered", [False, True])
def test_an_abandoned_request_is_answered_as_a_refused_one_unless_it_has_an_answer(answered: bool) -> None:
    async def hangs(scope: Message, receive: Any, send: Any) -> None:
        if answered:
            await send({"type": "http.response.start", "status": 200})
        await asyncio.sleep(1e6)

    async def send(message: Message) -> None:
        sent.append(message)

    async def play() -> None:
        held = HeldRequests(draining)
        gate = EncodeGate(hangs, held)
        scope = {"type": "http", "path": "/encode", "method": "POST"}
        request = asyncio.ensure_future(gate(scope, _never, send))
        while draining.held == 0 or len(sent) < answered:
            await asyncio.sleep(0)
        held.abandon()
        await asyncio.wait({request})
        assert request.cancelled() == answered

    sent: list[Message] = []
    draining = Draining()
    asyncio.run(play())
    assert [message.get("status") for message in sent] == ([200] if answered else [503, None])
    assert draining.held == 0


def test_a_request_that_its_client_cancels_stays_cancelled() -> None:
    async def play() -> None:
        gate = EncodeGate(_hang, HeldRequests(Draining()))
        request = asyncio.ensure_future(gate({"type": "http", "path": "/encode", "method": "POST"}, _never, _never))
        await asyncio.sleep(0)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request

    asyncio.run(play())


async def _hang(*_: Any) -> None:
    await asyncio.sleep(1e6)


def test_the_gate_costs_microseconds() -> None:
    async def answers(scope: Message, receive: Any, send: Any) -> None:
        await send({})

    async def send(message: Message) -> None:
        pass

    async def seconds(app: Any) -> float:
        scope = {"type": "http", "path": "/encode", "method": "POST"}
        best = 1.0
        for _ in range(20):
            began = time.perf_counter()
            for _ in range(500):
                await app(scope, _never, send)
            best = min(best, (time.perf_counter() - began) / 500)
        return best

    gate = EncodeGate(answers, HeldRequests(Draining()))
    assert asyncio.run(seconds(gate)) - asyncio.run(seconds(answers)) < 20e-6


# -- who may give an order -----------------------------------------------------------------------------------------


def test_with_a_key_the_order_works_and_both_sides_prove_it(new_key: Callable[[], DeploymentKey]) -> None:
    key, other = new_key(), new_key()
    with Threaded(App(key)) as server:
        for wrong in (None, other):
            with pytest.raises(NotAuthentic, match=f"{server.url}.*SGLANG_MM_CONN_KEY_FILE"):
                order(server.url, wrong, drain=True)
        assert not server.app.draining.refuses
        assert order(server.url, key, drain=True).draining
        assert look_up(server.url, key).draining
    for impostor in (None, other):
        with Threaded(App(impostor)) as server:
            with pytest.raises(NotAuthentic, match="SGLANG_MM_CONN_KEY_FILE"):
                order(server.url, key, drain=True)
            assert not server.app.draining.refuses


def test_an_order_that_was_overheard_cannot_be_sent_again(new_key: Callable[[], DeploymentKey]) -> None:
    key = new_key()
    with Threaded(App(key)) as server, Threaded(App(key)) as second:
        challenge = ask_status(server.url, key).challenge
        signature = key.sign(ORDER, challenge.encode(), DRAIN)
        assert post(second.url, challenge, signature).status_code == 412, "it is for one encoder"
        assert post(server.url, challenge, signature).ok
        order(server.url, key, drain=False)
        replayed = post(server.url, challenge, signature)
        assert replayed.status_code == 412 and "ask for another" in replayed.text
        fresh = ask_status(server.url, key).challenge
        assert post(server.url, fresh, signature).status_code == 401, "the signature covers the challenge"
        undo = msgspec.json.encode(DrainOrder(False))
        assert post(server.url, fresh, key.sign(ORDER, fresh.encode(), undo)).status_code == 401, "and the order"
        assert post(server.url, fresh, key.sign(ANSWER, fresh.encode(), DRAIN)).status_code == 401, "and its purpose"
        assert not server.app.draining.refuses


def test_a_stranger_neither_learns_nor_uses_up_a_challenge(new_key: Callable[[], DeploymentKey]) -> None:
    key = new_key()
    with Threaded(App(key)) as server:
        challenge = ask_status(server.url, key).challenge
        asked = requests.get(server.url + DRAIN_ROUTE, timeout=5)
        assert asked.status_code == 401 and challenge not in asked.text
        assert post(server.url, challenge, "0" * 128).status_code == 401
        assert post(server.url, challenge, key.sign(ORDER, challenge.encode(), DRAIN)).ok


def test_without_a_key_only_loopback_clients_give_orders_unless_insecure(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotAuthentic, match="SGLANG_MM_CONN_INSECURE=1"):
        order("http://192.0.2.1:9", None, drain=True)
    # The server sees clients at other addresses than it listens on: 127.0.0.1 counts as one of another host here.
    monkeypatch.setattr(draining_server, "is_loopback", lambda host: host != "127.0.0.1")
    with Threaded(App()) as server:
        with pytest.raises(NotAuthentic, match=f"{server.url}.*own host"):
            order(server.url, None, drain=True)
        assert post(server.url, "").status_code == 403
        assert not server.app.draining.refuses
    with Threaded(App(insecure=True)) as server:
        assert order(server.url, None, drain=True, insecure=True).draining


def test_a_page_in_a_browser_of_the_host_cannot_give_an_order() -> None:
    """It can make the browser POST, but neither add a header nor read the challenge."""
    with Threaded(App()) as server:
        ask_status(server.url, None)
        assert requests.post(server.url + DRAIN_ROUTE, DRAIN, timeout=5).status_code == 412
        assert not server.app.draining.refuses


def test_a_challenge_is_taken_once_and_for_a_limited_time() -> None:
    now = 0.0
    challenge = Challenge(lambda: now)
    assert not challenge.redeem("")
    value = challenge.current()
    assert challenge.current() == value, "asking does not replace it"
    now = 29.0
    assert not challenge.redeem("other") and challenge.redeem(value) and not challenge.redeem(value)
    value = challenge.current()
    now += 61.0
    assert not challenge.redeem(value), "too old"
    assert challenge.current() != value


def test_two_who_give_orders_at_once_both_succeed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[DrainStatus] = []
    with Threaded(App()) as server:
        ask = ask_status

        def ask_and_be_overtaken(*args: Any, **kwargs: Any) -> Any:
            status = ask(*args, **kwargs)
            if not asked:
                asked.append(status)
                assert post(server.url, status.challenge).ok
            return status

        monkeypatch.setattr("sglang_mm_conn.control.draining.ask_status", ask_and_be_overtaken)
        assert not order(server.url, None, drain=False).draining


@pytest.mark.parametrize(("body", "status"), [(b"", 400), (b"{}", 400), (b'{"drain":"no"}', 400), (b" " * 2000, 413)])
def test_a_malformed_order_is_refused_and_changes_nothing(body: bytes, status: int) -> None:
    with Threaded(App()) as server:
        assert post(server.url, ask_status(server.url, None).challenge, body=body).status_code == status
        assert not server.app.draining.refuses and server.app.notices == []


def test_an_encoder_that_is_ending_says_why_it_takes_no_work_again() -> None:
    with Threaded(App()) as server:
        server.app.draining.held = 1
        server.app.draining.end(time.monotonic(), 60.0)
        status = order(server.url, None, drain=True)
        assert status.draining and status.ending
        with pytest.raises(ConnError, match=f"{server.url}.*SIGTERM"):
            order(server.url, None, drain=False)


def test_a_url_that_is_none_of_an_encoder_is_an_error_that_names_it() -> None:
    with pytest.raises(ProtocolError, match=r"'127\.0\.0\.1:1' is not of the form"):
        ask_status("127.0.0.1:1", None)
    with pytest.raises(EncoderAbsent, match=r"http://127\.0\.0\.1:1/conn_multimodal/drain"):
        ask_status("http://127.0.0.1:1", None)
    with Threaded(App()) as server, pytest.raises(ProtocolError, match=r"404.*--encoder-only"):
        ask_status(server.url + "/other", None)


def test_an_answer_that_is_too_long_is_not_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_exchange, "_MAX_BYTES", 10)
    with Threaded(App()) as server, pytest.raises(ProtocolError, match="malformed"):
        ask_status(server.url, None)
