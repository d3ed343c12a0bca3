"""The encoder's half of the Mooncake path: engines shared by all links, rows leave through registered staging memory.

What was measured of the engine (0.3.13) and decides this module:

- every slice of a batch costs about 50 us, whatever its size: contiguous blocks come merged;
- over TCP a batch of one large slice takes up to five times as long as the same bytes in several, which travel side by
  side (16 MiB in batches of 4 MiB: 121 ms in slices of 4 MiB, 25 in 1 MiB, 22 in 256 KiB; 19 without
  staging): large slices are cut;
- the status of a batch is asked for exactly once (a second time crashes), also when another has failed, so that none
  is under way when its engine is destroyed. Beside a peer that hangs or dies, that of the second follows the first's
  within milliseconds. (By its source, the engine repeats a failed batch of the synchronous call only, once for each
  RDMA device; a failed slice takes another path in either.);
- more than about 2048 slices outstanding to one peer can wedge the link for ever: at most 1024 here, by batch;
- after a non-zero return bytes may still land: such an error is ``in_doubt``, and the engine is given up;
- a peer that comes back on the same session id cannot be reached through an engine that knew its predecessor: it is
  served through another engine.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from sglang_mm_conn.core.errors import DataPathError, DataPathUnavailable, MemoryUnavailable
from sglang_mm_conn.core.layout import Extent, Geometry
from sglang_mm_conn.core.messages import Memory, MooncakeMemory
from sglang_mm_conn.datapath.mooncake.engine import EngineFactory, register_memory
from sglang_mm_conn.datapath.mooncake.semaphore import FairSemaphore
from sglang_mm_conn.datapath.mooncake.staging import Staging
from sglang_mm_conn.memory.device import Device

logger = logging.getLogger(__name__)

BATCHES = 2  # on their way to one peer at the same time: one on the wire while the next is copied
MAX_SLICES = 1024 // BATCHES  # in a batch
SLICE_BYTES = 256 << 10
# 0.3.13 says 0 where it refuses a batch, its source has other codes below zero too; asking for such a batch crashes.
_NO_NUMBER = 1 << 63


class _Engine:
    """One engine with its staging, the sessions it has contacted, and the writes that go through it now.

    After a write that failed, what the engine still does with the staging memory is unknown. So no further write
    begins (``retired``), and when the last one has returned the engine is destroyed, which closes its connections:
    only then is its memory given back. Other links go on through another engine.
    """

    def __init__(self, engine: Any, staging: Staging, only: str = "") -> None:
        self.engine = engine
        self.only = only  # the one target that it serves, if it is not for all
        self.staging = staging
        try:
            register_memory(engine, staging.memory)
        except MemoryUnavailable:
            staging.close()
            raise
        self.known: dict[str, str] = {}
        self.writes = 0
        self.retired = False


class MooncakeLink:
    """Writes to one session, through whichever of the path's engines can reach it."""

    name = "mooncake"
    synchronous = False

    def __init__(self, path: MooncakePath, memory: MooncakeMemory, incarnation: str) -> None:
        self._path = path
        self._memory = memory
        self._incarnation = incarnation
        self._permits = FairSemaphore(BATCHES)  # slices outstanding to one peer count over all threads
        self._one_waits = threading.Lock()  # the engine keeps a core busy with it: not one for each thread

    def write(self, source: torch.Tensor, extents: Sequence[Extent]) -> None:
        under_way: deque[ExitStack] = deque()  # oldest first
        try:
            for slices in _batches(extents, self._path.slot_bytes):
                # Never wait for a permit while holding one: two writers could wait for each other.
                while not self._permits.acquire(wait=not under_way):
                    under_way.popleft().close()
                batch = ExitStack()
                batch.enter_context(self._batch(source, slices))
                under_way.append(batch)
        finally:
            with ExitStack() as rest:  # every one of them, whatever becomes of the others
                for batch in reversed(under_way):
                    rest.callback(batch.close)

    @contextmanager
    def _batch(self, source: torch.Tensor, slices: Sequence[Extent]) -> Iterator[None]:
        """One batch, on its way inside, complete at the end. Releases the caller's permit."""
        try:
            # Each batch may go through another engine: they are complete, or not, independently.
            with self._path.engine_for(self._memory.target, self._incarnation) as entry:
                slot = entry.staging.take()
                entry.staging.fill(slot, source, slices)
                number = self._begin(entry.engine, slot, slices)
                code = -1
                if 0 < number < _NO_NUMBER:
                    yield
                    with self._one_waits:
                        code = entry.engine.get_batch_transfer_status([number])
                if code != 0:
                    raise DataPathError(f"Mooncake write of {len(slices)} slices returned {code}", in_doubt=True)
                entry.staging.give_back(slot)
        finally:
            self._permits.release()

    def _begin(self, engine: Any, slot: torch.Tensor, slices: Sequence[Extent]) -> int:
        """The batch's number; 0 or a negative code, as it may be without its sign, where the engine has refused it."""
        at, addresses, targets, lengths = 0, [], [], []
        for slice_ in slices:
            addresses.append(slot.data_ptr() + at)
            targets.append(self._memory.addresses[slice_.region] + slice_.offset)
            lengths.append(slice_.length)
            at += slice_.length
        return int(engine.batch_transfer_async_write(self._memory.target, addresses, targets, lengths))

    def close(self) -> None:
        """The engines are shared with other links and stay."""
        self._path.forget(self._memory.target)


