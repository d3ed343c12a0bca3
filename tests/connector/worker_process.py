"""The processes under test, and the process that forks them.

``python -m tests.connector.worker_process FD`` imports everything once (torch takes seconds) and forks an encoder or a
language process for every request on socket FD. It starts no thread and touches no engine itself, so a fork is as good
as a fresh process. A forked process serves commands, JSON lines on a socket of its own, until it is killed.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
import torch

from sglang_mm_conn.connector.encoder.endpoint import EncoderEndpoint
from sglang_mm_conn.connector.language.endpoint import LanguageEndpoint
from sglang_mm_conn.connector.language.follower import FollowerEndpoint
from sglang_mm_conn.connector.metadata import decode_metadata, dtype_of, encode_metadata
from sglang_mm_conn.connector.runtime import Runtime
from sglang_mm_conn.control.authentication import DeploymentKey
from sglang_mm_conn.control.bootstrap import BootstrapInfo, Worker
from sglang_mm_conn.control.bootstrap_server import StandaloneBootstrap
from sglang_mm_conn.core.actions import Ended
from sglang_mm_conn.core.errors import ConnError, DataPathError, DataPathUnavailable
from sglang_mm_conn.core.layout import Extent, Geometry
from sglang_mm_conn.core.messages import Memory
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.core.states import Poll
from sglang_mm_conn.datapath.base import DataPath, WriteLink
from sglang_mm_conn.datapath.factory import encoder_data_paths
from sglang_mm_conn.memory.results import PrivateResult, SharedResult
from tests.connector.payload import Part, plain
from tests.soak.drivers import EncoderDriver, LanguageDriver
from tests.soak.plan import Plan

_PR_SET_PDEATHSIG = 1
_CLONE_NEWNET = 0x40000000


# -- what an encoder's data calls do ---------------------------------------------------------------------------------


@dataclass
class Gate:
    """What happens to one data call: ``hold`` it half-way, ``hold_written`` when all bytes are in place but the call
    has not returned, or end it ``in_doubt``, ``not_in_doubt`` or ``unexpected``.

    An error comes after half of the bytes are in place.
    """

    action: str
    rank: int | None
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


class Gates:
    """Knows which room a data call belongs to (by the memory that it reads), counts, and stops it where asked to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._gates: dict[tuple[str, int], Gate] = {}
        self._sources: dict[str, torch.Tensor] = {}
        self._windows: Counter[tuple[str, int]] = Counter()
        self.calls: list[dict[str, Any]] = []

    def add_source(self, room: str, tensor: torch.Tensor) -> None:
        with self._lock:
            self._sources[room] = tensor

    def forget(self, room: str) -> None:
        """Drop all that is kept of ``room``; its data calls that are held go on."""
        with self._lock:
            self._sources.pop(room, None)
            for key in [key for key in self._gates if key[0] == room]:
                self._gates.pop(key).released.set()
            for key in [key for key in self._windows if key[0] == room]:
                del self._windows[key]
            self.calls = [call for call in self.calls if call["room"] != room]

    def set(self, room: str, window: int, action: str, rank: int | None) -> None:
        with self._lock:
            self._gates[room, window] = Gate(action, rank)

    def gate(self, room: str, window: int) -> Gate:
        with self._lock:
            return self._gates[room, window]

    def _enter(self, source: torch.Tensor, runs: Sequence[Extent], path: str, rank: int) -> Gate | None:
        at = source.data_ptr()
        with self._lock:
            rooms = [
                room
                for room, tensor in self._sources.items()
                if 0 <= at - tensor.data_ptr() < tensor.numel() * tensor.element_size()
            ]
            if not rooms:
                return None
            room = rooms[0]
            window = self._windows[room, rank]
            self._windows[room, rank] += 1
            self.calls.append(
                {
                    "room": room,
                    "window": window,
                    "rank": rank,
                    "bytes": sum(run.length for run in runs),
                    "thread": threading.current_thread().name,
                    "path": path,
                }
            )
            gate = self._gates.get((room, window))
            return gate if gate is not None and gate.rank in (None, rank) else None

    def write(self, link: WriteLink, rank: int, source: torch.Tensor, runs: Sequence[Extent]) -> None:
        gate = self._enter(source, runs, link.name, rank)
        if gate is None:
            link.write(source, runs)
            return
        first, second = cut(runs)
        link.write(source, first)
        if gate.action == "hold_written":
            link.write(source, second)
            gate.reached.set()
            gate.released.wait()
            return
        gate.reached.set()
        if gate.action == "unexpected":
            raise RuntimeError("the data call went mad")
        if gate.action in ("in_doubt", "not_in_doubt"):
            raise DataPathError("the data call was told to fail", in_doubt=gate.action == "in_doubt")
        gate.released.wait()
        link.write(source, second)


