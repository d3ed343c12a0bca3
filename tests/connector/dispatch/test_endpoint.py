"""A whole dispatcher against encoders that are only HTTP servers: posts, news, reports of the scheduler, the end."""

from __future__ import annotations

import gc
import itertools
import logging
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from sglang_mm_conn.connector.dispatch import endpoint as endpoint_module
from sglang_mm_conn.connector.dispatch.endpoint import Dispatched, DispatcherEndpoint
from sglang_mm_conn.control.authentication import generate
from sglang_mm_conn.control.reports import ReportSender
from sglang_mm_conn.core.dispatch.actions import GiveUp, Redispatched
from sglang_mm_conn.core.dispatch.choice import Item
from sglang_mm_conn.core.dispatch.dispatcher import NO_ENCODER
from sglang_mm_conn.core.dispatch.encoders import EncoderStatus
from sglang_mm_conn.core.dispatch.reports import EncoderStatuses, Report, RoomFailed
from sglang_mm_conn.core.dispatch.requests import Part
from sglang_mm_conn.core.dispatch.verdicts import DRAINING, STATE_HEADER
from sglang_mm_conn.core.rooms import new_id, new_room_base
from sglang_mm_conn.core.settings import Settings
from tests.connector.dispatch.encoders import (
    Answer,
    FakeEncoder,
    arrived,
    cut,
    error,
    free_port,
    hang,
    plain,
    wait_for,
)

MakeEncoder = Callable[..., FakeEncoder]
SERVER = new_id()
LOST = "the connection to the encoder of this request was lost"


class Items:
    """What a request wants to have encoded; a test sees when it is freed."""


class Request:
    """One request, with the news that its scheduler gets."""

    def __init__(self, reached: bool = True) -> None:
        self.room_base = new_room_base(SERVER)
        self.news: list[Redispatched | GiveUp] = []
        self.items: Items | None = Items()
        self.reached = threading.Event()
        if reached:
            self.reached.set()
        self.placed: list[tuple[str, Part]] = []

    def dispatched(self) -> Dispatched:
        items = self.items

        def content(part: Part, room: str) -> dict[str, Any]:
            assert items is not None
            return {"req_id": room, "part_idx": part.number, "num_parts": part.of, "rid": self.room_base}

        return Dispatched(content=content, tell=self.news.append, reached=self.reached)


class Server:
    """A dispatcher, and requests to it."""

    def __init__(self, *encoders: FakeEncoder | str, report_address: str | None = None, **settings: str) -> None:
        names = {f"SGLANG_MM_CONN_{name.upper()}": value for name, value in settings.items()}
        self.urls = [one if isinstance(one, str) else one.url for one in encoders]
        self.endpoint = DispatcherEndpoint(
            Settings.from_env(names), server=SERVER, report_address=report_address, urls=lambda: self.urls
        )
        self.endpoint.look_at_list()

    def state(self, encoder: FakeEncoder | str) -> str:
        url = encoder if isinstance(encoder, str) else encoder.url
        encoders: Any = self.endpoint.report()["encoders"]
        return str(encoders[url]["state"])

    def wait_until_up(self) -> None:
        wait_for(lambda: all(self.state(url) == "up" for url in self.urls), "all encoders to be up")

    def send(self, items: int = 1, seconds: float = 60.0, *, reached: bool = True, work: float = 1.0) -> Request:
        request = Request(reached)
        request.placed = self.endpoint.dispatch(
            "rid", request.room_base, [Item("IMAGE", work)] * items, seconds, request.dispatched()
        )
        return request

    def wait_until_over(self, request: Request) -> None:
        wait_for(lambda: request.room_base not in self.endpoint._dispatched, "the end of the request")


@pytest.fixture
def server() -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def make(*encoders: FakeEncoder | str, report_address: str | None = None, **settings: str) -> Server:
        made.append(Server(*encoders, report_address=report_address, **settings))
        return made[-1]

    yield make
    for one in made:
        one.endpoint.close()


class Scheduler(ReportSender):
    """The scheduler's end of the reports."""

    def __init__(self, directory: str) -> None:
        self.address = f"ipc://{directory}/reports"
        super().__init__(self.address)


