"""The Mooncake engine's own write between registered memory: the upper bound on speed over Mooncake.

A room is written as a batch of slices. The fastest slice size depends on the machine, so ``connect`` tries several.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from sglang_mm_conn.bench.transports.base import HOST, Config
from sglang_mm_conn.bench.transports.plain import SlotReceiver, SlotSender
from sglang_mm_conn.datapath.mooncake.engine import engine_factory, register_memory, session_id

SLICE_BYTES = (256 << 10, 1 << 20, 4 << 20, 16 << 20, 1 << 40)  # the last: a room as one slice
_TRIES = 3


class EngineSender(SlotSender):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._config = config
        self._engine = engine_factory(HOST, protocol="tcp")()
        self._registered: set[int] = set()
        self.slice_bytes = SLICE_BYTES[-1]

    def connect(self, peer: Mapping[str, Any]) -> None:
        super().connect(peer)
        self._target, self._addresses = peer["session"], peer["addresses"]
        sample = torch.ones(self._config.nbytes, dtype=torch.uint8)
        register_memory(self._engine, sample)
        seconds: dict[int, float] = {}
        for slice_bytes in SLICE_BYTES:
            if slice_bytes < self._config.nbytes or slice_bytes == SLICE_BYTES[-1]:
                self.slice_bytes = slice_bytes
                seconds[slice_bytes] = min(self._timed(sample) for _ in range(_TRIES))
        self.slice_bytes = min(seconds, key=lambda slice_bytes: seconds[slice_bytes])
        self._engine.unregister_memory(sample.data_ptr())

    def _timed(self, sample: torch.Tensor) -> float:
        begin = time.perf_counter()
        self.write(0, sample)
        return time.perf_counter() - begin

    def write(self, slot: int, source: torch.Tensor) -> None:
        # Over TCP the engine needs no registration of the source.
        starts = range(0, source.numel(), self.slice_bytes)
        lengths = [min(self.slice_bytes, source.numel() - start) for start in starts]
        base, target = source.data_ptr(), self._addresses[slot]
        code = self._engine.batch_transfer_sync_write(
            self._target, [base + start for start in starts], [target + start for start in starts], lengths
        )
        if code != 0:
            raise RuntimeError(f"the Mooncake engine returned {code}")


class EngineReceiver(SlotReceiver):
    def __init__(self, config: Config) -> None:
        self._memory = torch.empty(config.in_flight * config.nbytes, dtype=torch.uint8)
        super().__init__(config, self._memory)
        self._engine = engine_factory(HOST, protocol="tcp")()
        register_memory(self._engine, self._memory)

    def hello(self) -> dict[str, Any]:
        return {
            **super().hello(),
            "session": session_id(self._engine, HOST),
            "addresses": [slot.data_ptr() for slot in self.slots],
        }
