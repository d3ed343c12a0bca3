"""The interface of a transport: ``Sender`` in the encoder process, ``Receiver`` in the language process.

A room is one embedding. The language process expects it and the encoder process prepares it, as servers do while the
encoder's model runs. Then its tensor is ready (``go``), and the measured time starts. It ends when ``Receiver.wait``
has returned a tensor with the same bytes.
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
    """What both ends are created with.

    Attributes:
        nbytes: Bytes of the largest room.
        width: bfloat16 values per row.
        in_flight: The most rooms in flight.
        block_size: Rows per block of the pool.
        key_file: The deployment key; empty for none.
        pool: ``contiguous``, ``fragmented`` (no two free blocks are adjacent), or ``windows`` (the pool holds an eighth
            of one embedding).
        result: ``default``, or ``copied`` (never a view of blocks).
        device: Where embeddings start and end, ``cpu`` or ``cuda``.
        pool_device: Where the language process's pool is, ``cpu`` or ``cuda``.
    """

    nbytes: int
    width: int
    in_flight: int
    block_size: int = 128
    key_file: str = ""
    pool: str = "contiguous"
    result: str = "default"
    device: str = "cpu"
    pool_device: str = "cpu"


def device_for(config: Config) -> Device:
    """The device of a transport's processes."""
    settings = Settings(pool_device=config.pool_device, embedding_device=config.device)
    return device_of(torch.device(config.device), settings)


class Sender(Protocol):
    """The encoder process's end."""

    def hello(self) -> dict[str, Any]:
        """What the other end needs to connect to this one."""

    def connect(self, peer: Mapping[str, Any]) -> None:
        """Connect to the other end, whose ``hello`` returned ``peer``."""

    def prepare(self, room: Room) -> None:
        """The size of ``room`` is known; its tensor is not ready."""

    def prepared(self, room: Room) -> bool:
        """Whether everything that does not need the tensor has been done, in both processes."""

    def go(self, room: Room, tensor: torch.Tensor) -> None:
        """The tensor is ready. The caller does not change it until ``wait`` has returned the room's name."""

    def wait(self, timeout: float) -> list[str]:
        """Names of rooms whose tensor may be changed again. Raises RuntimeError where a room failed."""

    def close(self) -> None:
        """Release everything."""


class Receiver(Protocol):
    """The language process's end."""

    def hello(self) -> dict[str, Any]:
        """What the other end needs to connect to this one."""

    def connect(self, peer: Mapping[str, Any]) -> None:
        """Connect to the other end, whose ``hello`` returned ``peer``. Returns when rooms can be expected."""

    def expect(self, room: Room) -> None:
        """A request waits for ``room`` from now on."""

    def wait(self, timeout: float) -> list[tuple[str, torch.Tensor]]:
        """Names and tensors of rooms that have arrived. Raises RuntimeError where a room failed."""

    def release(self, name: str) -> None:
        """The request has ended: the room's tensor is no longer used."""

    def close(self) -> None:
        """Release everything."""