@pytest.fixture
def reports() -> Iterator[Scheduler]:
    with tempfile.TemporaryDirectory(prefix="mm-conn-test-", dir="/tmp") as directory:
        made = Scheduler(directory)
        yield made
        made.close()


def repeat(sender: ReportSender, report: Report, until: Callable[[], object], what: str) -> None:
    """Send ``report`` again and again, as the scheduler does."""
    ends = time.monotonic() + 10
    while not until():
        assert time.monotonic() < ends, f"waited for {what}"
        sender.send(report)
        time.sleep(0.01)


# -- requests ------------------------------------------------------------------------------------------------------


def test_a_request_is_posted_and_over_when_every_part_has_arrived(encoder: MakeEncoder, server: Any) -> None:
    one, other = encoder(), encoder()
    dispatcher = server(one, other)
    dispatcher.wait_until_up()
    request = dispatcher.send(2)
    dispatcher.wait_until_over(request)
    assert sorted(body["part_idx"] for body in one.bodies + other.bodies) == [0, 1]
    assert {body["num_parts"] for body in one.bodies + other.bodies} == {2}
    assert sorted(one.rooms + other.rooms) == [f"{request.room_base}_local_part_{part}" for part in range(2)]
    assert request.news == [] and dispatcher.endpoint.report()["requests"] == 0


def test_requests_that_follow_each_other_use_one_connection(encoder: MakeEncoder, server: Any) -> None:
    one = encoder()
    dispatcher = server(one)
    dispatcher.wait_until_up()
    for _ in range(10):
        dispatcher.wait_until_over(dispatcher.send())
    assert len(one.connections) == 10 and len(set(one.connections)) == 1


