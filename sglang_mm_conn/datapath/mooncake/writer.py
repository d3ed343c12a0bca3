"""The Mooncake Transfer Engine: engines shared by all links, rows leave through registered staging memory.

What was measured of the engine (0.3.13) and decides this module:

- every piece of a batch costs about 50 us, whatever its size: contiguous blocks come merged;
- over TCP a batch of one large piece takes up to five times as long as the same bytes in several, which travel side by
  side (16 MiB in batches of 4 MiB: 121 ms in pieces of 4 MiB, 25 in 1 MiB, 22 in 256 KiB; 19 without
  staging): large pieces are cut;
- a write that waits for each batch leaves the wire idle while it copies the next one to the staging memory: 1.3 times
  the engine's own time at 128 MiB, 1.0 with two batches on their way (slots of 1 to 16 MiB alike);
- the status of a batch is asked for exactly once (a second time crashes), also when another has failed, so that none
  is under way when its engine is destroyed. Beside a peer that hangs or dies, that of the second follows the first's
  within milliseconds. (By its source, the engine repeats a failed batch of the synchronous call only, once for each
  RDMA device; a failed piece takes another path in either.);
- more than about 2048 pieces outstanding to one peer can wedge the link for ever: at most 1024 here, by batch;
- after a non-zero return bytes may still land: such an error is ``in_doubt``, and the engine is given up;
- unregistering memory does not stop a write that is under way (over TCP its bytes go on landing), destroying the
  engine does: tests/datapath/test_mooncake_revocation.py shows both;
- a peer that comes back on the same session id cannot be reached through an engine that knew its predecessor: it is
  served through another engine;
- GPU memory is registered like any other; the non-CUDA build would write to its addresses as if they were the host's;
- nothing authenticates a write: extents are checked against what was registered before they come here;
- calls before ``initialize`` crash, a fork()ed child that uses the engine hangs (spawn only).
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import metadata
from typing import Any

import torch

from sglang_mm_conn.core.errors import DataPathError, DataPathUnavailable, MemoryUnavailable
from sglang_mm_conn.core.layout import Extent
from sglang_mm_conn.core.messages import Register
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.memory.device import Device

logger = logging.getLogger(__name__)

BATCHES = 2  # on their way to one peer at the same time: one on the wire while the next is copied
MAX_PIECES = 1024 // BATCHES  # in a batch
PIECE_BYTES = 256 << 10
# 0.3.13 says 0 where it refuses a batch, its source has other codes below zero too; asking for such a batch crashes.
_NO_NUMBER = 1 << 63
_WITHOUT_CUDA = "mooncake-transfer-engine-non-cuda"

EngineFactory = Callable[[], Any]


def engine_factory(settings: Settings, host: str) -> EngineFactory:
    """How to make an engine that peers reach at ``host``. Raises DataPathUnavailable where the library is missing, or
    the one that is there cannot reach the memory that it is meant for."""
    if settings.pool_device != "cpu" and _is_installed(_WITHOUT_CUDA):
        raise DataPathUnavailable(
            f"SGLANG_MM_CONN_POOL_DEVICE={settings.pool_device}, but {_WITHOUT_CUDA} is installed, which knows no GPU "
            "memory: pip install mooncake-transfer-engine instead"
        )
    # Read by the library when it is imported or initialized.
    os.environ.setdefault("MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER", "65535")
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    if ":" in host:
        os.environ.setdefault("MC_USE_IPV6", "1")
    try:
        from mooncake.engine import TransferEngine
    except ImportError as error:
        raise DataPathUnavailable(f"Mooncake (pip install mooncake-transfer-engine) is missing: {error}") from None

    def make() -> Any:
        engine = TransferEngine()
        code = engine.initialize(host, "P2PHANDSHAKE", settings.mooncake_protocol, settings.mooncake_device)
        if code != 0:
            raise DataPathUnavailable(
                f"Mooncake engine: initialize({host!r}, protocol {settings.mooncake_protocol!r}, "
                f"device {settings.mooncake_device!r}) returned {code}"
            )
        return engine

    return make


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def session_id(engine: Any, host: str) -> str:
    """The session id under which peers write through ``engine``."""
    return f"[{host}]:{engine.get_rpc_port()}" if ":" in host else f"{host}:{engine.get_rpc_port()}"


def register_memory(engine: Any, memory: torch.Tensor) -> None:
    """Register memory once. Raises MemoryUnavailable."""
    code = engine.register_memory(memory.data_ptr(), memory.numel())
    if code != 0:
        raise MemoryUnavailable(f"Mooncake engine: registering {memory.numel()} bytes returned {code}")


class Staging:
    """Registered source memory in slots, one for each batch that can be under way: nobody waits for a slot.

    A slot is one batch's until that batch has ended with 0; the slot of a failed one does not come back, for the
    engine may still read it.
    """

    def __init__(self, slots: int, slot_bytes: int, device: Device | None = None, memory_device: str = "cpu") -> None:
        """In host memory, pinned where there is a GPU, or in GPU memory (``memory_device``). Raises
        MemoryUnavailable."""
        self._device = device or Device()
        self._unpin: Callable[[], None] = lambda: None
        if memory_device == "cpu":
            self.memory = torch.zeros(slots * slot_bytes, dtype=torch.uint8)
            # Hazard: memory that is unmapped while it is pinned leaves the GPU a stale mapping of its addresses. So it
            # is unpinned at the latest when nobody refers to this any more.
            unpin = weakref.finalize(self, self._device.pin(self.memory))
            unpin.atexit = False
            self._unpin = unpin
        else:
            self.memory = self._device.empty(slots * slot_bytes, memory_device)
        self._free = list(self.memory.split(slot_bytes))
        self._lock = threading.Lock()

    def take(self) -> torch.Tensor:
        """Raises DataPathError where the writes that failed have used them up."""
        with self._lock:
            if not self._free:
                raise DataPathError("the Mooncake engine is being given up after failed writes", in_doubt=False)
            return self._free.pop()

    def give_back(self, slot: torch.Tensor) -> None:
        with self._lock:
            self._free.append(slot)

    def fill(self, slot: torch.Tensor, source: torch.Tensor, pieces: Sequence[Extent]) -> None:
        """Copy ``pieces`` of ``source`` to the slot, end to end. When this returns they are there for the engine, which
        knows no streams, to read."""
        ends = list(itertools.accumulate(piece.length for piece in pieces))
        self._device.copy(
            (slot, end - piece.length, source, piece.start, piece.length)
            for end, piece in zip(ends, pieces, strict=True)
        )

    def close(self) -> None:
        """Only when the engine does not read it any more."""
        self._unpin()


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


class FairSemaphore:
    """A semaphore of ``count`` permits that serves waiting threads in the order of their arrival. A large write takes
    many permits one after the other; with an unfair semaphore the small writes would wait until it ends."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._free = count
        self._waiting: deque[threading.Event] = deque()

    def acquire(self, *, wait: bool) -> bool:
        """Whether the caller has a permit now; with ``wait`` it waits until it has."""
        with self._lock:
            if self._free:
                self._free -= 1
                return True
            if not wait:
                return False
            handed_over = threading.Event()
            self._waiting.append(handed_over)
        return handed_over.wait()

    def release(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._free += 1


class MooncakeLink:
    """Writes to one session, through whichever of the path's engines can reach it."""

    name = "mooncake"
    synchronous = False

    def __init__(self, path: MooncakePath, register: Register) -> None:
        self._path = path
        self._register = register
        self._bases = [region.address for region in register.regions]
        self._permits = FairSemaphore(BATCHES)  # pieces outstanding to one peer count over all threads
        self._one_waits = threading.Lock()  # the engine keeps a core busy with it: not one for each thread

    def write(self, source: torch.Tensor, extents: Sequence[Extent]) -> None:
        under_way: deque[ExitStack] = deque()  # oldest first
        try:
            for pieces in _batches(extents, self._path.slot_bytes):
                # Never wait for a permit while holding one: two writers could wait for each other.
                while not self._permits.acquire(wait=not under_way):
                    under_way.popleft().close()
                batch = ExitStack()
                batch.enter_context(self._batch(source, pieces))
                under_way.append(batch)
        finally:
            with ExitStack() as rest:  # every one of them, whatever becomes of the others
                for batch in reversed(under_way):
                    rest.callback(batch.close)

    @contextmanager
    def _batch(self, source: torch.Tensor, pieces: Sequence[Extent]) -> Iterator[None]:
        """One batch, on its way inside, complete at the end. Releases the caller's permit."""
        try:
            # Each batch may go through another engine: they are complete, or not, independently.
            with self._path.engine_for(self._register) as entry:
                slot = entry.staging.take()
                entry.staging.fill(slot, source, pieces)
                number = self._begin(entry.engine, slot, pieces)
                code = -1
                if 0 < number < _NO_NUMBER:
                    yield
                    with self._one_waits:
                        code = entry.engine.get_batch_transfer_status([number])
                if code != 0:
                    raise DataPathError(f"Mooncake write of {len(pieces)} pieces returned {code}", in_doubt=True)
                entry.staging.give_back(slot)
        finally:
            self._permits.release()

    def _begin(self, engine: Any, slot: torch.Tensor, pieces: Sequence[Extent]) -> int:
        """The batch's number; 0 or a negative code, as it may be without its sign, where the engine has refused it."""
        at, addresses, targets, lengths = 0, [], [], []
        for piece in pieces:
            addresses.append(slot.data_ptr() + at)
            targets.append(self._bases[piece.region] + piece.offset)
            lengths.append(piece.length)
            at += piece.length
        return int(engine.batch_transfer_async_write(self._register.target, addresses, targets, lengths))

    def close(self) -> None:
        """The engines are shared with other links and stay."""
        self._path.forget(self._register.target)


def _batches(extents: Sequence[Extent], slot_bytes: int) -> list[list[Extent]]:
    """Cut ``extents`` into pieces, and these into batches that fit a staging slot and the limit on pieces."""
    batches: list[list[Extent]] = [[]]
    room = slot_bytes
    for extent in extents:
        done = 0
        while done < extent.length:
            if room == 0 or len(batches[-1]) == MAX_PIECES:
                batches.append([])
                room = slot_bytes
            length = min(extent.length - done, room, PIECE_BYTES)
            batches[-1].append(Extent(extent.region, extent.offset + done, length, extent.start + done))
            done += length
            room -= length
    return batches


class MooncakePath:
    """Owns the encoder's engines: one; another where a session id comes back with another process or a write failed."""

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

    def open(self, register: Register) -> MooncakeLink:
        if not register.target or any(region.address == 0 for region in register.regions):
            raise DataPathUnavailable("the language server registered no memory with Mooncake")
        with self._lock:
            self._failing_targets.discard(register.target)  # it has just spoken
        with self.engine_for(register):
            pass  # an engine that cannot be had is noticed here, not at the first write
        return MooncakeLink(self, register)

    @contextmanager
    def engine_for(self, register: Register) -> Iterator[_Engine]:
        """An engine that may write to ``register``'s target: not retired, and no other process was known there."""
        with self._lock:
            entry = next((one for one in self._engines if self._fits(one, register)), None)
            if entry is None:
                only = register.target if register.target in self._failing_targets else ""
                engine = self._make_engine()
                staging = Staging(BATCHES if only else self._slots, self.slot_bytes, self._device, self._memory_device)
                entry = _Engine(engine, staging, only)
                self._engines.append(entry)
                logger.info(
                    "Mooncake engine made (%d now)%s", len(self._engines), f", for {only} alone" if only else "",
                )  # fmt: skip
            entry.known[register.target] = register.incarnation
            entry.writes += 1
        try:
            yield entry
            if entry.only and not entry.retired:  # it works again: back to the engine that all share
                self._failing_targets.discard(register.target)
                entry.retired = True
        except BaseException:
            entry.retired = True  # what it still does with the staging memory is unknown
            self._failing_targets.add(register.target)
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

    def _fits(self, entry: _Engine, register: Register) -> bool:
        only = register.target if register.target in self._failing_targets else ""
        known = entry.known.get(register.target, register.incarnation)
        return not entry.retired and entry.only == only and known == register.incarnation

    def close(self) -> None:
        """Engines end with the process: ending one while a call is under way would crash."""


def destroy(entry: _Engine) -> None:
    """Destroy a retired engine, on a thread of its own: it takes a second. Its staging memory lives until then."""

    def work() -> None:
        entry.engine = None  # the last reference: its destructor closes every connection and joins its threads
        entry.staging.close()
        logger.info("Mooncake engine destroyed after a failed write")

    threading.Thread(target=work, name="mm-conn-engine-end", daemon=True).start()