def cut(runs: Sequence[Extent]) -> tuple[list[Extent], list[Extent]]:
    """Both halves of a window."""
    first: list[Extent] = []
    second: list[Extent] = []
    middle = runs[0].start + sum(run.length for run in runs) // 2
    for run in runs:
        head = min(max(middle - run.start, 0), run.length)
        if head:
            first.append(Extent(run.region, run.offset, head, run.start))
        if head < run.length:
            second.append(Extent(run.region, run.offset + head, run.length - head, run.start + head))
    return first, second


class GatedLink:
    """A link whose writes pass the gates."""

    def __init__(self, link: WriteLink, gates: Gates, rank: Callable[[], int]) -> None:
        """``rank``: which one it leads to; asked at each write."""
        self.name = link.name
        self.synchronous = link.synchronous
        self._link = link
        self._gates = gates
        self._rank = rank

    def write(self, source: torch.Tensor, runs: Sequence[Extent]) -> None:
        self._gates.write(self._link, self._rank(), source, runs)

    def close(self) -> None:
        self._link.close()


class GatedPath:
    """A data path whose links pass the gates; ``refusal`` makes it impossible, ``tamper`` presents another segment."""

    def __init__(
        self, path: DataPath, gates: Gates, rank_of: Callable[[str], int], refusal: str = "", tamper: bool = False
    ) -> None:
        """``rank_of``: by the incarnation of a language rank's process."""
        self.name = path.name
        self._rank_of = rank_of
        self._path = path
        self._gates = gates
        self._refusal = refusal
        self._tamper = tamper

    def open(self, memory: Memory, geometry: Geometry, incarnation: str) -> GatedLink:
        if self._refusal:
            raise DataPathUnavailable(self._refusal)
        if self._tamper:
            memory = msgspec.structs.replace(memory, nonce="0" * 32)
        return GatedLink(
            self._path.open(memory, geometry, incarnation), self._gates, partial(self._rank_of, incarnation)
        )

    def close(self) -> None:
        self._path.close()


# -- the two roles ---------------------------------------------------------------------------------------------------


def process_stats() -> dict[str, int]:
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return {
        "fds": len(os.listdir("/proc/self/fd")) - 1,
        "threads": int(lines["Threads"]),
        "rss_kb": int(lines["VmRSS"].split()[0]),
    }


def hold_more(kind: str, held: list[Any]) -> None:
    """What a leak does, for tests that want to see one found."""
    if kind == "memory":
        held.append(bytearray(b"x") * (96 << 20))
    elif kind == "descriptors":
        held.extend(socket.socket() for _ in range(20))
    else:
        raise ValueError(kind)


def connector_threads() -> list[str]:
    """Names of the connector's threads that live."""
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("mm-conn"))


class WorkersMove(Runtime):
    """Every write is a worker's, every copy-out a copier's: one that is held at a gate must not hold the control
    thread."""

    inline_limit_bytes = uncontended_inline_limit_bytes = 0


