"""Threads of the two endpoints: when they start, which of them touches a socket, and under what the cores are used.

Both endpoints run in this process, over shared memory and real sockets.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, cast

import pytest
import torch
import zmq

from sglang_mm_conn.connector.encoder.endpoint import EncoderEndpoint
from sglang_mm_conn.connector.language.endpoint import LanguageEndpoint
from sglang_mm_conn.connector.metadata import encode_metadata
from sglang_mm_conn.connector.runtime import Runtime
from sglang_mm_conn.control.bootstrap_server import StandaloneBootstrap
from sglang_mm_conn.core.layout import Extent, Geometry
from sglang_mm_conn.core.messages import Memory
from sglang_mm_conn.core.rooms import new_id, new_room_base
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.core.states import Poll
from sglang_mm_conn.datapath.base import DataPath, WriteLink
from sglang_mm_conn.datapath.factory import encoder_data_paths
from tests.connector.processes import wait_for

HOST = "127.0.0.1"
WIDTH = 8


class OwnedLock:
    """A lock that knows who holds it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.owner = 0

    def __enter__(self) -> None:
        self._lock.acquire()
        self.owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self.owner = 0
        self._lock.release()


class CountedExecutor(ThreadPoolExecutor):
    """Counts what it is given."""

    def __init__(self, threads: int, name: str) -> None:
        super().__init__(threads, name)
        self.name, self.given = name, 0

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        self.given += 1
        return super().submit(*args, **kwargs)


