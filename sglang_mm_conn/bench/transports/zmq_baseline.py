"""The copies of ``shm`` and bare ZeroMQ messages: lower bound on latency for any ZeroMQ-based transport, one room at
a time.

No threads beside libzmq's, no state machine, no lock, no codec: the thread that waits for a room does all the work for
it, and rooms never overlap. What ``shm`` takes longer is the cost of this connector's own code and threads.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
import zmq

from sglang_mm_conn.bench.transports.base import DTYPE, HOST, Config, Room
from sglang_mm_conn.bench.transports.connector import pool_blocks
from sglang_mm_conn.bench.transports.plain import PlainSender
from sglang_mm_conn.memory.copying import copy_slices
from sglang_mm_conn.memory.segment import HEADER_BYTES, AttachedSegment, Segment

_WRITTEN = struct.Struct("<BQ?")  # slot, bytes in it, whether they are the last of the room
_PATIENCE_MS = 60_000  # a ZeroMQ socket does not report that its peer has ended
_GO_ON = b""  # the window was read; any other answer is the number of a slot that became free


def _slots(config: Config) -> tuple[int, int]:
    """(Number of slots, bytes of a slot): one slot per room in flight, or one of the size of a window."""
    if config.pool == "windows":
        return 1, pool_blocks(config) * config.block_size * config.width * DTYPE.itemsize
    return config.in_flight, config.nbytes


def _pair() -> tuple[zmq.Context[Any], zmq.Socket[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.RCVTIMEO, _PATIENCE_MS)
    socket.setsockopt(zmq.SNDTIMEO, _PATIENCE_MS)
    return context, socket


class ZmqBaselineSender(PlainSender):
    def __init__(self, config: Config) -> None:
        super().__init__()
        count, self._slot_bytes = _slots(config)
        self._free = deque(range(count))
        self._pool_bytes = count * self._slot_bytes
        self._context, self._socket = _pair()

    def connect(self, peer: Mapping[str, Any]) -> None:
        self._segment = AttachedSegment(peer["segment"], peer["nonce"], self._pool_bytes, 0)
        self._pool = torch.frombuffer(self._segment.data, dtype=torch.uint8)[HEADER_BYTES:]
        self._socket.connect(f"tcp://{HOST}:{peer['port']}")

    def go(self, room: Room, tensor: torch.Tensor) -> None:
        source = tensor.reshape(-1).view(torch.uint8)
        while not self._free:
            self._hear()
        slot = self._free.popleft()
        for start in range(0, source.numel(), self._slot_bytes):
            nbytes = min(self._slot_bytes, source.numel() - start)
            last = start + nbytes == source.numel()
            copy_slices([(self._pool, slot * self._slot_bytes, source, start, nbytes)])
            self._socket.send(_WRITTEN.pack(slot, nbytes, last))
            while not last and self._hear():
                pass
        self.ended.append(room.name)

    def _hear(self) -> bool:
        """Wait for an answer: True if a slot became free, False if the window that was written was read."""
        answer = self._socket.recv()
        if answer == _GO_ON:
            return False
        self._free.append(answer[0])
        return True

    def close(self) -> None:
        self._context.destroy(linger=0)
        del self._pool
        self._segment.close()


class ZmqBaselineReceiver:
    """Rooms arrive in the order in which they are expected."""

    def __init__(self, config: Config) -> None:
        count, self._slot_bytes = _slots(config)
        self._segment = Segment(count * self._slot_bytes)
        self._pool = torch.frombuffer(self._segment.data, dtype=torch.uint8)[HEADER_BYTES:]
        self._copies = config.result == "copied" or config.pool == "windows"
        results = config.in_flight if self._copies else 0
        self._results = [
            torch.ones(config.nbytes, dtype=torch.uint8) for _ in range(results)
        ]  # free results, written once so that no run pays for page faults
        self._expected: deque[Room] = deque()
        self._used: dict[str, int | torch.Tensor] = {}  # by room: its slot, or its result
        self._context, self._socket = _pair()
        self._port = self._socket.bind_to_random_port(f"tcp://{HOST}")

    def hello(self) -> dict[str, Any]:
        return {"port": self._port, "segment": self._segment.name, "nonce": self._segment.nonce}

    def connect(self, peer: Mapping[str, Any]) -> None:
        """Nothing to do: the sender connects."""

    def expect(self, room: Room) -> None:
        self._expected.append(room)

    def wait(self, timeout: float) -> list[tuple[str, torch.Tensor]]:
        if not self._socket.poll(int(timeout * 1000)):
            return []
        room = self._expected.popleft()
        return [(room.name, self._copied(room) if self._copies else self._view(room))]

    def _view(self, room: Room) -> torch.Tensor:
        slot, nbytes, _ = _WRITTEN.unpack(self._socket.recv())
        self._used[room.name] = slot
        return self._pool[slot * self._slot_bytes :][:nbytes]

    def _copied(self, room: Room) -> torch.Tensor:
        self._used[room.name] = result = self._results.pop()
        done, last = 0, False
        while not last:
            slot, nbytes, last = _WRITTEN.unpack(self._socket.recv())
            copy_slices([(result, done, self._pool, slot * self._slot_bytes, nbytes)])
            self._socket.send(bytes([slot]) if last else _GO_ON)
            done += nbytes
        return result[:done]

    def release(self, name: str) -> None:
        used = self._used.pop(name)
        if isinstance(used, torch.Tensor):
            self._results.append(used)
        else:
            self._socket.send(bytes([used]))

    def close(self) -> None:
        self._context.destroy(linger=0)
        del self._pool
        self._segment.close()
