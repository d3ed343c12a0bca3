"""Raw TCP over loopback into a preallocated buffer: the upper bound on speed over a socket."""

from __future__ import annotations

import socket

import torch

from sglang_mm_conn.bench.transports.base import Config
from sglang_mm_conn.bench.transports.plain import ARRIVED, SlotReceiver, SlotSender


class TcpSender(SlotSender):
    """Sends the room's bytes after its slot number and size, on the same connection."""

    def send(self, slot: int, source: torch.Tensor) -> None:
        self.connection.sendall(bytes([slot]) + ARRIVED.pack(source.numel()))
        self.connection.sendall(memoryview(source.numpy()))


class TcpReceiver(SlotReceiver):
    def __init__(self, config: Config) -> None:
        super().__init__(config, torch.empty(config.in_flight * config.nbytes, dtype=torch.uint8))

    def receive(self, target: torch.Tensor) -> None:
        view = memoryview(target.numpy())
        done = 0
        while done < len(view):
            count = self.connection.recv_into(view[done:], 0, socket.MSG_WAITALL)
            if count == 0:
                raise ConnectionError("the other process has closed the connection")
            done += count
