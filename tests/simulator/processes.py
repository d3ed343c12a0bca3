"""Simulated encoder and language processes: the real endpoints on a simulated runtime."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import msgspec
import torch

from sglang_mm_conn.connector.encoder.endpoint import EncoderEndpoint
from sglang_mm_conn.connector.encoder.transfer import DataCall
from sglang_mm_conn.connector.language.endpoint import LanguageEndpoint
from sglang_mm_conn.connector.runtime import Runtime
from sglang_mm_conn.control.bootstrap import BootstrapInfo, EncoderAbsent
from sglang_mm_conn.control.thread import ControlCallbacks
from sglang_mm_conn.core.layout import Geometry
from sglang_mm_conn.core.outcomes import LANDED, WriteResult, WriteStatus
from sglang_mm_conn.core.rooms import new_id
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.datapath.base import ReceivePath
from sglang_mm_conn.datapath.mooncake.exposure import MooncakeReceivePath
from sglang_mm_conn.datapath.mooncake.revocation import Revocation
from sglang_mm_conn.datapath.shm import ShmReceivePath
from sglang_mm_conn.memory.pool import BlockPool
from tests.core.harness import written
from tests.simulator.memory import SimulatedEngine, SimulatedPath, SimulatedSegment, Write
from tests.simulator.network import Network, SimulatedClient, SimulatedServer
from tests.simulator.scheduler import Kernel, Process, SimulatedExecutor, Violation

ROW_BYTES = 8
DTYPE = "float32"
SEND_TIMEOUT = 300.0


class World:
    """All processes of one schedule and what they share."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.network = Network(kernel)
        self.encoders: dict[str, EncoderProcess] = {}  # by URL: the newest process there
        self.languages: list[LanguageProcess] = []
        self.others: list[Process] = []
        self.segments: dict[str, SimulatedSegment] = {}
        self.owners_by_target: dict[str, LanguageProcess] = {}  # also of engines that are no more
        self.engines_by_target: dict[str, weakref.ref[SimulatedEngine]] = {}  # by target
        self.writes: list[Write] = []  # data calls under way
        self.late: list[Write] = []  # ended in doubt: their bytes may still land
        self.queue_of: dict[tuple[EncoderProcess, str], int] = {}  # by room: the transfer queue that serves it
        self.written_inline = 0  # data calls
        self.numbers = itertools.count(20000)
        self.over = False  # the schedule was broken off

    def processes(self) -> list[Process]:
        return [*self.encoders.values(), *self.languages, *self.others]


class SimulatedRuntime(Runtime):
    """What an endpoint lives on, simulated."""

    def __init__(self, world: World, process: EncoderProcess | LanguageProcess) -> None:
        self._world = world
        self._process = process
        self._kernel = world.kernel
        # None, some (up to three rows), or all windows. An encoder that writes them at once is frozen and killed only
        # between its writes: many of them write none so.
        sizes = [0, 0, 24, 1 << 20] if isinstance(process, EncoderProcess) else [0, 24, 1 << 20]
        self.inline_limit_bytes = world.kernel.chance.choice(sizes)
        self.uncontended_inline_limit_bytes = max(self.inline_limit_bytes, world.kernel.chance.choice(sizes))
        self.view_least_bytes = world.kernel.chance.choice([1, 1 << 20])

    def clock(self) -> float:
        return self._kernel.now

    def start_thread(self, target: Callable[[], None], name: str) -> Any:
        """Control threads and transfer workers are played by the kernel."""

    def executor(self, threads: int, name: str) -> Executor:
        return SimulatedExecutor(self._kernel, self._process, threads)

    def control_server(self, host: str, callbacks: ControlCallbacks, **_: Any) -> Any:
        return SimulatedServer(self._world.network, self._process, next(self._world.numbers), callbacks)

    def control_client(self, callbacks: ControlCallbacks, **_: Any) -> Any:
        return SimulatedClient(self._world.network, self._process, callbacks)

    def look_up(self, encoder_url: str, key: Any, *, insecure: bool) -> BootstrapInfo:
        encoder = self._world.encoders[encoder_url]
        if encoder.dead:
            raise EncoderAbsent("refused", refused=True)
        if not encoder.answers_look_ups and not self._world.network.reaches(self._process, encoder):
            raise EncoderAbsent("timed out", refused=False, silent=True)
        return encoder.look_up_answer()

    def pool(self, geometry: Geometry, *, shared: bool, memory_device: str) -> BlockPool:
        pool = BlockPool(geometry, shared=False)
        assert isinstance(self._process, LanguageProcess)
        pool.segment = self._process.segment  # type: ignore[assignment]
        return pool

    def reserve_port(self) -> tuple[int, Callable[[], None]]:
        return next(self._world.numbers), lambda: None

    def receive_paths(self, settings: Settings, host: str, pool: BlockPool) -> dict[str, ReceivePath]:
        """The real ones, on simulated memory."""
        process = self._process
        assert isinstance(process, LanguageProcess)

        def make_engine() -> SimulatedEngine:
            return SimulatedEngine(process, next(self._world.numbers), self._world.engines_by_target)

        assert pool.segment is not None
        return {
            "shm": ShmReceivePath(pool.segment, host, self.reserve_port),
            "mooncake": MooncakeReceivePath(make_engine, host, pool.regions),
        }


