"""An embedding that was handed over: its bytes, and the event after which they may be read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_mm_conn.memory.device import Device, Event


@dataclass(frozen=True, slots=True)
class Source:
    """Nobody reads ``rows`` before ``ready`` has happened: a GPU may still compute them."""

    rows: torch.Tensor  # uint8, one dimension
    ready: Event

    @classmethod
    def of(cls, embedding: torch.Tensor, device: Device) -> Source:
        """``embedding``: contiguous, computed on the stream that is current in the calling thread."""
        # Each operation on a tensor lets go of the GIL, and may wait for it.
        values = embedding.detach() if embedding.requires_grad else embedding
        rows = values.reshape(-1).view(torch.uint8)
        return cls(rows, device.mark(rows))

    def checksum(self, device: Device) -> int:
        """Of all bytes. It waits for a GPU: a checksum is for tests, and for finding faults."""
        self.ready.synchronize()
        return device.checksum(self.rows)
