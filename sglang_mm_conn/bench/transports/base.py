"""What a transport of moving an embedding must be able to do, at its two ends: the same work for all of them.

A room is one embedding. The language process expects it, the encoder process prepares it; both may happen while a real
encoder's model still runs. Then its tensor is ready (``go``), and the transport's own time begins. It ends when the
language process holds a tensor with these bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.memory.device import Device, device_of

HOST = "127.0.0.1"
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Room:
    """One embedding: ``tokens`` rows of ``width`` bfloat16 values."""

    name: str
    tokens: int
    width: int

    @property
    def nbytes(self) -> int:
        return self.tokens * self.width * DTYPE.itemsize


@dataclass(frozen=True)
class Config:
    """What both ends are made with: the largest room, how many are in flight at a time, and what a transport may
    vary."""

    nbytes: int
    width: int
    in_flight: int
    block_size: int = 128
    key_file: str = ""
    pool: str = "contiguous"  # or "fragmented", or "windows": an eighth of one embedding
    result: str = "default"  # or "copied": never a view of blocks
    device: str = "cpu"  # or "cuda": where an embedding begins and ends
    pool_device: str = "cpu"  # or "cuda": where the language side's pool is


def device_for(config: Config) -> Device:
    """What a process of a transport computes on."""
    settings = Settings(pool_device=config.pool_device, embedding_device=config.device)
    return device_of(torch.device(config.device), settings)


class Sender(Protocol):
    """The encoder process's end."""

    def hello(self) -> dict[str, Any]:
        """What the other end needs to find this one."""

    def connect(self, peer: Mapping[str, Any]) -> None:
        """The other end has said this."""

    def prepare(self, room: Room) -> None:
        """The size of ``room`` is known, its tensor is not there yet."""

    def prepared(self, room: Room) -> bool:
        """Whether all that can happen before the tensor is there has happened."""

    def go(self, room: Room, tensor: torch.Tensor) -> None:
        """The tensor is ready. It does not change until ``wait`` has named the room."""

    def wait(self, timeout: float) -> list[str]:
        """Rooms whose tensor this side needs no more. Raises RuntimeError where one failed."""

    def close(self) -> None:
        """Give everything up."""


class Receiver(Protocol):
    """The language process's end."""

    def hello(self) -> dict[str, Any]:
        """What the other end needs to find this one."""

    def connect(self, peer: Mapping[str, Any]) -> None:
        """The other end has said this. Returns when rooms can be expected."""

    def expect(self, room: Room) -> None:
        """A request waits for ``room``."""

    def wait(self, timeout: float) -> list[tuple[str, torch.Tensor]]:
        """Rooms that have arrived, with their tensors. Raises RuntimeError where one failed."""

    def release(self, name: str) -> None:
        """The request has ended: the tensor of this room is needed no more."""

    def close(self) -> None:
        """Give everything up."""
