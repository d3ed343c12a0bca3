"""How the parts of an sglang encoder share its draining: bootstrap answers, heartbeats, data parallel workers."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from fastapi import FastAPI

from sglang_mm_conn.connector.encoder.endpoint import ServerStatus
from sglang_mm_conn.control.bootstrap import BootstrapInfo, Worker
from sglang_mm_conn.control.draining import order
from sglang_mm_conn.core.messages import PROTOCOL_VERSION
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.sglang_plugin import encoder as plugin
from sglang_mm_conn.sglang_plugin import processes
from sglang_mm_conn.sglang_plugin.draining import ServerDrain, follow_server
from sglang_mm_conn.sglang_plugin.processes import DpWorkers, Notice
from tests.control.draining_app import Threaded

INFO = BootstrapInfo(PROTOCOL_VERSION, [Worker("0123456789abcdef", 4711)])


class FakeEndpoint:
    """What a ServerDrain uses of an EncoderEndpoint."""

    def __init__(self) -> None:
        self.core = SimpleNamespace(rooms={"a": 1, "b": 2})
        self.server_status: Callable[[], ServerStatus] = lambda: ServerStatus(2, False)
        self.sent: list[ServerStatus] = []
        self.failed: list[tuple[str, int]] = []

    def send_heartbeats(self) -> None:
        self.sent.append(self.server_status())

    def fail_all(self, reason: str, code: int) -> None:
        self.failed.append((reason, code))


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited 10 s"
        time.sleep(0.01)


def installed(drain: ServerDrain) -> FastAPI:
    app = FastAPI(openapi_url=None)
    drain.install(app)
    return app


def test_an_order_reaches_the_heartbeats_of_the_process_that_holds_the_embeddings() -> None:
    endpoint: Any = FakeEndpoint()
    drain = ServerDrain(Settings(), None, DpWorkers([]))
    drain.serves(endpoint)
    with Threaded(SimpleNamespace(app=installed(drain))) as server:  # type: ignore[arg-type]
        drain.draining.held = 5
        order(server.url, None, drain=True)
        order(server.url, None, drain=False)
    assert endpoint.sent == [ServerStatus(5, True), ServerStatus(5, False)]
    drain._fail_rooms("drained", 503)
    assert endpoint.failed == [("drained", 503)]


def test_a_data_parallel_worker_that_reads_nothing_does_not_hold_up_the_server() -> None:
    pipes = [multiprocessing.Pipe() for _ in range(2)]
    workers = DpWorkers([ours for ours, _ in pipes])
    for number in range(2000):  # more than a pipe holds
        workers.tell(Notice(number % 2 == 0))
        pipes[1][1].recv_bytes()
    for pair in pipes:
        for pipe in pair:
            pipe.close()


def test_data_parallel_workers_are_told_and_count_their_own_rooms(monkeypatch: pytest.MonkeyPatch) -> None:
    pipes = [multiprocessing.Pipe() for _ in range(2)]
    workers = DpWorkers([ours for ours, _ in pipes])
    drain = ServerDrain(Settings(), None, workers)
    endpoints: list[Any] = []
    for rank, (_, theirs) in enumerate(pipes):
        monkeypatch.setattr(processes, "_to_route", theirs)
        processes.publish_control_port(Worker(f"{rank}" * 16, 4711 + rank))
        if rank == 1:
            drain.draining.order(drain=True)
            drain._changed()  # before this worker listens
        endpoints.append(FakeEndpoint())
        follow_server(endpoints[-1])
    wait(lambda: all(endpoint.sent == [ServerStatus(2, True)] for endpoint in endpoints))
    known = workers.known([0, 1])
    assert known is not None and [worker.control_port for worker in known] == [4711, 4712]
    drain._fail_rooms("drained", 503)
    wait(lambda: all(endpoint.failed == [("drained", 503)] for endpoint in endpoints))
    drain.draining.order(drain=False)
    drain._changed()
    wait(lambda: all(endpoint.sent[-1] == ServerStatus(2, False) for endpoint in endpoints))
    for ours, _ in pipes:
        ours.close()
    wait(lambda: not any(thread.name == "mm-conn-notices" for thread in threading.enumerate()))
    workers.tell(Notice(True))  # the workers are gone
    for _, theirs in pipes:
        theirs.close()


def test_a_process_without_a_pipe_follows_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_to_route", None)
    endpoint: Any = FakeEndpoint()
    follow_server(endpoint)
    assert not any(thread.name == "mm-conn-notices" for thread in threading.enumerate())


@pytest.mark.parametrize("workers", [False, True])
def test_the_bootstrap_answer_says_whether_it_drains_and_caches(workers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if workers:
        ours, theirs = multiprocessing.Pipe()
        theirs.send_bytes(msgspec.json.encode(INFO.workers[0]))
        monkeypatch.setattr(plugin, "_dp_workers", DpWorkers([ours]))
        monkeypatch.setattr(plugin.http_server, "dp_dispatcher", SimpleNamespace(alive_ranks=[0]))
    else:
        manager = SimpleNamespace(register_to_bootstrap=lambda: (INFO, None))
        monkeypatch.setattr(plugin, "_manager", manager)
    drain = ServerDrain(Settings(), None, DpWorkers([]))
    monkeypatch.setattr(plugin, "_drain", drain)
    for cached in (True, False):
        monkeypatch.setattr(plugin, "get_mm", lambda cached=cached: SimpleNamespace(enable_prefix_mm_cache=cached))
        info, key = plugin.bootstrap_info() or pytest.fail("no answer")
        assert (info, key) == (msgspec.structs.replace(INFO, prefix_cache=cached), None)
    drain.draining.order(drain=True)
    info, _ = plugin.bootstrap_info() or pytest.fail("no answer")
    assert info.draining and info.workers == INFO.workers
    if workers:
        ours.close()
        theirs.close()