class EncoderProcess(Process):
    """One life of an encoder at ``url``.

    Attributes:
        draining: whether it says that it takes no new work.
        prefix_cache: whether it says that it keeps embeddings.
        answers_look_ups: whether its HTTP server answers them even while this process is frozen or cut off.
    """

    def __init__(self, world: World, name: str, url: str, host: int, settings: Settings) -> None:
        super().__init__(name)
        self.world = world
        self.url = url
        self.host = host
        self.busy: Counter[int] = Counter()  # transfer queue -> workers in a data call
        self.handing_over = False
        self.draining = self.prefix_cache = self.answers_look_ups = False
        self.endpoint = EncoderEndpoint(
            settings, host="127.0.0.1", dtype=DTYPE, widest_row_bytes=ROW_BYTES, send_timeout=SEND_TIMEOUT,
            data_paths={"shm": SimulatedPath("shm", self), "mooncake": SimulatedPath("mooncake", self)},
            runtime=SimulatedRuntime(world, self),
        )  # fmt: skip
        # The data calls that it makes itself: their pieces land in the simulated memory.
        self.endpoint.transfer.data_call = self.write_inline  # type: ignore[method-assign]
        self.http = world.kernel.lane(self, width=100)
        world.encoders[url] = self

    def tick(self) -> None:
        self.endpoint._on_tick()
        for entry in self.endpoint.core.rooms.values():
            if not entry.machine.final and entry.deadline < self.world.kernel.now:
                raise Violation(f"room {entry.room} outlived its deadline on {self.name}")

    def look_up_answer(self) -> BootstrapInfo:
        info, _ = self.endpoint.bootstrap_info
        if not self.draining and not self.prefix_cache:
            return info
        return msgspec.structs.replace(info, draining=self.draining, prefix_cache=self.prefix_cache)

    def hand_over(self, room: str, embedding: torch.Tensor, metadata: bytes) -> None:
        """The model has computed the embedding; its thread writes no large one."""
        self.handing_over = True
        try:
            self.endpoint.add_transfer_request(room, embedding, metadata)
        finally:
            self.handing_over = False

    def idle_queues(self) -> list[int]:
        """Transfer queues with work and a worker for it."""
        per_queue = self.endpoint.settings.workers_per_queue
        return [
            index
            for index, waiting in enumerate(self.endpoint.transfer_queues)
            if not waiting.empty() and self.busy[index] < per_queue
        ]

    def take_chunk(self, index: int) -> None:
        """A transfer worker takes a chunk and begins its data call."""
        chunk = self.endpoint.transfer_queues[index].get_nowait()
        assert chunk is not None
        self._begin(chunk.room, index)

    def _begin(self, room: str, index: int) -> None:
        while (call := self.endpoint.transfer.begin_window(room)) is not None:
            if call.link is not None:
                self._only_one(room)
                if index != self.world.queue_of.setdefault((self, room), index):
                    raise Violation(f"room {room} is served by two transfer queues")
                self.world.writes.append(Write(call, self, index))
                self.busy[index] += 1
                return
            self.endpoint.transfer.end_window(call, written(call.refusal))

    def _only_one(self, room: str) -> None:
        if any(write.room == room and write.encoder is self for write in self.world.writes):
            raise Violation(f"two data calls for {room} at once")

    def write_inline(self, call: DataCall) -> WriteResult:
        """The control thread, or whoever handed the embedding over, makes the data call, which is over before anything
        else happens."""
        if call.link is None:
            return WriteResult(WriteStatus.FAILED, call.refusal)
        self._only_one(call.write.room)
        if not call.link.synchronous:
            raise Violation(f"{call.write.room} is written inline over {call.link.name}, which may wait for others")
        transfer = self.endpoint.transfer
        most = transfer._inline_limit_bytes if self.handing_over else transfer._uncontended_inline_limit_bytes
        if call.write.tokens * call.entry.row_bytes > most:
            raise Violation(f"{call.write.room}: a window of {call.write.tokens} rows is written inline")
        write = Write(call, self, -1)
        while write.pieces:
            write.land()
        write.returned()
        self.world.written_inline += 1
        return LANDED

    def write_returns(self, write: Write, error: str = "", in_doubt: bool = False) -> None:
        """The data call returns; the worker looks for the room's next window."""
        self.world.writes.remove(write)
        write.returned()
        if in_doubt:
            self.world.late.append(write)
        self.busy[write.queue] -= 1
        self.endpoint.transfer.end_window(write.call, written(error, in_doubt))
        self._begin(write.room, write.queue)

    def kill(self) -> None:
        self.dead = True
        for write in [one for one in self.world.writes if one.encoder is self]:
            self.world.writes.remove(write)
            write.returned()
            if not write.link.synchronous:
                self.world.late.append(write)  # what is in its host's sockets
        self.world.network.process_ended(self)


