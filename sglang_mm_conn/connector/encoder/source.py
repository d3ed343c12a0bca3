"""Owns an embedding that was handed over: its bytes, and the event after which they may be read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_mm_conn.memory.device import Device, Event


@dataclass(frozen=True, slots=True)
class Source:
    """A reader of ``rows`` waits for ``ready`` first: a GPU may still be computing them."""

    rows: torch.Tensor  # uint8, one dimension
    ready: Event

    @classmethod
    def of(cls, embedding: torch.Tensor, device: Device) -> Source:
        """``embedding``: contiguous, computed on the calling thread's current stream."""
        # As few tensor operations as possible: each releases the GIL, and may wait to get it back.
        values = embedding.detach() if embedding.requires_grad else embedding
        rows = values.reshape(-1).view(torch.uint8)
        return cls(rows, device.mark(rows))

    def checksum(self, device: Device) -> int:
        """CRC-32 of all bytes. Waits for the GPU: checksums are for tests and for finding faults."""
        self.ready.synchronize()
        return device.checksum(self.rows)