class WatchedRuntime(Runtime):
    """The real one; it notes what an endpoint had when its first thread started, and then watches lock and core."""

    inline_limit_bytes = uncontended_inline_limit_bytes = 0  # these embeddings are small, and copiers shall copy them
    view_least_bytes = 1

    def __init__(self) -> None:
        self.fields: dict[Any, set[str]] = {}
        self.unlocked: list[str] = []
        self.calls = 0
        self.executors: list[CountedExecutor] = []

    def executor(self, threads: int, name: str) -> Executor:
        self.executors.append(CountedExecutor(threads, name))
        return self.executors[-1]

    def start_thread(self, target: Callable[[], None], name: str) -> threading.Thread:
        method = cast("MethodType", target.func if isinstance(target, partial) else target)
        endpoint = method.__self__
        if endpoint not in self.fields:
            self.fields[endpoint] = set(vars(endpoint))
            self._watch(endpoint)
        return super().start_thread(target, name)

    def _watch(self, endpoint: Any) -> None:
        core, lock, shared = endpoint.core, OwnedLock(), endpoint._lock
        for part in [endpoint, *vars(endpoint).values()]:
            if getattr(part, "_lock", None) is shared:
                part._lock = lock
        for name in [name for name in dir(type(core)) if not name.startswith("_") and callable(getattr(core, name))]:
            setattr(core, name, partial(self._call, lock, getattr(core, name)))

    def _call(self, lock: OwnedLock, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if lock.owner != threading.get_ident():
            self.unlocked.append(f"{method.__name__} on {threading.current_thread().name}")
        return method(*args, **kwargs)


Ends = tuple[EncoderEndpoint, LanguageEndpoint, str, WatchedRuntime]
DataPaths = Callable[[Settings, str], Mapping[str, DataPath]]


@contextmanager
def both_ends(
    runtime: WatchedRuntime, data_paths: DataPaths = encoder_data_paths, *, checksum: bool = True
) -> Iterator[Ends]:
    """An encoder, a language rank with a pool smaller than one embedding, the encoder's URL, and what was watched."""
    settings = Settings.from_env(
        {
            "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": "4",
            "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": "8",
            "SGLANG_MM_CONN_DATA_PATH": "shm",
            "SGLANG_MM_CONN_CHECKSUM": str(int(checksum)),
        }
    )
    encoder = EncoderEndpoint(
        settings, host=HOST, dtype="float32", widest_row_bytes=WIDTH * 4, send_timeout=60.0,
        data_paths=data_paths(settings, HOST), runtime=runtime,
    )  # fmt: skip
    bootstrap = StandaloneBootstrap(HOST, 0, lambda: encoder.bootstrap_info)
    language = LanguageEndpoint(
        settings, server=new_id(), host=HOST, dtype="float32", widest_row_bytes=WIDTH * 4, runtime=runtime
    )
    try:
        yield encoder, language, bootstrap.url, runtime
    finally:
        language.close()
        encoder.close()
        bootstrap.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    with both_ends(WatchedRuntime()) as ends:
        yield ends


def transfer(ends: Ends, number: int, tokens: int = 100) -> None:
    """One room that needs resumes where it has more than 32 tokens; every fourth one is given up at once."""
    encoder, language, url, _ = ends
    room = new_room_base(language.server)
    rows = torch.full((tokens, WIDTH), float(number))
    language.expect(room, url, 60.0, str(number))
    encoder.announce(room, tokens, WIDTH * 4, "float32", lambda ended: None)
    if number % 4 == 3:
        language.abort(room, "given up")
    encoder.add_transfer_request(room, rows, encode_metadata({}, 1 << 20))
    wait_for(lambda: language.poll(room) in (Poll.Success, Poll.Failed), f"the end of {room}")
    if number % 4 != 3:
        assert language.poll(room) is Poll.Success, language.outcome(room)
        assert torch.equal(language.take(room)[0].view(torch.float32).reshape(tokens, WIDTH), rows)
    language.forget(room)


def transfer_many(ends: Ends) -> None:
    with ThreadPoolExecutor(4) as callers:
        list(callers.map(lambda number: transfer(ends, number), range(24)))


def test_threads_start_when_every_field_that_they_use_is_there(ends: Ends) -> None:
    encoder, language, _, runtime = ends
    assert set(vars(encoder)) - runtime.fields[encoder] == {"_threads"}
    assert set(vars(language)) - runtime.fields[language] == {"_thread"}


def test_a_status_changes_under_the_lock_whichever_thread_changes_it(ends: Ends) -> None:
    transfer_many(ends)
    runtime = ends[-1]
    assert runtime.calls > 300 and not runtime.unlocked, runtime.unlocked[:5]


def test_every_pool_of_threads_has_work_to_do(ends: Ends) -> None:
    transfer_many(ends)
    idle = {executor.name for executor in ends[-1].executors if not executor.given}
    # The revoker replaces Mooncake engines, and there is none here (tests/connector/test_faults.py has them).
    assert len(ends[-1].executors) == 4 and idle == {"mm-conn-revoker"}


def test_each_control_socket_is_touched_by_one_thread(monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    threads: dict[int, set[str]] = defaultdict(set)
    kept: list[zmq.Socket[Any]] = []  # so that no id serves two sockets

    def watch(name: str) -> None:
        method = getattr(zmq.Socket, name)

        def watched(socket: zmq.Socket[Any], *args: Any, **kwargs: Any) -> Any:
            kept.append(socket)
            threads[id(socket)].add(threading.current_thread().name)
            return method(socket, *args, **kwargs)

        monkeypatch.setattr(zmq.Socket, name, watched)

    for name in ("send", "send_multipart", "recv", "recv_multipart"):
        watch(name)
    transfer_many(request.getfixturevalue("ends"))
    assert len(threads) >= 2 and all(names == {"mm-conn-embedding"} for names in threads.values()), threads


class NotedPath:
    """Shared memory; notes on which threads it is written, and whether its writes are said to wait for nobody."""

    def __init__(self, path: DataPath, *, synchronous: bool) -> None:
        self.name = path.name
        self.close = path.close
        self.threads: list[str] = []
        self._path = path
        self._synchronous = synchronous

    def open(self, memory: Memory, geometry: Geometry, incarnation: str) -> WriteLink:
        link = self._path.open(memory, geometry, incarnation)
        link.synchronous = self._synchronous
        write = link.write

        def noted(source: torch.Tensor, extents: Sequence[Extent]) -> None:
            self.threads.append(threading.current_thread().name)
            write(source, extents)

        link.write = noted  # type: ignore[method-assign]
        return link


@contextmanager
def noting_ends(
    inline_rows: int, uncontended_rows: int, *, synchronous: bool = True
) -> Iterator[tuple[Ends, NotedPath]]:
    """Both ends that copy as many rows at once, and of an embedding that is alone, and what notes who writes."""
    noted: list[NotedPath] = []

    def data_paths(settings: Settings, host: str) -> Mapping[str, DataPath]:
        noted.append(NotedPath(encoder_data_paths(settings, host)["shm"], synchronous=synchronous))
        return {"shm": noted[0]}

    runtime = WatchedRuntime()
    runtime.inline_limit_bytes = inline_rows * WIDTH * 4
    runtime.uncontended_inline_limit_bytes = uncontended_rows * WIDTH * 4
    with both_ends(runtime, data_paths) as ends:
        yield ends, noted[0]


@pytest.mark.parametrize(
    ("uncontended_rows", "windows"),
    [(40, {20: "c", 40: "cc"}), (31, {20: "c", 40: "wc"}), (19, {20: "w", 40: "wc"}), (7, {20: "w", 40: "ww"})],
)
@pytest.mark.parametrize("tokens", [20, 40])
@pytest.mark.parametrize("synchronous", [True, False])
def test_no_worker_is_woken_for_a_small_window_unless_its_write_may_wait_for_others(
    synchronous: bool, tokens: int, uncontended_rows: int, windows: dict[int, str]
) -> None:
    """The pool holds 32 rows. Expected is who writes each window: a worker, or whoever hears that it can be written. A
    control thread that waited would leave every other room's messages unread."""
    with noting_ends(7, uncontended_rows, synchronous=synchronous) as (ends, path):
        transfer(ends, 1, tokens)
    by = "".join("w" if name.startswith("mm-conn-transfer-") else "c" for name in path.threads)
    assert by == (windows[tokens] if synchronous else "w" * len(windows[tokens]))


@pytest.mark.parametrize(
    ("tokens", "inline_rows", "uncontended_rows", "first"),
    [
        (20, 20, 33, "MainThread"),
        (20, 19, 33, "mm-conn-embedding"),
        (40, 33, 33, "mm-conn-embedding"),
        (40, 33, 31, "mm-conn-transfer-"),
    ],
)
def test_who_hands_over_an_embedding_that_is_not_small_writes_none_of_its_windows(
    tokens: int, inline_rows: int, uncontended_rows: int, first: str
) -> None:
    with noting_ends(inline_rows, uncontended_rows) as (ends, path):
        encoder, language, url, _ = ends
        room = new_room_base(language.server)
        encoder.announce(room, tokens, WIDTH * 4, "float32", lambda ended: None)
        language.expect(room, url, 60.0, "")
        wait_for(lambda: encoder.core.rooms[room].transfer_infos, "the offer of the first window")
        encoder.add_transfer_request(room, torch.ones(tokens, WIDTH), encode_metadata({}, 1 << 20))
        wait_for(lambda: language.poll(room) is Poll.Success, "the embedding")
    assert path.threads[0].startswith(first)


def test_windows_beside_another_embedding_go_to_workers_unless_it_is_small() -> None:
    """They write several embeddings in parallel."""
    with noting_ends(33, 100) as (ends, path):
        encoder, language, *_ = ends
        other = new_room_base(language.server)
        encoder.announce(other, 1, WIDTH * 4, "float32", lambda ended: None)
        encoder.add_transfer_request(other, torch.ones(1, WIDTH), encode_metadata({}, 1 << 20))
        transfer(ends, 1, 40)
        assert all(name.startswith("mm-conn-transfer-") for name in path.threads) and len(path.threads) == 2
        transfer(ends, 2, 33)
        assert all(name.startswith("mm-conn-transfer-") for name in path.threads) and len(path.threads) == 4
        transfer(ends, 4, 20)
        assert not path.threads[-1].startswith("mm-conn-transfer-"), "a small embedding is written at once all the same"


@pytest.mark.parametrize(("checksum", "tokens", "copies"), [(False, 16, 0), (True, 16, 1), (False, 20, 1)])
def test_embedding_left_in_its_blocks_wakes_no_mover_unless_its_bytes_are_read(
    checksum: bool, tokens: int, copies: int
) -> None:
    """Half of the pool, 16 rows, may be views; copying one row is too much for the control thread here."""
    runtime = WatchedRuntime()
    runtime.inline_limit_bytes = WIDTH * 4 - 1
    with both_ends(runtime, checksum=checksum) as ends:
        transfer(ends, 1, tokens)
    (copiers,) = [executor for executor in runtime.executors if executor.name == "mm-conn-copier"]
    assert copiers.given == copies


@pytest.mark.parametrize(
    ("checksum", "inline_rows", "copies"), [(False, 32, 0), (False, 31, 3), (True, 32, 1), (True, 31, 4)]
)
def test_small_window_wakes_no_mover_unless_the_whole_embedding_is_read_after_it(
    checksum: bool, inline_rows: int, copies: int
) -> None:
    """The pool holds 32 rows: three windows, and one of four rows."""
    runtime = WatchedRuntime()
    runtime.inline_limit_bytes = inline_rows * WIDTH * 4
    with both_ends(runtime, checksum=checksum) as ends:
        transfer(ends, 1, 100)
    (copiers,) = [executor for executor in runtime.executors if executor.name == "mm-conn-copier"]
    assert copiers.given == copies
