"""The Mooncake Transfer Engine: one engine per process, rows leave through registered staging memory.

What was measured of the engine (0.3.13) and decides this module:

- every piece of a batch costs about 50 us, whatever its size: contiguous blocks come merged;
- more than about 2048 pieces outstanding to one peer can wedge the link for ever: at most 1024 here, by batch;
- after a non-zero return bytes may still land: such an error is ``in_doubt``, and the engine is given up;
- unregistering memory does not stop a write that is under way (over TCP its bytes go on landing), destroying the
  engine does: tests/datapath/test_mooncake_revocation.py shows both;
- a peer that comes back on the same session id cannot be reached through an engine that knew its predecessor: it is
  served through another engine;
- nothing authenticates a write: runs are checked against what was registered before they come here;
- calls before ``initialize`` crash, a fork()ed child that uses the engine hangs (spawn only).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sglang_mm_conn.core.errors import DataPathError, DataPathUnavailable, MemoryUnavailable
from sglang_mm_conn.core.layout import Run
from sglang_mm_conn.core.messages import Register
from sglang_mm_conn.core.settings import Settings

logger = logging.getLogger(__name__)

MAX_PIECES = 1024
_STAGING_SLOTS = 4

EngineFactory = Callable[[], Any]


def engine_factory(settings: Settings, host: str) -> EngineFactory:
    """How to make an engine that peers reach at ``host``. Raises DataPathUnavailable where the library is missing."""
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


def session_id(engine: Any, host: str) -> str:
    """The session id under which peers write through ``engine``."""
    return f"[{host}]:{engine.get_rpc_port()}" if ":" in host else f"{host}:{engine.get_rpc_port()}"


def register_memory(engine: Any, memory: torch.Tensor) -> None:
    """Register host memory once. Raises MemoryUnavailable."""
    code = engine.register_memory(memory.data_ptr(), memory.numel())
    if code != 0:
        raise MemoryUnavailable(f"Mooncake engine: registering {memory.numel()} bytes returned {code}")


class Staging:
    """Registered source memory in a few slots; a slot is one write's until that write has returned 0."""

    def __init__(self, nbytes: int) -> None:
        self.memory = torch.zeros(nbytes, dtype=torch.uint8)
        self.slot_bytes = nbytes // _STAGING_SLOTS
        self._free = list(self.memory.split(self.slot_bytes))[:_STAGING_SLOTS]
        self._changed = threading.Condition()
        self._lost = 0

    def take(self) -> torch.Tensor:
        """A slot; waits for one. Raises DataPathError where all are lost."""
        with self._changed:
            while not self._free:
                if self._lost == _STAGING_SLOTS:
                    raise DataPathError("the Mooncake engine is being given up after failed writes", in_doubt=False)
                self._changed.wait()
            return self._free.pop()

    def lose(self) -> None:
        """A slot does not come back: the engine may still read it."""
        with self._changed:
            self._lost += 1
            self._changed.notify_all()

    def give_back(self, slot: torch.Tensor) -> None:
        with self._changed:
            self._free.append(slot)
            self._changed.notify()


class _Engine:
    """One engine with its staging, the sessions it has contacted, and the writes that go through it now.

    After a write that failed, what the engine still does with the staging memory is unknown. So no further write
    begins (``retired``), and when the last one has returned the engine is destroyed, which closes its connections:
    only then is its memory given back. Other links go on through another engine.
    """

    def __init__(self, engine: Any, staging_bytes: int) -> None:
        self.engine = engine
        self.staging = Staging(staging_bytes)
        register_memory(engine, self.staging.memory)
        self.known: dict[str, str] = {}
        self.writes = 0
        self.retired = False


