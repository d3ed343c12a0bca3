"""One copy into warm shared memory and a short message over a socket: the upper bound on speed on one host.

With embeddings on a GPU: one copy from it into pinned shared memory, and one from there to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sglang_mm_conn.bench.transports.base import Config, Room, device_for
from sglang_mm_conn.bench.transports.plain import SlotReceiver, SlotSender
from sglang_mm_conn.memory.segment import HEADER_BYTES, AttachedSegment, Segment


class MemcpySender(SlotSender):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._config = config
        self._device = device_for(config)
        self._unpin: Callable[[], None] = lambda: None

    def connect(self, peer: Mapping[str, Any]) -> None:
        nbytes = self._config.in_flight * self._config.nbytes
        self._segment = AttachedSegment(peer["segment"], peer["nonce"], nbytes, 0)
        whole = torch.frombuffer(self._segment.data, dtype=torch.uint8)
        self._targets = list(whole[HEADER_BYTES : HEADER_BYTES + nbytes].split(self._config.nbytes))
        self._unpin = self._device.pin(whole)
        super().connect(peer)

    def write(self, slot: int, source: torch.Tensor) -> None:
        if source.is_cuda:
            self._device.copy([(self._targets[slot], 0, source, 0, source.numel())])
        else:
            self._targets[slot][: source.numel()].copy_(source)

    def close(self) -> None:
        super().close()
        self._unpin()
        self._targets = []
        self._segment.close()


class MemcpyReceiver(SlotReceiver):
    def __init__(self, config: Config) -> None:
        nbytes = config.in_flight * config.nbytes
        self._segment = Segment(nbytes)
        memory = torch.frombuffer(self._segment.data, dtype=torch.uint8)[HEADER_BYTES : HEADER_BYTES + nbytes]
        super().__init__(config, memory)
        self._on_gpu = config.device == "cuda"
        self._device = device_for(config)
        self._unpin = self._device.pin(memory)
        self._results: dict[str, torch.Tensor] = {}

    def hello(self) -> dict[str, Any]:
        return {**super().hello(), "segment": self._segment.name, "nonce": self._segment.nonce}

    def expect(self, room: Room) -> None:
        super().expect(room)
        if self._on_gpu:
            self._results[room.name] = self._device.empty(room.nbytes, "cuda")

    def wait(self, timeout: float) -> list[tuple[str, torch.Tensor]]:
        return [(name, self._taken(name, rows)) for name, rows in super().wait(timeout)]

    def _taken(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` on the device where embeddings end."""
        if not self._on_gpu:
            return rows
        result = self._results.pop(name)
        self._device.copy([(result, 0, rows, 0, rows.numel())])
        return result

    def close(self) -> None:
        super().close()
        self._unpin()
        self._segment.close()