class LanguageProcess(Process):
    """One rank of one life of a language server."""

    def __init__(
        self, world: World, name: str, host: int, settings: Settings, *, server: str, rank: int, size: int, dtype: str
    ) -> None:
        super().__init__(name)
        self.world = world
        self.host = host
        self.server = server
        self.fits = dtype == DTYPE
        self.segment = SimulatedSegment(self, f"segment-{next(world.numbers)}")
        world.segments[self.segment.name] = self.segment
        self.endpoint = LanguageEndpoint(
            settings, server=server, host="10.0.0.9", dtype=dtype, widest_row_bytes=ROW_BYTES, rank=rank, size=size,
            runtime=SimulatedRuntime(world, self),
        )  # fmt: skip
        path = self.endpoint._sessions.paths["mooncake"]
        assert isinstance(path, MooncakeReceivePath)
        self.engines = path._engines
        self.endpoint.completions.close()  # nobody waits on it here
        self.scheduler = world.kernel.lane(self, width=100)
        world.languages.append(self)

    @property
    def revocation(self) -> Revocation:
        (only,) = self.endpoint.revocations
        assert isinstance(only, Revocation)
        return only

    def tick(self) -> None:
        self.endpoint._on_tick()
        self.endpoint.core.check_integrity()
        for entry in self.endpoint.core.rooms.values():
            if not entry.machine.final and entry.deadline < self.world.kernel.now:
                raise Violation(f"room {entry.room} outlived its deadline on {self.name}")

    def kill(self) -> None:
        self.dead = True
        self.engines.clear()
        self.world.network.process_ended(self)


def new_server() -> str:
    return new_id()
