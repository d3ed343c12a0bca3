"""Owns the encoder's half of the Mooncake path: engines that all links share, which send rows from staging memory.

Measured properties of the engine (0.3.13) that determine this module:

- Each slice of a batch costs about 50 us, whatever its size. So contiguous blocks arrive here as one merged extent.
- Over TCP, a batch of one large slice takes up to five times as long as the same bytes in several slices, which travel
  in parallel (16 MiB in batches of 4 MiB: 121 ms in slices of 4 MiB, 25 ms in 1 MiB, 22 ms in 256 KiB, 19 ms without
  staging). So large extents are cut into slices.
- Hazard: the status of a batch must be fetched exactly once; a second time crashes. It is fetched even if another batch
  of the write has failed, so that no batch is under way when its engine is destroyed. If the peer hangs or dies, the
  second batch's status follows the first's within milliseconds. (According to its source code, the engine repeats a
  failed batch only in the synchronous call, once per RDMA device. In either call it retries a failed slice over another
  path.)
- Hazard: more than about 2048 outstanding slices to one peer can block the link for ever. So at most 1024 are sent
  here, spread over the batches in flight.
- Hazard: after a non-zero return, bytes may still land. So such an error is ``in_doubt``, and the engine is retired.
- If a peer comes back with the same session id, an engine that has contacted its predecessor cannot reach it. Session
  ids carry random ports, so an encoder that lives for long meets this. Another engine then takes over all targets.
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

BATCHES = 2  # in flight to one peer at the same time: one is sent while the next is copied
MAX_SLICES = 1024 // BATCHES  # in a batch
SLICE_BYTES = 256 << 10
# If 0.3.13 refuses a batch it returns 0; its source code has negative codes too. Fetching the status of a refused batch
# crashes.
_NO_NUMBER = 1 << 63


class _Engine:
    """One engine with its staging memory, the targets that it has contacted, and a count of the writes through it.

    Hazard: after a failed write the engine may still read the staging memory. So no further write begins (``retired``).
    When the last one has returned, the engine is destroyed, which closes its connections. Only then is its staging
    memory freed. Other links continue through another engine. An engine that cannot reach a target ends the same way.
    """

    def __init__(self, engine: Any, staging: Staging, only: str = "") -> None:
        self.engine = engine
        self.only = only  # the only target that it serves; empty if it serves all
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
    """Writes to one session, through an engine of the path that can reach it."""

    name = "mooncake"
    synchronous = False

    def __init__(self, path: MooncakePath, memory: MooncakeMemory, incarnation: str) -> None:
        self._path = path
        self._memory = memory
        self._incarnation = incarnation
        self._permits = FairSemaphore(BATCHES)  # limits the slices outstanding to one peer, over all threads
        self._one_waits = threading.Lock()  # waiting for a batch keeps a core busy, so only one thread waits

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
            with ExitStack() as rest:  # closes every batch, even if closing another raises
                for batch in reversed(under_way):
                    rest.callback(batch.close)

    @contextmanager
    def _batch(self, source: torch.Tensor, slices: Sequence[Extent]) -> Iterator[None]:
        """Send one batch. It is in flight inside the ``with`` block, and complete after it. Releases the caller's
        permit."""
        try:
            # Each batch may use another engine, and completes or fails independently of the others.
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
        """Start sending a batch. Returns its number. If the engine has refused it: 0, or a negative code, perhaps as an
        unsigned number."""
        at, addresses, targets, lengths = 0, [], [], []
        for slice_ in slices:
            addresses.append(slot.data_ptr() + at)
            targets.append(self._memory.addresses[slice_.region] + slice_.offset)
            lengths.append(slice_.length)
            at += slice_.length
        return int(engine.batch_transfer_async_write(self._memory.target, addresses, targets, lengths))

    def close(self) -> None:
        """Forget the target. The engines stay, because other links share them."""
        self._path.forget(self._memory.target)


def _batches(extents: Sequence[Extent], slot_bytes: int) -> list[list[Extent]]:
    """Cut ``extents`` into slices, and group these into batches that fit a staging slot and the limit on slices."""
    batches: list[list[Extent]] = [[]]
    free = slot_bytes
    for extent in extents:
        done = 0
        while done < extent.length:
            if free == 0 or len(batches[-1]) == MAX_SLICES:
                batches.append([])
                free = slot_bytes
            length = min(extent.length - done, free, SLICE_BYTES)
            batches[-1].append(Extent(extent.region, extent.offset + done, length, extent.start + done))
            done += length
            free -= length
    return batches


class MooncakePath:
    """The encoder's half. Owns its engines: usually one, and for a while another one if a session id has come back with
    another process or if a write has failed."""

    name = "mooncake"

    def __init__(
        self,
        make_engine: EngineFactory,
        staging_bytes: int,
        writers: int,
        device: Device | None = None,
        memory_device: str = "cpu",
    ) -> None:
        """``writers``: threads that may write at the same time. Their batches divide the staging memory.
        ``memory_device``: the kind of staging memory (cpu, cuda)."""
        self._make_engine = make_engine
        self._device = device
        self._memory_device = memory_device
        self._slots = writers * BATCHES
        self.slot_bytes = staging_bytes // self._slots
        self._lock = threading.Lock()
        self._engines: list[_Engine] = []
        # Targets whose last write failed. The first contact to a target that hangs blocks an engine for a minute, so
        # each of these targets gets a separate engine.
        self._failing_targets: set[str] = set()

    def open(self, memory: Memory, geometry: Geometry, incarnation: str) -> MooncakeLink:
        if not isinstance(memory, MooncakeMemory) or len(memory.addresses) != geometry.regions:
            raise DataPathUnavailable("the language server registered no memory with Mooncake")
        with self._lock:
            self._failing_targets.discard(memory.target)  # it has just sent a Register
        with self.engine_for(memory.target, incarnation):
            pass  # an engine that cannot be made fails the registration, not the first write
        return MooncakeLink(self, memory, incarnation)

    @contextmanager
    def engine_for(self, target: str, incarnation: str) -> Iterator[_Engine]:
        """An engine that may write to ``target``, which is the process ``incarnation``. It is not retired, and has
        contacted no other process at this target."""
        # Find an engine or make one, and count the write, in one critical section: a retired engine is destroyed when
        # its last write has returned.
        with self._lock:
            entry = next((one for one in self._engines if self._fits(one, target, incarnation)), None)
            if entry is None:
                # A failing target gets an engine with a few slots that serves only this target, so that it does not
                # block the shared engine.
                only = target if target in self._failing_targets else ""
                engine = self._make_engine()
                staging = Staging(BATCHES if only else self._slots, self.slot_bytes, self._device, self._memory_device)
                entry = _Engine(engine, staging, only)
                for replaced in [one for one in self._engines if one.only == only]:
                    replaced.retired = True  # it does not fit, and the new one can reach every target
                    self._end_if_unused(replaced)
                self._engines.append(entry)
                logger.info(
                    "Mooncake engine made (%d now)%s", len(self._engines), f", for {only} alone" if only else "",
                )  # fmt: skip
            entry.known[target] = incarnation
            entry.writes += 1
        # The caller writes. If a write through a separate engine succeeds, the target works again: retire that engine,
        # so that the next write uses the shared one. If a write fails, retire the engine: it may still read the staging
        # memory.
        try:
            yield entry
            if entry.only and not entry.retired:
                self._failing_targets.discard(target)
                entry.retired = True
        except BaseException:
            entry.retired = True
            self._failing_targets.add(target)
            raise
        finally:
            with self._lock:
                entry.writes -= 1
                self._end_if_unused(entry)

    def _end_if_unused(self, entry: _Engine) -> None:
        """Destroy a retired engine once its last write has returned, so that no call is under way in it. Called with
        the lock held."""
        if entry.retired and entry.writes == 0 and entry in self._engines:
            self._engines.remove(entry)
            destroy(entry)

    def forget(self, target: str) -> None:
        """Forget ``target``, to which no link writes any more. Takes no lock: another thread may hold it for long while
        it makes an engine."""
        self._failing_targets.discard(target)

    def _fits(self, entry: _Engine, target: str, incarnation: str) -> bool:
        only = target if target in self._failing_targets else ""
        known = entry.known.get(target, incarnation)
        return not entry.retired and entry.only == only and known == incarnation

    def close(self) -> None:
        """Nothing to do: engines end with the process. Destroying one while a call is under way would crash."""


def destroy(entry: _Engine) -> None:
    """Destroy a retired engine on a separate thread, since it takes a second. Its staging memory lives until then."""

    def work() -> None:
        entry.engine = None  # the last reference: its destructor closes every connection and joins its threads
        entry.staging.close()
        logger.info("Mooncake engine destroyed")

    threading.Thread(target=work, name="mm-conn-engine-end", daemon=True).start()