class EncoderRole:
    """Every public method is a command."""

    def __init__(self, config: dict[str, Any]) -> None:
        settings = Settings(**config["settings"])
        self._config = config
        self._gates = Gates()
        self._limit = settings.max_metadata_bytes
        self._ended: dict[str, Ended] = {}
        self._wrong_bytes = False
        self._held: list[Any] = []
        self._endpoint = self._new_endpoint()
        self._advertised: int | None = None
        self._bootstrap = StandaloneBootstrap(config["host"], config["port"], self._info)

    def _new_endpoint(self) -> EncoderEndpoint:
        config = self._config
        settings = Settings(**config["settings"])
        refusals, tamper = config["refusals"], config["tamper"]
        paths: dict[str, DataPath] = {
            name: GatedPath(path, self._gates, self._rank_of, refusals.get(name, ""), name in tamper)
            for name, path in encoder_data_paths(settings, config["host"]).items()
        }
        return EncoderEndpoint(
            settings,
            host=config["host"],
            dtype=config["dtype"],
            widest_row_bytes=config["row_bytes"],
            send_timeout=config["send_timeout"],
            data_paths=paths,
            runtime=Runtime() if config["inline"] else WorkersMove(),
        )

    def _rank_of(self, incarnation: str) -> int:
        sessions = list(self._endpoint.core.sessions.values())
        return next((session.rank for session in sessions if session.incarnation == incarnation), -1)

    def restart(self) -> dict[str, Any]:
        """Another incarnation behind the same HTTP port, which answers all the time: a restart that nobody sees."""
        old, self._endpoint = self._endpoint, self._new_endpoint()
        old.close()
        return self.hello()

    def _info(self) -> tuple[BootstrapInfo, DeploymentKey | None]:
        info, key = self._endpoint.bootstrap_info
        if self._advertised is None:
            return info, key
        return BootstrapInfo(info.version, [Worker(info.workers[0].incarnation, self._advertised)]), key

    def hello(self) -> dict[str, Any]:
        worker = self._endpoint.bootstrap_info[0].workers[0]
        return {"url": self._bootstrap.url, "incarnation": worker.incarnation, "control_port": worker.control_port}

    def advertise(self, control_port: int) -> None:
        """Send language ranks to another control port: that of a proxy."""
        self._advertised = control_port

    def announce(self, **part: Any) -> None:
        item = Part(**part)
        self._endpoint.announce(
            item.room, item.tokens, item.row_bytes, item.dtype, lambda ended: self._ended.update({item.room: ended})
        )

    def send(self, **part: Any) -> None:
        item = Part(**part)
        payload = item.payload()
        payload[-1] ^= self._wrong_bytes
        tensor = torch.from_numpy(payload).view(dtype_of(item.dtype)).reshape(item.tokens, item.width)
        values = {
            key: torch.from_numpy(value) if hasattr(value, "shape") else value for key, value in item.values().items()
        }
        self._gates.add_source(item.room, tensor)
        self._endpoint.add_transfer_request(item.room, tensor, encode_metadata(values, self._limit))

    def harm(self, kind: str) -> None:
        """Do what must never happen."""
        if kind == "thread":
            self._endpoint._control.stop()
        elif kind == "bytes":
            self._wrong_bytes = True
        else:
            hold_more(kind, self._held)

    def fail(self, room: str, reason: str, code: int) -> None:
        self._endpoint.fail(room, reason, code)

    def ended(self, room: str) -> dict[str, Any] | None:
        ended = self._ended.get(room)
        if ended is None:
            return None
        names = ("room", "success", "reason", "code", "peer")
        return {name: getattr(ended, name) for name in names}

    def gate(self, room: str, window: int, action: str, rank: int | None = None) -> None:
        self._gates.set(room, window, action, rank)

    def reached(self, room: str, window: int) -> bool:
        return self._gates.gate(room, window).reached.is_set()

    def release(self, room: str, window: int) -> None:
        self._gates.gate(room, window).released.set()

    def calls(self, room: str) -> list[dict[str, Any]]:
        return [call for call in self._gates.calls if call["room"] == room]

    def forget(self, room: str) -> None:
        """Drop what the test keeps of a room (the connector keeps nothing)."""
        self._gates.forget(room)
        self._ended.pop(room, None)

    def soak(self, plan: dict[str, Any], index: int) -> None:
        """Begin this encoder's part of a soak."""
        logging.getLogger().setLevel(logging.ERROR)  # rooms that are given up are warnings
        self._driver = EncoderDriver(self._endpoint, Plan(**plan), index)
        self._driver.start()

    def soak_report(self) -> dict[str, Any]:
        return self._driver.report()

    def room(self, room: str) -> dict[str, Any] | None:
        endpoint = self._endpoint
        with endpoint._lock:
            entry = endpoint.core.rooms.get(room)
            if entry is None:
                return None
            return {
                "state": entry.state.value,
                "queue_idx": entry.queue_idx,
                "infos": {
                    session: {"state": info.state.value, "window": info.window, "sent_tokens": info.sent_tokens}
                    for session, info in entry.transfer_infos.items()
                },
            }

    def stats(self) -> dict[str, Any]:
        endpoint = self._endpoint
        with endpoint._lock:
            tables = {
                "rooms": len(endpoint.core.rooms),
                "sessions": len(endpoint.core.sessions),
                "peers": len(endpoint._peers),
                "links": len(endpoint._links),
                "sources": len(endpoint._sources),
                "listeners": len(endpoint._actions.listeners),
                "tombstones": len(endpoint.core.tombstones),
                "queued": sum(queue.qsize() for queue in endpoint.transfer_queues),
            }
        return {**tables, **process_stats()}

    def threads(self) -> list[str]:
        return connector_threads()

    def close(self) -> None:
        self._endpoint.close()
        self._bootstrap.close()


