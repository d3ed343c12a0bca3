"""A Mooncake engine of our own, and a path with memory to write into."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable

import torch

from sglang_mm_conn.core.layout import Geometry
from sglang_mm_conn.core.messages import MooncakeMemory
from sglang_mm_conn.datapath.mooncake.staging import Staging
from sglang_mm_conn.datapath.mooncake.writer import (
    BATCHES,
    MooncakeLink,
    MooncakePath,
)
from sglang_mm_conn.memory.device import Device

SESSION = "10.0.0.1:17001"
WRITERS = 4
SLOTS = WRITERS * BATCHES
# What the engine says in place of a batch's number, by what a test asks for.
REFUSED, REFUSED_WITH_A_CODE = 1 << 20, 1 << 21
REFUSALS = {REFUSED: 0, REFUSED_WITH_A_CODE: (1 << 64) - 101}


class FakeEngine:
    """Does what the real one would, in this process, as late as it may: it reads the staging memory when it is asked
    for the status of a batch. ``codes`` are the statuses of the next batches; an exception is raised at their
    beginning, one of ``REFUSALS`` is a batch that gets no number."""

    def __init__(self) -> None:
        self.registered: list[tuple[int, int]] = []
        self.batches: list[list[tuple[int, int, int]]] = []
        self.sessions: list[str] = []
        self.codes: list[int | Exception] = []
        self.register_code = 0
        self.during: Callable[[], object] | None = None  # called once, while a batch is waited for
        self.events: list[str] = []
        self.most_pieces = 0
        self._under_way: dict[int, int] = {}  # code by number, which counts from 1
        self._lock = threading.Lock()

    def register_memory(self, address: int, length: int) -> int:
        self.registered.append((address, length))
        return self.register_code

    def batch_transfer_async_write(
        self, session: str, sources: list[int], targets: list[int], lengths: list[int]
    ) -> int:
        with self._lock:
            self.sessions.append(session)
            self.batches.append(list(zip(sources, targets, lengths, strict=True)))
            number = len(self.batches)
            self.events.append(f"begin {number}")
            code = self.codes.pop(0) if self.codes else 0
            if isinstance(code, Exception):
                raise code
            if code in REFUSALS:
                return REFUSALS[code]
            self._under_way[number] = code
            self.most_pieces = max(self.most_pieces, sum(len(self.batches[one - 1]) for one in self._under_way))
            return number

    def get_batch_transfer_status(self, numbers: list[int]) -> int:
        [number] = numbers
        during, self.during = self.during, None
        if during is not None:
            during()
        time.sleep(0)
        with self._lock:
            code = self._under_way.pop(number)  # KeyError where the real one would crash
            if code == 0:
                for source, target, length in self.batches[number - 1]:
                    assert any(start <= source and source + length <= start + size for start, size in self.registered)
                    ctypes.memmove(target, source, length)
            self.events.append(f"end {number}")
            return code

    @property
    def under_way(self) -> int:
        return len(self._under_way)


class Bed:
    """A path, its engines, and memory to write into."""

    def __init__(
        self, geometry: Geometry, staging_bytes: int = 4096, device: Device | None = None, memory_device: str = "cpu"
    ) -> None:
        self.geometry = geometry
        self.engines: list[FakeEngine] = []
        self.codes: list[int | Exception] = []
        self.path = MooncakePath(self.make, staging_bytes, WRITERS, device, memory_device)
        self.regions = [torch.zeros(geometry.region_bytes, dtype=torch.uint8) for _ in range(geometry.regions)]

    def make(self) -> FakeEngine:
        self.engines.append(FakeEngine())
        self.engines[-1].codes = list(self.codes)
        return self.engines[-1]

    def open(self, incarnation: str = "1", session: str = SESSION) -> MooncakeLink:
        memory = MooncakeMemory(target=session, addresses=[region.data_ptr() for region in self.regions])
        return self.path.open(memory, self.geometry, incarnation)

    def link(self) -> tuple[MooncakeLink, FakeEngine, Staging]:
        link = self.open()
        return link, self.engines[0], self.path._engines[0].staging

    def received(self, blocks: list[int], nbytes: int) -> torch.Tensor:
        whole = torch.cat(self.regions).reshape(self.geometry.blocks, -1)
        return whole[blocks].reshape(-1)[:nbytes]