def _batches(extents: Sequence[Extent], slot_bytes: int) -> list[list[Extent]]:
    """Cut ``extents`` into slices, and these into batches that fit a staging slot and the limit on slices."""
    batches: list[list[Extent]] = [[]]
    room = slot_bytes
    for extent in extents:
        done = 0
        while done < extent.length:
            if room == 0 or len(batches[-1]) == MAX_SLICES:
                batches.append([])
                room = slot_bytes
            length = min(extent.length - done, room, SLICE_BYTES)
            batches[-1].append(Extent(extent.region, extent.offset + done, length, extent.start + done))
            done += length
            room -= length
    return batches


class MooncakePath:
    """The encoder's half. Owns its engines: one; another where a session id comes back with another process or a write
    failed."""

    name = "mooncake"

    def __init__(
        self,
        make_engine: EngineFactory,
        staging_bytes: int,
        writers: int,
        device: Device | None = None,
        memory_device: str = "cpu",
    ) -> None:
        """``writers``: threads that may write at the same time; the staging memory is shared out among their batches.
        ``memory_device``: where it is (cpu, cuda)."""
        self._make_engine = make_engine
        self._device = device
        self._memory_device = memory_device
        self._slots = writers * BATCHES
        self.slot_bytes = staging_bytes // self._slots
        self._lock = threading.Lock()
        self._engines: list[_Engine] = []
        # Targets whose last write failed. The first contact to one that hangs blocks an engine for a minute, so they
        # are tried through an engine of their own.
        self._failing_targets: set[str] = set()

    def open(self, memory: Memory, geometry: Geometry, incarnation: str) -> MooncakeLink:
        if not isinstance(memory, MooncakeMemory) or len(memory.addresses) != geometry.regions:
            raise DataPathUnavailable("the language server registered no memory with Mooncake")
        with self._lock:
            self._failing_targets.discard(memory.target)  # it has just spoken
        with self.engine_for(memory.target, incarnation):
            pass  # an engine that cannot be had is noticed here, not at the first write
        return MooncakeLink(self, memory, incarnation)

    @contextmanager
    def engine_for(self, target: str, incarnation: str) -> Iterator[_Engine]:
        """An engine that may write to ``target``, where the process ``incarnation`` is: not retired, and no other
        process was known there."""
        with self._lock:
            entry = next((one for one in self._engines if self._fits(one, target, incarnation)), None)
            if entry is None:
                only = target if target in self._failing_targets else ""
                engine = self._make_engine()
                staging = Staging(BATCHES if only else self._slots, self.slot_bytes, self._device, self._memory_device)
                entry = _Engine(engine, staging, only)
                self._engines.append(entry)
                logger.info(
                    "Mooncake engine made (%d now)%s", len(self._engines), f", for {only} alone" if only else "",
                )  # fmt: skip
            entry.known[target] = incarnation
            entry.writes += 1
        try:
            yield entry
            if entry.only and not entry.retired:  # it works again: back to the engine that all share
                self._failing_targets.discard(target)
                entry.retired = True
        except BaseException:
            entry.retired = True  # what it still does with the staging memory is unknown
            self._failing_targets.add(target)
            raise
        finally:
            with self._lock:
                entry.writes -= 1
                over = entry.retired and entry.writes == 0 and entry in self._engines
                if over:
                    self._engines.remove(entry)
            if over:
                destroy(entry)

    def forget(self, target: str) -> None:
        """Nobody writes to ``target`` any more. Waits for nothing: an engine may be in the making under the lock."""
        self._failing_targets.discard(target)

    def _fits(self, entry: _Engine, target: str, incarnation: str) -> bool:
        only = target if target in self._failing_targets else ""
        known = entry.known.get(target, incarnation)
        return not entry.retired and entry.only == only and known == incarnation

    def close(self) -> None:
        """Engines end with the process: ending one while a call is under way would crash."""


def destroy(entry: _Engine) -> None:
    """Destroy a retired engine, on a thread of its own: it takes a second. Its staging memory lives until then."""

    def work() -> None:
        entry.engine = None  # the last reference: its destructor closes every connection and joins its threads
        entry.staging.close()
        logger.info("Mooncake engine destroyed after a failed write")

    threading.Thread(target=work, name="mm-conn-engine-end", daemon=True).start()