class RankRole:
    """What language ranks of either kind answer. Every public method is a command."""

    def __init__(self, config: dict[str, Any], endpoint: LanguageEndpoint | FollowerEndpoint) -> None:
        self._limit = Settings(**config["settings"]).max_metadata_bytes
        self._rank = endpoint

    def expect(self, room: str, url: str, timeout: float) -> None:
        self._rank.expect(room, url, timeout, "test")

    def poll(self, room: str) -> int:
        return int(self._rank.poll(room))

    def outcome(self, room: str) -> dict[str, Any]:
        outcome = self._rank.outcome(room)
        return {"reason": outcome.reason, "code": outcome.code}

    def take(self, room: str) -> dict[str, Any]:
        tensor, raw = self._rank.take(room)
        return {
            "crc": zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy()),
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "metadata": {key: plain(value) for key, value in decode_metadata(raw, self._limit).items()},
        }

    def abort(self, room: str, reason: str) -> None:
        self._rank.abort(room, reason)

    def forget(self, room: str) -> None:
        self._rank.forget(room)

    def threads(self) -> list[str]:
        return connector_threads()

    def close(self) -> None:
        self._rank.close()


class FollowerRole(RankRole):
    """A rank that reads what the leader of its host received."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._follower = FollowerEndpoint(
            Settings(**config["settings"]), rank=config["rank"], host_index=config["host_index"]
        )
        super().__init__(config, self._follower)

    def hello(self) -> dict[str, Any]:
        return {}

    def stats(self) -> dict[str, int]:
        return {"rooms": len(self._follower._rooms), **process_stats()}


class LanguageRole(RankRole):
    """A rank that receives."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._endpoint = LanguageEndpoint(
            Settings(**config["settings"]),
            server=config["server"],
            host=config["host"],
            dtype=config["dtype"],
            widest_row_bytes=config["row_bytes"],
            rank=config["rank"],
            size=config["size"],
            make_result=partial(SharedResult, host_index=config["rank"]) if config["leads"] else PrivateResult,
            runtime=Runtime() if config["inline"] else WorkersMove(),
        )
        super().__init__(config, self._endpoint)
        self._history: dict[str, list[int]] = {}
        self._held: list[Any] = []
        threading.Thread(target=self._watch, name="history", daemon=True).start()

    def _watch(self) -> None:
        while True:
            for room, seen in list(self._history.items()):
                try:
                    state = int(self._endpoint.poll(room))
                except ConnError:
                    continue  # forgotten meanwhile
                if not seen or seen[-1] != state:
                    seen.append(state)
            time.sleep(0.001)

    def hello(self) -> dict[str, Any]:
        segment = self._endpoint.pool.segment
        return {"segment": "" if segment is None else segment.name, "incarnation": self._endpoint.incarnation}

    def use_encoder(self, url: str) -> None:
        self._endpoint.use_encoder(url)

    def processes(self) -> list[dict[str, Any]]:
        """The encoder processes that this rank knows."""
        return [
            {"incarnation": process.incarnation, "ready": process.ready, "path": process.path}
            for process in list(self._endpoint._encoders.registrations.processes.values())
        ]

    def watch(self, room: str) -> None:
        """Keep the history of what poll answers (many threads of one process slow each other down: only on demand)."""
        self._history[room] = []

    def history(self, room: str) -> list[int]:
        return self._history[room]

    def forget(self, room: str) -> None:
        self._history.pop(room, None)
        super().forget(room)

    def harm(self, kind: str) -> None:
        """Do what must never happen."""
        if kind == "thread":
            self._endpoint._control.stop()
        else:
            hold_more(kind, self._held)

    def soak(self, plan: dict[str, Any], index: int, urls: list[str]) -> None:
        """Begin this language server's part of a soak."""
        logging.getLogger().setLevel(logging.ERROR)  # rooms that are given up are warnings
        self._driver = LanguageDriver(self._endpoint, Plan(**plan), index, urls)
        self._driver.start()

    def soak_report(self) -> dict[str, Any]:
        return self._driver.report()

    def room(self, room: str) -> dict[str, Any] | None:
        with self._endpoint._lock:
            entry = self._endpoint.core.rooms.get(room)
            if entry is None:
                return None
            return {
                "state": entry.state.value,
                "window": entry.window,
                "sent_tokens": entry.sent_tokens,
                "allocated_tokens": entry.allocated_tokens,
                "blocks": list(entry.blocks),
            }

    def quarantine(self) -> list[int]:
        """The quarantined blocks."""
        with self._endpoint._lock:
            return sorted(block for held in self._endpoint.core.quarantine.values() for block in held.blocks)

    def take_blocks(self, count: int) -> list[int]:
        """Take blocks as another tenant would, so that the free ones lie in pieces."""
        with self._endpoint._lock:
            return self._endpoint.core.allocator.allocate("test", count)

    def give_blocks(self, blocks: list[int]) -> None:
        endpoint = self._endpoint
        with endpoint._lock:
            endpoint.core.allocator.release("test", blocks)
            endpoint._perform(endpoint.core._serve_waiting(time.monotonic()))

    def stats(self) -> dict[str, Any]:
        endpoint = self._endpoint
        core = endpoint.core
        with endpoint._lock:
            core.allocator.check_integrity()
            tables = {
                "blocks": core.allocator.blocks,
                "free": core.allocator.free_count,
                "held": core.allocator.held_count,
                "quarantined": core.allocator.quarantined_count,
                "rooms": len(core.rooms),
                "unclaimed": len(core.unclaimed),
                "quarantine": len(core.quarantine),
                "tombstones": len(core.tombstones),
                "results": len(endpoint._results),
                "labels": len(endpoint._labels),
                "processes": len(endpoint._encoders.registrations.processes),
            }
        return {**tables, **process_stats()}

    def check_integrity(self) -> None:
        with self._endpoint._lock:
            self._endpoint.core.check_integrity()


