"""The Mooncake Transfer Engine: one engine per process, rows leave through registered staging memory.

What was measured of the engine (0.3.13) and decides this module:

- every piece of a batch costs about 50 us, whatever its size: contiguous blocks come merged;
- more than about 2048 pieces outstanding to one peer can wedge the link for ever: at most 1024 here, by batch;
- after a non-zero return bytes may still land: such an error is ``in_doubt``, and the staging memory it was read
  from is never used again;
- a peer that comes back on the same session id cannot be reached through an engine that knew its predecessor: it is
  served through another engine;
- nothing authenticates a write: runs are checked against what was registered before they come here;
- calls before ``initialize`` crash, a fork()ed child that uses the engine hangs (spawn only).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
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
    """Registered source memory in a few slots; a slot is one write's until that write is certain to be over."""

    def __init__(self, nbytes: int) -> None:
        self.memory = torch.zeros(nbytes, dtype=torch.uint8)
        self._free = list(self.memory.split(nbytes // _STAGING_SLOTS))[:_STAGING_SLOTS]
        self._changed = threading.Condition()
        self.lost_bytes = 0

    @property
    def slot_bytes(self) -> int:
        return self.memory.numel() // _STAGING_SLOTS

    def take(self) -> torch.Tensor:
        """A slot; waits for one. Raises DataPathError where none is left for ever."""
        with self._changed:
            while not self._free:
                if self.lost_bytes == self.slot_bytes * _STAGING_SLOTS:
                    raise DataPathError(
                        "all staging memory is in quarantine after failed Mooncake writes; restart the encoder",
                        in_doubt=False,
                    )
                self._changed.wait(1.0)
            return self._free.pop()

    def give_back(self, slot: torch.Tensor) -> None:
        with self._changed:
            self._free.append(slot)
            self._changed.notify()

    def quarantine(self, slot: torch.Tensor) -> None:
        """The engine may still read ``slot``: nobody gets it again."""
        with self._changed:
            self.lost_bytes += slot.numel()
            self._changed.notify_all()
        logger.warning("Mooncake staging: %d bytes in quarantine after a failed write", self.lost_bytes)


class MooncakeLink:
    """Writes to one session through one engine."""

    name = "mooncake"

    def __init__(self, engine: Any, staging: Staging, register: Register) -> None:
        self._engine = engine
        self._staging = staging
        self._session = register.mooncake_session_id
        self._bases = [region.address for region in register.regions]
        # Pieces outstanding to one peer are counted over all threads: one batch at a time does that.
        self._one_batch = threading.Lock()

    def write(self, source: torch.Tensor, runs: Sequence[Run]) -> None:
        for pieces in self._batches(runs):
            slot = self._staging.take()
            in_doubt = True  # also where the call raises
            try:
                in_doubt = self._write_batch(slot, source, pieces)
            finally:
                if in_doubt:
                    self._staging.quarantine(slot)
                else:
                    self._staging.give_back(slot)
            if in_doubt:
                raise DataPathError(f"Mooncake write of {len(pieces)} pieces failed", in_doubt=True)

    def _batches(self, runs: Sequence[Run]) -> list[list[Run]]:
        """Cut ``runs`` into batches that fit a staging slot and the limit on pieces."""
        batches: list[list[Run]] = [[]]
        room = self._staging.slot_bytes
        for run in runs:
            done = 0
            while done < run.length:
                if room == 0 or len(batches[-1]) == MAX_PIECES:
                    batches.append([])
                    room = self._staging.slot_bytes
                length = min(run.length - done, room)
                batches[-1].append(Run(run.region, run.offset + done, length, run.start + done))
                done += length
                room -= length
        return batches

    def _write_batch(self, slot: torch.Tensor, source: torch.Tensor, pieces: Sequence[Run]) -> bool:
        """Returns whether the write is in doubt."""
        at, addresses, targets, lengths = 0, [], [], []
        for piece in pieces:
            slot[at : at + piece.length].copy_(source[piece.start : piece.start + piece.length])
            addresses.append(slot.data_ptr() + at)
            targets.append(self._bases[piece.region] + piece.offset)
            lengths.append(piece.length)
            at += piece.length
        with self._one_batch:
            code = self._engine.batch_transfer_sync_write(self._session, addresses, targets, lengths)
        return bool(code != 0)

    def close(self) -> None:
        """The engine is shared with other links and stays."""


class MooncakePath:
    """Owns the encoder's engines: one, and one more for each time a session id comes back with another process."""

    name = "mooncake"

    def __init__(self, make_engine: EngineFactory, staging_bytes: int) -> None:
        self._make_engine = make_engine
        self._staging_bytes = staging_bytes
        self._lock = threading.Lock()
        self._engines: list[tuple[Any, Staging, dict[str, str]]] = []  # sessions it has contacted -> incarnation

    def open(self, register: Register) -> MooncakeLink:
        if any(region.address == 0 for region in register.regions):
            raise DataPathUnavailable("the language server registered no memory with Mooncake")
        with self._lock:
            engine, staging, known = self._engine_for(register)
            known[register.mooncake_session_id] = register.incarnation
        return MooncakeLink(engine, staging, register)

    def _engine_for(self, register: Register) -> tuple[Any, Staging, dict[str, str]]:
        """The first engine that has not known another process under this session id; a new one where there is none."""
        for entry in self._engines:
            if entry[2].get(register.mooncake_session_id, register.incarnation) == register.incarnation:
                return entry
        engine, staging = self._make_engine(), Staging(self._staging_bytes)
        register_memory(engine, staging.memory)
        self._engines.append((engine, staging, {}))
        logger.info("Mooncake engine %d: %d bytes of staging memory", len(self._engines), self._staging_bytes)
        return self._engines[-1]

    def close(self) -> None:
        """Engines end with the process: ending one while a call is under way would crash."""
