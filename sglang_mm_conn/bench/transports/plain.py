"""Base of the transports ``memcpy``, ``tcp`` and ``engine``: preallocated slots and a socket.

The receiver owns ``in_flight`` slots, each as large as the largest room. The sender writes a room into a free slot and
then sends the slot's number and the room's size. Rooms arrive in the order in which they were expected. When a room is
released, the receiver sends the slot's number back, and the slot is free again.
"""

from __future__ import annotations

import select
import socket
import struct
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from sglang_mm_conn.bench.transports.base import HOST, Config, Room

ARRIVED = struct.Struct("<Q")  # bytes of the room


def recv_exactly(connection: socket.socket, count: int) -> bytes:
    """``count`` bytes from ``connection``. Raises ConnectionError where it ends before."""
    data = bytearray()
    while len(data) < count:
        chunk = connection.recv(count - len(data))
        if not chunk:
            raise ConnectionError("the other process has closed the connection")
        data += chunk
    return bytes(data)


class PlainSender:
    """A sender that prepares nothing, and whose ``go`` returns when the room is sent (and is then in ``ended``)."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    def hello(self) -> dict[str, Any]:
        return {}

    def prepare(self, room: Room) -> None:
        """Nothing to prepare."""

    def prepared(self, room: Room) -> bool:
        return True

    def wait(self, timeout: float) -> list[str]:
        ended, self.ended = self.ended, []
        return ended


class SlotSender(PlainSender):
    """Waits for a free slot, writes the tensor into it (``write``), then sends the slot's number."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._free = deque(range(config.in_flight))
        self.connection: socket.socket

    def connect(self, peer: Mapping[str, Any]) -> None:
        self.connection = socket.create_connection((HOST, peer["port"]))
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def go(self, room: Room, tensor: torch.Tensor) -> None:
        while not self._free or select.select([self.connection], [], [], 0)[0]:
            self._free.append(recv_exactly(self.connection, 1)[0])
        self.send(self._free.popleft(), tensor.reshape(-1).view(torch.uint8))
        self.ended.append(room.name)

    def send(self, slot: int, source: torch.Tensor) -> None:
        self.write(slot, source)
        self.connection.sendall(bytes([slot]) + ARRIVED.pack(source.numel()))

    def write(self, slot: int, source: torch.Tensor) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.connection.close()


class SlotReceiver:
    """Owns the slots."""

    def __init__(self, config: Config, memory: torch.Tensor) -> None:
        """``memory``: uint8, ``in_flight`` slots. It is written once here, so that no run pays for page faults."""
        memory.fill_(1)
        self.slots = list(memory.split(config.nbytes))
        self._expected: deque[Room] = deque()
        self._used: dict[str, int] = {}
        self._listener = socket.create_server((HOST, 0))
        self.connection: socket.socket

    def hello(self) -> dict[str, Any]:
        return {"port": self._listener.getsockname()[1]}

    def connect(self, peer: Mapping[str, Any]) -> None:
        self.connection, _ = self._listener.accept()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def expect(self, room: Room) -> None:
        self._expected.append(room)

    def wait(self, timeout: float) -> list[tuple[str, torch.Tensor]]:
        if not select.select([self.connection], [], [], timeout)[0]:
            return []
        head = recv_exactly(self.connection, 1 + ARRIVED.size)
        slot, (nbytes,) = head[0], ARRIVED.unpack(head[1:])
        target = self.slots[slot][:nbytes]
        self.receive(target)
        room = self._expected.popleft()
        self._used[room.name] = slot
        return [(room.name, target)]

    def receive(self, target: torch.Tensor) -> None:
        """Receive the room into ``target``; nothing to do where the sender has written it there."""

    def release(self, name: str) -> None:
        self.connection.sendall(bytes([self._used.pop(name)]))

    def close(self) -> None:
        self.connection.close()
        self._listener.close()
