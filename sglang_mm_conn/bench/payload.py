"""The bytes of the embeddings: random, with the room's number written into every page.

All encoder processes send from one file and all language processes compare with it, which works because only one
transport is active at a time. It is a memfd of the benchmark's process, so that nothing is left behind however the
benchmark ends. With embeddings on a GPU, every process has a copy there.
"""

from __future__ import annotations

import mmap
import os

import numpy as np
import torch

from sglang_mm_conn.bench.transports.base import DTYPE, Room

PAGE_WORDS = 512  # 4 KiB of 8-byte words


class PayloadFile:
    """Owns the file; other processes of this user open it at ``path``."""

    def __init__(self, nbytes: int, seed: int = 1) -> None:
        self._fd = os.memfd_create("sglang-mm-conn-bench", os.MFD_CLOEXEC)
        os.posix_fallocate(self._fd, 0, nbytes)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        words = np.frombuffer(mmap.mmap(self._fd, nbytes), dtype=np.uint64)
        generator = np.random.default_rng(seed)
        for start in range(0, len(words), 1 << 20):
            chunk = words[start : start + (1 << 20)]
            chunk[:] = generator.integers(0, 1 << 64, len(chunk), dtype=np.uint64)

    def close(self) -> None:
        os.close(self._fd)


class Payload:
    """The file at ``path`` as ``slots`` tensors of up to ``nbytes`` bytes each."""

    def __init__(self, path: str, nbytes: int, slots: int) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            memory = mmap.mmap(fd, nbytes * slots, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        finally:
            os.close(fd)
        self._words = np.frombuffer(memory, dtype=np.uint64).reshape(slots, -1)
        self._tensors = list(torch.frombuffer(memory, dtype=torch.uint8).split(nbytes))

    def mark(self, slot: int, number: int) -> None:
        """Write the number of the room into every page of ``slot``."""
        self._words[slot, ::PAGE_WORDS] = number + 1

    def tensor(self, slot: int, room: Room) -> torch.Tensor:
        return self._tensors[slot][: room.nbytes].view(DTYPE).reshape(room.tokens, room.width)

    def mistake(self, slot: int, number: int, room: Room, got: torch.Tensor) -> str:
        """What is wrong with ``got``, compared byte by byte; empty if it is room ``number``. Marks the slot."""
        self.mark(slot, number)
        return self._mistake(self._tensors[slot][: room.nbytes], room, got)

    @staticmethod
    def _mistake(expected: torch.Tensor, room: Room, got: torch.Tensor) -> str:
        flat = got.reshape(-1).view(torch.uint8)
        if flat.numel() != room.nbytes:
            return f"{flat.numel()} bytes arrived, not {room.nbytes}"
        left, right = expected.view(torch.int64), flat.view(torch.int64)
        if torch.equal(left, right):
            return ""
        wrong = (left != right).nonzero().reshape(-1)
        return f"{len(wrong)} of {len(left)} words of 8 bytes are wrong, the first at byte {int(wrong[0]) * 8}"

    def mark_mistake(self, number: int, room: Room, got: torch.Tensor) -> str:
        """As ``mistake``, but compares the marks only: a few microseconds, for concurrent runs."""
        flat = got.reshape(-1).view(torch.uint8)
        if flat.numel() != room.nbytes:
            return f"{flat.numel()} bytes arrived, not {room.nbytes}"
        marks = self._marks(flat)
        if (marks == number + 1).all():
            return ""
        wrong = int(np.flatnonzero(marks != number + 1)[0])
        return f"the page at byte {wrong * PAGE_WORDS * 8} is room {int(marks[wrong]) - 1}'s, not room {number}'s"

    @staticmethod
    def _marks(flat: torch.Tensor) -> np.ndarray:
        return flat.numpy().view(np.uint64)[::PAGE_WORDS]


class CudaPayload(Payload):
    """The same bytes on this process's current GPU. ``mark`` waits for its writes, so that no transfer's time includes
    them."""

    def __init__(self, path: str, nbytes: int, slots: int) -> None:
        super().__init__(path, nbytes, slots)
        self._tensors = [tensor.to("cuda") for tensor in self._tensors]

    def mark(self, slot: int, number: int) -> None:
        self._tensors[slot].view(torch.int64)[::PAGE_WORDS] = number + 1
        torch.cuda.current_stream().synchronize()  # not the device: that would wait for the rooms in flight

    @staticmethod
    def _marks(flat: torch.Tensor) -> np.ndarray:
        return flat.view(torch.int64)[::PAGE_WORDS].cpu().numpy()


def open_payload(payload: tuple[str, int, int], device: str) -> Payload:
    """``device``: ``cpu`` or ``cuda``."""
    return CudaPayload(*payload) if device == "cuda" else Payload(*payload)
