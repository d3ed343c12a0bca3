"""One copy into warm shared memory, and a byte on a socket to say so: the limit on one host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sglang_mm_conn.bench.ways.base import Config
from sglang_mm_conn.bench.ways.plain import SlotReceiver, SlotSender
from sglang_mm_conn.memory.segment import HEADER_BYTES, AttachedSegment, Segment


class MemcpySender(SlotSender):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._config = config

    def connect(self, peer: Mapping[str, Any]) -> None:
        nbytes = self._config.in_flight * self._config.nbytes
        self._segment = AttachedSegment(peer["segment"], peer["nonce"], nbytes, 0)
        whole = torch.frombuffer(self._segment.data, dtype=torch.uint8)
        self._targets = list(whole[HEADER_BYTES : HEADER_BYTES + nbytes].split(self._config.nbytes))
        super().connect(peer)

    def write(self, slot: int, source: torch.Tensor) -> None:
        self._targets[slot][: source.numel()].copy_(source)

    def close(self) -> None:
        super().close()
        self._targets = []
        self._segment.close()


class MemcpyReceiver(SlotReceiver):
    def __init__(self, config: Config) -> None:
        nbytes = config.in_flight * config.nbytes
        self._segment = Segment(nbytes)
        memory = torch.frombuffer(self._segment.data, dtype=torch.uint8)[HEADER_BYTES : HEADER_BYTES + nbytes]
        super().__init__(config, memory)

    def hello(self) -> dict[str, Any]:
        return {**super().hello(), "segment": self._segment.name, "nonce": self._segment.nonce}

    def close(self) -> None:
        super().close()
        self._segment.close()