def test_many_threads_may_dispatch_at_once(encoder: MakeEncoder, server: Any) -> None:
    encoders = [encoder() for _ in range(3)]
    dispatcher = server(*encoders)
    dispatcher.wait_until_up()
    requests: list[Request] = []

    def send_many() -> None:
        for _ in range(25):
            requests.append(dispatcher.send(2))  # noqa: PERF401

    threads = [threading.Thread(target=send_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for request in requests:
        dispatcher.wait_until_over(request)
    rooms = [room for one in encoders for room in one.rooms]
    assert len(rooms) == len(set(rooms)) == sum(len(request.placed) for request in requests) >= 100


def test_items_are_freed_when_the_request_is_over_and_not_before(encoder: MakeEncoder, server: Any) -> None:
    gate = threading.Event()

    async def wait(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        while not gate.is_set():
            await endpoint_module.asyncio.sleep(0.005)
        return await arrived(request, body)

    one = encoder(wait)
    dispatcher = server(one)
    dispatcher.wait_until_up()
    request = dispatcher.send()
    assert request.items is not None
    items = weakref.ref(request.items)
    request.items = None
    wait_for(lambda: one.bodies, "the post")
    gc.collect()
    assert items() is not None
    gate.set()
    dispatcher.wait_until_over(request)
    wait_for(lambda: gc.collect() is not None and items() is None, "the items to be freed")


# -- another encoder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (cut, "suspect"),
        (error(500), "up"),
        (plain(500), "up"),
        (error(502), "up"),
        (error(503, headers={STATE_HEADER: DRAINING}), "draining"),
        (plain(200, "<html>It works!</html>"), "suspect"),
        (plain(302, "", {"Location": "/elsewhere"}), "suspect"),
    ],
)
def test_a_part_moves_to_another_encoder_in_another_room(
    answer: Answer, state: str, encoder: MakeEncoder, server: Any
) -> None:
    bad, good = encoder(answer), encoder()
    dispatcher = server(bad, good)
    dispatcher.wait_until_up()
    bad.info = None  # what the post has shown stays, until a probe ends
    request = dispatcher.send()
    assert [url for url, _ in request.placed] == [bad.url]
    wait_for(lambda: good.rooms and request.news, "the part at the other encoder")
    assert len(bad.bodies) == 1 and dispatcher.state(bad) == state
    (room,) = good.rooms
    assert request.news == [Redispatched(request.room_base, 0, good.url, room)] and room != bad.rooms[0]
    dispatcher.wait_until_over(request)


def test_a_part_moves_from_an_encoder_that_has_ended(encoder: MakeEncoder, server: Any) -> None:
    dead, alive = encoder(), encoder()
    dispatcher = server(dead, alive)
    dispatcher.wait_until_up()
    dead.close()
    request = dispatcher.send()
    dispatcher.wait_until_over(request)
    assert len(request.news) == 1 and len(alive.bodies) == 1
    wait_for(lambda: dispatcher.state(dead.url) == "down", "the encoder to be down")


def test_an_encoder_that_returns_is_used_again(encoder: MakeEncoder, server: Any) -> None:
    port = free_port()
    dispatcher = server(f"http://127.0.0.1:{port}")
    wait_for(lambda: dispatcher.state(dispatcher.urls[0]) == "down", "the encoder to be down")
    request = dispatcher.send()
    dispatcher.wait_until_over(request)
    assert request.news == [GiveUp(request.room_base, 503, NO_ENCODER)]
    one = encoder(port=port)
    dispatcher.wait_until_up()
    dispatcher.wait_until_over(dispatcher.send())
    assert len(one.bodies) == 1


def test_a_request_may_wait_for_an_encoder_that_returns(encoder: MakeEncoder, server: Any) -> None:
    port = free_port()
    dispatcher = server(f"http://127.0.0.1:{port}", dispatch_wait_seconds="10")
    request = dispatcher.send()
    wait_for(lambda: dispatcher.state(dispatcher.urls[0]) == "down", "the encoder to be down")
    one = encoder(port=port)
    dispatcher.wait_until_over(request)
    assert request.news == [Redispatched(request.room_base, 0, one.url, one.rooms[0])]


def test_an_encoder_that_hangs_is_left_when_the_scheduler_says_it_is_silent(
    encoder: MakeEncoder, server: Any, reports: Scheduler
) -> None:
    frozen, good = encoder(hang), encoder()
    dispatcher = server(frozen, good, report_address=reports.address)
    dispatcher.wait_until_up()

    def statuses(silences: int) -> EncoderStatuses:
        return EncoderStatuses(
            [EncoderStatus(frozen.url, not silences, silences, load=40), EncoderStatus(good.url, True)]
        )

    def load() -> Any:
        encoders: Any = dispatcher.endpoint.report()["encoders"]
        return encoders[frozen.url]["work"]

    request = dispatcher.send()
    wait_for(lambda: frozen.bodies, "the post")
    repeat(reports, statuses(0), lambda: load() > 1, "a report")
    assert request.news == []
    frozen.info = None
    repeat(reports, statuses(1), lambda: good.bodies, "the part to move")
    dispatcher.wait_until_over(request)
    wait_for(lambda: frozen.left == 1, "the old post to be cancelled")
    assert dispatcher.state(frozen) == "down"


def test_a_room_that_fails_on_the_schedulers_side_is_tried_again(
    encoder: MakeEncoder, server: Any, reports: Scheduler, caplog: pytest.LogCaptureFixture
) -> None:
    slow, good = encoder(hang), encoder()
    dispatcher = server(slow, good, report_address=reports.address)
    dispatcher.wait_until_up()
    request = dispatcher.send()
    wait_for(lambda: slow.bodies, "the post")
    repeat(reports, RoomFailed(slow.rooms[0], 504, "no answer"), lambda: good.bodies, "the part to move")
    dispatcher.wait_until_over(request)
    wait_for(lambda: slow.left == 1, "the old post to be cancelled")
    # It is over; the scheduler may still ask about its newest room.
    failed = RoomFailed(good.rooms[0], 502, "lost")
    repeat(reports, failed, lambda: len(request.news) > 1, "an answer")
    assert request.news[:2] == [
        Redispatched(request.room_base, 0, good.url, good.rooms[0]), GiveUp(request.room_base, 502, LOST)
    ]  # fmt: skip


def test_a_malformed_report_is_logged_and_the_next_one_counts(
    encoder: MakeEncoder, server: Any, reports: Scheduler, caplog: pytest.LogCaptureFixture
) -> None:
    one = encoder()
    dispatcher = server(one, report_address=reports.address)
    dispatcher.wait_until_up()

    def logged() -> bool:
        reports._socket.send(b"\xc1")
        return "A report of the scheduler was dropped: malformed" in caplog.text

    wait_for(logged, "a line in the log")
    refused = EncoderStatuses([EncoderStatus(one.url, False, refusal="another model")])
    repeat(reports, refused, lambda: dispatcher.state(one) == "down", "the report")


# -- failures ------------------------------------------------------------------------------------------------------


def test_a_fault_of_the_input_is_told_at_once_and_not_repeated(encoder: MakeEncoder, server: Any) -> None:
    one, other = encoder(error(400, "bad image")), encoder(error(400, "bad image"))
    dispatcher = server(one, other)
    dispatcher.wait_until_up()
    request = dispatcher.send()
    dispatcher.wait_until_over(request)
    wait_for(lambda: request.news, "the news")
    assert request.news == [GiveUp(request.room_base, 400, "bad image")]
    assert len(one.bodies) + len(other.bodies) == 1


def test_tries_are_limited_and_the_client_is_told(encoder: MakeEncoder, server: Any) -> None:
    encoders = [encoder(error(500, "out of memory")) for _ in range(4)]
    dispatcher = server(*encoders, dispatch_tries="2")
    dispatcher.wait_until_up()
    request = dispatcher.send()
    dispatcher.wait_until_over(request)
    wait_for(lambda: len(request.news) == 2, "the news")
    give_up = request.news[1]
    assert isinstance(give_up, GiveUp) and give_up.code == 500 and "out of memory" in give_up.reason
    assert sum(len(one.bodies) for one in encoders) == 2


def test_content_that_cannot_be_made_fails_its_request_alone(
    encoder: MakeEncoder, server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    one = encoder()
    dispatcher = server(one)
    dispatcher.wait_until_up()
    request = Request()

    def content(part: Part, room: str) -> dict[str, Any]:
        raise KeyError("no such field")

    dispatched = Dispatched(content=content, tell=request.news.append, reached=request.reached)
    dispatcher.endpoint.dispatch("rid", request.room_base, [Item("IMAGE", 1.0)], 60.0, dispatched)
    wait_for(lambda: request.news, "the news")
    (give_up,) = request.news
    assert isinstance(give_up, GiveUp) and give_up.code == HTTPStatus.BAD_GATEWAY
    assert "cannot be posted" in caplog.text
    dispatcher.wait_until_over(dispatcher.send())


# -- news ----------------------------------------------------------------------------------------------------------


def test_news_wait_until_the_scheduler_knows_the_request_and_come_in_order(
    encoder: MakeEncoder, server: Any
) -> None:  # fmt: skip
    encoders = [encoder(error(500, f"{number}")) for number in range(3)]
    dispatcher = server(*encoders)
    dispatcher.wait_until_up()
    request = dispatcher.send(reached=False)
    dispatcher.wait_until_over(request)
    time.sleep(0.1)
    assert request.news == []
    request.reached.set()
    wait_for(lambda: len(request.news) == 3, "the news")
    first, second, last = request.news
    assert isinstance(first, Redispatched) and isinstance(second, Redispatched) and isinstance(last, GiveUp)
    by_url = {one.url: one for one in encoders}
    assert [by_url[news.url].rooms[0] for news in (first, second)] == [first.room, second.room]


def test_news_of_a_request_that_never_reaches_the_scheduler_are_dropped(
    encoder: MakeEncoder, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "_UNSENT_SECONDS", 0.05)
    dispatcher = server(encoder(error(400)))
    dispatcher.wait_until_up()
    request = dispatcher.send(reached=False)
    dispatcher.wait_until_over(request)
    wait_for(lambda: not dispatcher.endpoint._news, "the news to be dropped")
    request.reached.set()
    time.sleep(0.05)
    assert request.news == []


def test_a_request_that_does_not_reach_the_scheduler_is_looked_at_ever_less_often(
    encoder: MakeEncoder, server: Any
) -> None:  # fmt: skip
    dispatcher = server(encoder(error(400)))
    dispatcher.wait_until_up()
    request = dispatcher.send(reached=False)
    looks: list[float] = []
    is_set = request.reached.is_set

    def look() -> bool:
        looks.append(time.monotonic())
        return is_set()

    request.reached.is_set = look
    dispatcher.wait_until_over(request)
    time.sleep(1.0)
    assert len(looks) <= 20 and looks[-1] - looks[-2] >= 0.09
    request.reached.set()
    wait_for(lambda: request.news, "the news", 1.0)


def test_news_that_cannot_be_told_cost_no_other_news(
    encoder: MakeEncoder, server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    dispatcher = server(encoder(error(500)), encoder(error(500)))
    dispatcher.wait_until_up()
    request = Request()
    told = itertools.count()

    def tell(news: Redispatched | GiveUp) -> None:
        if next(told) == 0:
            raise ConnectionError("the scheduler is gone")
        request.news.append(news)

    dispatched = Dispatched(content=request.dispatched().content, tell=tell, reached=request.reached)
    dispatcher.endpoint.dispatch("rid", request.room_base, [Item("IMAGE", 1.0)], 60.0, dispatched)
    wait_for(lambda: request.news, "the news")
    assert isinstance(request.news[0], GiveUp) and "the scheduler is gone" in caplog.text


# -- encoders ------------------------------------------------------------------------------------------------------


def test_encoders_come_and_go_while_the_dispatcher_runs(encoder: MakeEncoder, server: Any) -> None:
    one, other = encoder(), encoder()
    dispatcher = server(one)
    dispatcher.wait_until_up()
    probes = one.probes
    dispatcher.urls = [other.url]  # no request tells the dispatcher
    wait_for(lambda: list(dispatcher.endpoint.core.fleet.encoders) == [other.url], "the dispatcher to look at the list")
    dispatcher.wait_until_up()
    dispatcher.wait_until_over(dispatcher.send())
    assert len(other.bodies) == 1 and one.bodies == [] and one.probes == probes


def test_a_part_whose_client_has_gone_leaves_its_encoder(encoder: MakeEncoder, server: Any) -> None:
    one = encoder(hang)
    dispatcher = server(one)
    dispatcher.wait_until_up()
    request = dispatcher.send()
    wait_for(lambda: one.bodies, "the post")
    dispatcher.endpoint.clients_gone(["another"])
    assert request.room_base in dispatcher.endpoint._dispatched
    dispatcher.endpoint.clients_gone([request.room_base])
    dispatcher.wait_until_over(request)
    wait_for(lambda: one.left == 1, "the connection to end")
    assert request.news == []


def test_keys_of_items_are_needed_once_an_encoder_keeps_embeddings(encoder: MakeEncoder, server: Any) -> None:
    dispatcher = server(encoder(), encoder(prefix_cache=True))
    assert not dispatcher.endpoint.caches_items
    dispatcher.wait_until_up()
    assert dispatcher.endpoint.caches_items


def test_an_encoder_of_another_deployment_is_down(encoder: MakeEncoder, server: Any, tmp_path: Path) -> None:
    key = tmp_path / "key"
    generate(str(key))
    one = encoder()
    dispatcher = server(one, key_file=str(key))
    wait_for(lambda: dispatcher.state(one) == "down", "the encoder to be down")


def test_states_are_logged(encoder: MakeEncoder, server: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sglang_mm_conn")
    one = encoder()
    server(one).wait_until_up()
    wait_for(lambda: f"Encoder {one.url}: suspect -> up: it answers" in caplog.text, "the line")


# -- the end -------------------------------------------------------------------------------------------------------


def test_close_ends_the_thread_and_what_it_has_under_way(encoder: MakeEncoder, reports: Scheduler) -> None:
    one = encoder(hang)
    dispatcher = Server(one, report_address=reports.address)
    dispatcher.wait_until_up()
    dispatcher.send()
    dispatcher.send(reached=False)
    wait_for(lambda: len(one.bodies) == 2, "the posts")
    dispatcher.endpoint.close()
    assert not dispatcher.endpoint._thread.is_alive() and dispatcher.endpoint._loop.is_closed()
    wait_for(lambda: one.left == 2, "the connections to end")
    dispatcher.endpoint.close()
    dispatcher.send()  # nobody carries it out, and nothing fails
    dispatcher.urls = []
    dispatcher.endpoint.look_at_list()


def test_a_dispatcher_may_be_closed_at_once(reports: Scheduler) -> None:
    for _ in range(20):
        dispatcher = DispatcherEndpoint(Settings(), server=SERVER, report_address=reports.address)
        dispatcher.close()
    gc.collect()
