"""Shared memory: the encoder copies rows straight from its tensor into the language server's blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_mm_conn.core.errors import DataPathUnavailable
from sglang_mm_conn.core.layout import Run
from sglang_mm_conn.core.messages import Register
from sglang_mm_conn.memory.copying import copy_bytes
from sglang_mm_conn.memory.segment import HEADER_BYTES, AttachedSegment


class ShmLink:
    """A mapped segment. A copy is synchronous: when it returns, nothing more will land."""

    name = "shm"
    synchronous = True

    def __init__(self, register: Register) -> None:
        length = register.blocks_per_region * register.block_bytes
        payload = length * len(register.regions)
        self._segment = AttachedSegment(register.segment, register.nonce, payload, register.writer_slot)
        whole = torch.frombuffer(self._segment.data, dtype=torch.uint8)
        self._regions = list(whole[HEADER_BYTES : HEADER_BYTES + payload].split(length))

    def write(self, source: torch.Tensor, runs: Sequence[Run]) -> None:
        for run in runs:
            copy_bytes(self._regions[run.region], run.offset, source, run.start, run.length)

    def close(self) -> None:
        self._regions = []
        self._segment.close()


class ShmPath:
    """Opens ShmLinks."""

    name = "shm"

    def open(self, register: Register) -> ShmLink:
        if not register.segment:
            raise DataPathUnavailable("the language server offers no shared memory")
        return ShmLink(register)

    def close(self) -> None:
        """Nothing is held besides the links."""
