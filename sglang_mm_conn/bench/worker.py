"""One of the two processes of a transport: carries out the benchmark's commands until the benchmark closes the pipe."""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import multiprocessing.connection
import os
import resource
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from sglang_mm_conn.bench.payload import open_payload
from sglang_mm_conn.bench.records import Measurement, Side
from sglang_mm_conn.bench.transports import make_receiver, make_sender
from sglang_mm_conn.bench.transports.base import Config, Receiver, Room, Sender

_WAIT_SECONDS = 0.001  # timeout of one call of ``Sender.wait``
_RUN_SECONDS = 120.0  # a run that takes longer has failed
_REST_SECONDS = 0.0005  # for the threads of both processes to become idle

_COUNTED = {
    "socket.__new__": "sockets",
    "socket.connect": "connections",
    "http.client.connect": "http",
}


class CallCounter:
    """Counts what should not happen per request (new sockets, threads, ...), from Python's audit events."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        sys.addaudithook(self._on_event)
        self._count_threads()

    def _on_event(self, event: str, arguments: Any) -> None:
        name = _COUNTED.get(event)
        if name is not None:
            self.counts[name] += 1

    def _count_threads(self) -> None:
        """Python 3.11 has no audit event for new threads."""
        original = threading.Thread.start

        def start(thread: threading.Thread) -> None:
            self.counts["threads"] += 1
            original(thread)

        threading.Thread.start = start  # type: ignore[method-assign, assignment]

    def count_registrations(self) -> None:
        """The Mooncake engine's memory registrations have no audit event."""
        module: Any = sys.modules.get("mooncake.engine")
        if module is None:
            return
        original = module.TransferEngine.register_memory

        def register_memory(engine: Any, *args: Any) -> int:
            self.counts["registrations"] += 1
            return int(original(engine, *args))

        module.TransferEngine.register_memory = register_memory


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Worker:
    """Answers the benchmark's commands, one at a time."""

    def __init__(
        self, role: str, transport: str, config: Config, payload: tuple[str, int, int], peer: Connection
    ) -> None:
        self._role = role
        self._peer = peer
        self._payload = open_payload(payload, config.device)
        self._device = config.device
        self._counter = CallCounter()
        self._end: Any = make_sender(transport, config) if role == "encoder" else make_receiver(transport, config)
        self._counter.count_registrations()
        self.hello: dict[str, Any] = {**self._end.hello(), "pid": os.getpid()}

    def connect(self, peer: dict[str, Any]) -> dict[str, Any]:
        self._end.connect(peer)
        return {"slice_bytes": getattr(self._end, "slice_bytes", 0)}

    def run(self, run: Measurement) -> Side:
        with self._measured() as side:
            if self._role == "encoder":
                (self._send_concurrent if run.in_flight else self._send_single)(self._end, run, side)
            else:
                (self._receive_concurrent if run.in_flight else self._receive_single)(self._end, run, side)
        return side

    def park(self, server: str, first: int, count: int, tokens: int, width: int) -> None:
        """Announce rooms that no request claims (encoder process)."""
        for number in range(first, first + count):
            self._end.prepare(_room(server, number, tokens, width))

    @contextlib.contextmanager
    def _measured(self) -> Iterator[Side]:
        side = Side([], 0.0)
        calls, threads, descriptors = Counter(self._counter.counts), _threads(), _descriptors()
        costs = thread_costs()
        cpu, side.began = cpu_seconds(), time.monotonic()
        yield side
        side.ended = time.monotonic()
        side.cpu = cpu_seconds() - cpu
        side.by_thread = _by_name(costs, thread_costs())
        side.calls = dict(self._counter.counts - calls)
        side.threads, side.descriptors = _threads() - threads, _descriptors() - descriptors

    # -- one room after the other --------------------------------------------------------------------------------

    def _send_single(self, end: Sender, run: Measurement, side: Side) -> None:
        for number, room in _rooms(run):
            self._hear("expected")
            end.prepare(room)
            self._payload.mark(0, number)
            tensor = self._payload.tensor(0, room)
            until = time.monotonic() + _RUN_SECONDS
            while not end.prepared(room):
                _check(until, f"{room.name} prepared")
                time.sleep(_REST_SECONDS)
            time.sleep(_REST_SECONDS)
            side.times.append(time.monotonic())
            end.go(room, tensor)
            waiting = {room.name}
            while waiting:
                _check(until, f"{room.name} sent")
                waiting.difference_update(end.wait(_WAIT_SECONDS))
            self._hear("arrived")

    def _receive_single(self, end: Receiver, run: Measurement, side: Side) -> None:
        for number, room in _rooms(run):
            end.expect(room)
            self._peer.send("expected")
            until = time.monotonic() + _RUN_SECONDS
            arrived: list[tuple[str, torch.Tensor]] = []
            while not arrived:
                _check(until, f"{room.name} received")
                arrived = end.wait(0.1)
            [(name, tensor)] = arrived
            tensor = self._landed(tensor)
            side.times.append(time.monotonic())
            mistake = self._payload.mistake(0, number, room, tensor)
            if name != room.name or mistake:
                raise RuntimeError(f"wrong bytes in {name} (expected {room.name}): {mistake}")
            del arrived, tensor
            end.release(name)
            self._peer.send("arrived")

    # -- several rooms in flight ----------------------------------------------------------------------------------

    def _send_concurrent(self, end: Sender, run: Measurement, side: Side) -> None:
        self._hear("expected")
        free = list(range(run.in_flight))
        busy: dict[str, int] = {}
        until = time.monotonic() + _RUN_SECONDS
        for number, room in _rooms(run):
            while not free:
                _check(until, "concurrent rooms sent")
                free += [busy.pop(name) for name in end.wait(_WAIT_SECONDS)]
            slot = busy[room.name] = free.pop()
            self._payload.mark(slot, number)
            side.times.append(time.monotonic())
            end.prepare(room)
            end.go(room, self._payload.tensor(slot, room))
            free += [busy.pop(name) for name in end.wait(0)]
        while busy:
            _check(until, "the last rooms of a concurrent run sent")
            for name in end.wait(_WAIT_SECONDS):
                busy.pop(name)
        self._hear("arrived")

    def _receive_concurrent(self, end: Receiver, run: Measurement, side: Side) -> None:
        self._peer.send("expected")
        rooms = _rooms(run)
        waiting: dict[str, int] = {}
        arrivals: dict[int, float] = {}
        until = time.monotonic() + _RUN_SECONDS
        more = True
        while more or waiting:
            while more and len(waiting) < run.in_flight:
                following = next(rooms, None)
                more = following is not None
                if following is not None:
                    number, room = following
                    waiting[room.name] = number
                    end.expect(room)
            for name, tensor in end.wait(0.1) if waiting else ():
                number = waiting.pop(name)
                tensor = self._landed(tensor)
                arrivals[number] = time.monotonic()
                mistake = self._payload.mark_mistake(number, _room(run.server, number, run.tokens, run.width), tensor)
                if mistake:
                    raise RuntimeError(f"wrong bytes in {name}: {mistake}")
                end.release(name)
            _check(until, "concurrent rooms received")
        side.times = [arrivals[number] for number in sorted(arrivals)]
        self._peer.send("arrived")

    def _landed(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` on the device where embeddings end. If the transport delivered it in host memory, the copy to the
        GPU that sglang's prefill would make is part of its time."""
        if self._device == "cuda" and tensor.is_cpu:
            tensor = tensor.to("cuda")
            torch.cuda.current_stream().synchronize()
        return tensor

    def _hear(self, word: str) -> None:
        """Wait for ``word`` from the other process. Raises RuntimeError after _RUN_SECONDS, or for another word."""
        if not self._peer.poll(_RUN_SECONDS):
            raise RuntimeError(f"the other process has not said {word!r} within {_RUN_SECONDS:g} s")
        heard = self._peer.recv()
        if heard != word:
            raise RuntimeError(f"the other process said {heard!r}, not {word!r}")

    def close(self) -> None:
        self._end.close()


def _room(server: str, number: int, tokens: int, width: int) -> Room:
    return Room(f"{server}-{number:016x}_local_part_0", tokens, width)


def _rooms(run: Measurement) -> Iterator[tuple[int, Room]]:
    for number in range(run.first, run.first + run.count):
        yield number, _room(run.server, number, run.tokens, run.width)


def _check(until: float, what: str) -> None:
    if time.monotonic() > until:
        raise RuntimeError(f"not within {_RUN_SECONDS:g} s: {what}")


def thread_costs() -> dict[int, tuple[float, int]]:
    """By thread id: seconds of CPU time, and voluntary context switches."""
    costs = {}
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/schedstat") as file:
            nanoseconds = int(file.read().split()[0])
            with open(f"/proc/self/task/{task}/status") as status:
                waits = next(line for line in status if line.startswith("voluntary_ctxt_switches"))
            costs[int(task)] = (nanoseconds / 1e9, int(waits.split()[1]))
    return costs


def _by_name(before: dict[int, tuple[float, int]], after: dict[int, tuple[float, int]]) -> dict[str, list[float]]:
    """The difference of two ``thread_costs``, by thread name without trailing numbers."""
    names = {thread.native_id: thread.name.rstrip("0123456789._-") for thread in threading.enumerate()}
    spent: dict[str, list[float]] = {}
    for task, (seconds, waits) in after.items():
        known = before.get(task, (0.0, 0))
        sums = spent.setdefault(names.get(task, "not Python's"), [0.0, 0.0])
        sums[0] += seconds - known[0]
        sums[1] += waits - known[1]
    return {name: sums for name, sums in spent.items() if any(sums)}


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _end_with_the_benchmark() -> None:
    """A run in progress does not read the pipe, and may wait long for a process that is gone: exit with the parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def serve(
    commands: Connection, role: str, transport: str, config: Config, payload: tuple[str, int, int], peer: Connection,
    environment: dict[str, str], log: str,
) -> None:  # fmt: skip
    """The main function of the process: answers one command after the other, until ``close`` or the pipe's end."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    logging.basicConfig(level=logging.WARNING, format=f"{transport} {role}: %(message)s", stream=sys.stderr)
    threading.Thread(target=_end_with_the_benchmark, name="bench-lifeline", daemon=True).start()
    gc.collect()
    gc.freeze()  # collections skip what all processes have imported
    torch.set_num_threads(1)  # a server's encoder and scheduler share the machine with others
    subject: Worker | None = None
    try:
        subject = Worker(role, transport, config, payload, peer)
        commands.send(("ok", subject.hello))
        while True:
            name, arguments = commands.recv()
            if name == "close":
                break
            try:
                commands.send(("ok", getattr(subject, name)(*arguments)))
            except Exception as error:
                traceback.print_exc()
                commands.send(("error", f"{type(error).__name__}: {error}"))
    except (EOFError, OSError, KeyboardInterrupt):
        pass  # the benchmark has ended
    except Exception as error:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            commands.send(("error", f"{type(error).__name__}: {error}"))
    finally:
        # Engines and sockets of some transports have threads that may not end: close for 5 s at most, then exit.
        if subject is not None:
            closer = threading.Thread(target=subject.close, daemon=True)
            closer.start()
            closer.join(5)
        os._exit(0)