class MooncakeLink:
    """Writes to one session, through whichever of the path's engines can reach it."""

    name = "mooncake"

    def __init__(self, path: MooncakePath, register: Register) -> None:
        self._path = path
        self._register = register
        self._bases = [region.address for region in register.regions]
        # Pieces outstanding to one peer are counted over all threads: one batch at a time does that.
        self._one_batch = threading.Lock()

    def write(self, source: torch.Tensor, runs: Sequence[Run]) -> None:
        with self._path.engine_for(self._register) as entry:
            for pieces in _batches(runs, entry.staging.slot_bytes):
                slot = entry.staging.take()
                code = -1
                try:
                    code = self._write_batch(entry.engine, slot, source, pieces)
                finally:
                    if code == 0:
                        entry.staging.give_back(slot)
                    else:
                        entry.staging.lose()
                if code != 0:
                    raise DataPathError(f"Mooncake write of {len(pieces)} pieces returned {code}", in_doubt=True)

    def _write_batch(self, engine: Any, slot: torch.Tensor, source: torch.Tensor, pieces: Sequence[Run]) -> int:
        at, addresses, targets, lengths = 0, [], [], []
        for piece in pieces:
            slot[at : at + piece.length].copy_(source[piece.start : piece.start + piece.length])
            addresses.append(slot.data_ptr() + at)
            targets.append(self._bases[piece.region] + piece.offset)
            lengths.append(piece.length)
            at += piece.length
        with self._one_batch:
            return int(engine.batch_transfer_sync_write(self._register.target, addresses, targets, lengths))

    def close(self) -> None:
        """The engines are shared with other links and stay."""


def _batches(runs: Sequence[Run], slot_bytes: int) -> list[list[Run]]:
    """Cut ``runs`` into batches that fit a staging slot and the limit on pieces."""
    batches: list[list[Run]] = [[]]
    room = slot_bytes
    for run in runs:
        done = 0
        while done < run.length:
            if room == 0 or len(batches[-1]) == MAX_PIECES:
                batches.append([])
                room = slot_bytes
            length = min(run.length - done, room)
            batches[-1].append(Run(run.region, run.offset + done, length, run.start + done))
            done += length
            room -= length
    return batches


class MooncakePath:
    """Owns the encoder's engines: one; another where a session id comes back with another process or a write failed."""

    name = "mooncake"

    def __init__(self, make_engine: EngineFactory, staging_bytes: int) -> None:
        self._make_engine = make_engine
        self._staging_bytes = staging_bytes
        self._lock = threading.Lock()
        self._engines: list[_Engine] = []

    def open(self, register: Register) -> MooncakeLink:
        if not register.target or any(region.address == 0 for region in register.regions):
            raise DataPathUnavailable("the language server registered no memory with Mooncake")
        with self.engine_for(register):
            pass  # an engine that cannot be had is noticed here, not at the first write
        return MooncakeLink(self, register)

    @contextmanager
    def engine_for(self, register: Register) -> Iterator[_Engine]:
        """An engine that may write to ``register``'s target: not retired, and no other process was known there."""
        with self._lock:
            entry = next((one for one in self._engines if self._fits(one, register)), None)
            if entry is None:
                entry = _Engine(self._make_engine(), self._staging_bytes)
                self._engines.append(entry)
                logger.info("Mooncake engine made (%d now), staging %d bytes", len(self._engines), self._staging_bytes)
            entry.known[register.target] = register.incarnation
            entry.writes += 1
        try:
            yield entry
        except BaseException:
            entry.retired = True  # what it still does with the staging memory is unknown
            raise
        finally:
            with self._lock:
                entry.writes -= 1
                over = entry.retired and entry.writes == 0 and entry in self._engines
                if over:
                    self._engines.remove(entry)
            if over:
                destroy(entry)

    @staticmethod
    def _fits(entry: _Engine, register: Register) -> bool:
        return not entry.retired and entry.known.get(register.target, register.incarnation) == register.incarnation

    def close(self) -> None:
        """Engines end with the process: ending one while a call is under way would crash."""


def destroy(entry: _Engine) -> None:
    """Destroy a retired engine, on a thread of its own: it takes a second. Its staging memory lives until then."""

    def work() -> None:
        entry.engine = None  # the last reference: its destructor closes every connection and joins its threads
        logger.info("Mooncake engine destroyed after a failed write")

    threading.Thread(target=work, name="mm-conn-engine-end", daemon=True).start()