ROLES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "encoder": EncoderRole,
    "language": LanguageRole,
    "follower": FollowerRole,
}


# -- the processes around them ---------------------------------------------------------------------------------------


def serve(role: str, config: dict[str, Any], commands: socket.socket) -> None:
    """One process under test: answer commands until the other end closes."""
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(threadName)s %(levelname)s %(message)s")
    torch.set_num_threads(1)
    answers = commands.makefile("w")
    subject: Any = None
    for line in commands.makefile("r"):
        request = json.loads(line)
        try:
            if request["do"] == "start":
                subject = ROLES[role](config)
                result = subject.hello()
            else:
                result = getattr(subject, request["do"])(**request["args"])
            answer = {"result": result}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def die_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def enter_network(namespace: str) -> None:
    """CopyOut this thread, and those that it starts, into the network namespace at this path. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(namespace) as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"network namespace {namespace} cannot be entered")


def main() -> None:
    """Fork a process per request ``{"role", "config", "env", "network"}`` with two descriptors: its commands, its log.

    ``network``: path of the network namespace that it lives in; empty: this one's.
    """
    die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    requests = socket.socket(fileno=int(sys.argv[1]))
    Poll(4)  # everything is imported
    while True:
        raw, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 2)
        if not raw:
            return
        request = json.loads(raw)
        pid = os.fork()
        if pid == 0:
            requests.close()
            die_with_parent()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(descriptors[1], 1)
            os.dup2(descriptors[1], 2)
            os.close(descriptors[1])
            os.environ.update(request["env"])
            try:
                if request["network"]:
                    enter_network(request["network"])
                serve(request["role"], request["config"], socket.socket(fileno=descriptors[0]))
            finally:
                os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
        requests.send(str(pid).encode())


if __name__ == "__main__":
    main()
