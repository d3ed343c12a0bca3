"""Owns the language rank's half of the Mooncake path: one engine per epoch, with the pool registered.

Its proof that no write lands any more (P2) is a revocation, which destroys the engine of an epoch. The measured
property of the engine (0.3.13) that determines this module: unregistering memory does not stop a write that is under
way (over TCP its bytes continue to land), but destroying the engine does. tests/datapath/test_mooncake_revocation.py
shows both.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch

from sglang_mm_conn.core.messages import MooncakeMemory
from sglang_mm_conn.datapath.base import Description, Doubts
from sglang_mm_conn.datapath.mooncake.engine import EngineFactory, register_memory, session_id
from sglang_mm_conn.datapath.mooncake.revocation import Revocation

logger = logging.getLogger(__name__)


class MooncakeReceivePath:
    """One session with one engine per epoch. Encoders get the newest.

    The first engine is made only when it is needed, since it listens on all interfaces: a deployment on one host never
    makes it. The session keeps the id of the first engine. ``target`` names the engine that encoders must write to.
    """

    name = "mooncake"
    exclusive_lock = False

    def __init__(self, make_engine: EngineFactory, host: str, regions: Sequence[torch.Tensor]) -> None:
        """``regions``: of the pool. They must outlive every engine."""
        self._make_engine = make_engine
        self._host = host
        self._regions = regions
        self._lock = threading.Lock()
        self._engines: dict[int, Any] = {}
        self._newest_epoch = self._oldest_epoch = 0
        self.session_id = ""  # empty until the first engine is made

    def start(self) -> None:
        with self._lock:
            if not self._engines:
                self.session_id = session_id(self._new_engine(0), self._host)
                logger.info("Mooncake session %s: %d regions registered", self.session_id, len(self._regions))

    def _new_engine(self, epoch: int) -> Any:
        engine = self._make_engine()
        for region in self._regions:
            register_memory(engine, region)
        self._engines[epoch] = engine
        self._newest_epoch = epoch
        return engine

    def describe(self, slot: int) -> Description:
        """Describe the newest engine. The first call makes an engine, which takes long."""
        self.start()
        with self._lock:
            epoch, engine = max(self._engines.items())
            addresses = [region.data_ptr() for region in self._regions]
            memory = MooncakeMemory(target=session_id(engine, self._host), addresses=addresses)
            return Description(memory, epoch, min(self._engines))

    def is_current(self, epoch: int) -> bool:
        return epoch == self._newest_epoch

    @property
    def retired_epoch(self) -> int | None:
        return self._oldest_epoch - 1 if self._oldest_epoch > 0 else None

    def prove_writer_gone(self, slot: int) -> bool:
        """Always False: bytes that a process sent before it was gone may still be in flight."""
        return False

    def revocation(self, doubts: Doubts) -> Revocation:
        return Revocation(self, doubts)

    def renew(self) -> int:
        """Make the engine of the next epoch. Returns the replaced epoch, whose engine stays."""
        with self._lock:
            replaced = max(self._engines)
            self._new_engine(replaced + 1)
        return replaced

    def revoke(self, epoch: int) -> None:
        """Destroy the engine of ``epoch``, which takes about a second. When this returns, no write through it lands."""
        with self._lock:
            engine = self._engines.pop(epoch)
            self._oldest_epoch = min(self._engines)
        del engine  # the last reference: its destructor closes every connection and joins its threads

    def close(self) -> None:
        """Nothing to do: engines end with the process."""
