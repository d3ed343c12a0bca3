"""A device for tests: what a GPU does to those who forget to wait for it.

Its memory is the host's, but whatever is asked of it happens as late as it may: a producer's work when its mark is
waited for, a thread's copies when that thread waits for its queue (or, some of them, earlier, by chance). New memory
holds garbage. ``hold`` keeps waits of one kind from returning, and nothing that they wait for happens meanwhile.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterable

import torch

from sglang_mm_conn.memory.copying import Slice, copy_slices
from sglang_mm_conn.memory.device import Device, Event, Queue, checksum_in_slices

GARBAGE = 0xA5


class _Mark:
    def __init__(self, device: AsynchronousDevice, work: list[Callable[[], object]]) -> None:
        self._device = device
        self._work = work

    def synchronize(self) -> None:
        self._device.pause("marks")
        while self._work:
            self._work.pop(0)()


class _Copies:
    def __init__(self, device: AsynchronousDevice) -> None:
        self._device = device
        self._queued: deque[Slice] = deque()

    def copy(self, slices: Iterable[Slice]) -> None:
        for slice_ in slices:
            self._queued.append(slice_)
            if self._device.happens_early():
                self._next()

    def synchronize(self) -> None:
        if self._queued:
            self._device.pause("copies")
        while self._queued:
            self._next()

    def _next(self) -> None:
        copy_slices([self._queued.popleft()])


class AsynchronousDevice(Device):
    """``early``: how likely a copy is to happen before anybody waits for it."""

    name = "asynchronous"
    memory_devices = ("cpu", "cuda")  # as far as anybody can tell
    synchronous = False

    def __init__(self, early: float = 0.0, seed: int = 0) -> None:
        self._early = early
        self._chance = random.Random(seed)
        self._held: set[str] = set()
        self._changed = threading.Condition()
        self._made: list[Callable[[], object]] = []
        self.waiting = threading.Semaphore(0)  # one for each wait that is or was held
        self.pinned: list[int] = []

    # -- what a test does ------------------------------------------------------------------------------------------

    def hold(self, what: str) -> None:
        """``what``: marks or copies."""
        self._held.add(what)

    def let_go(self) -> None:
        with self._changed:
            self._held.clear()
            self._changed.notify_all()

    def pause(self, what: str) -> None:
        if what in self._held:
            self.waiting.release()
        with self._changed:
            if not self._changed.wait_for(lambda: what not in self._held, 60):
                raise RuntimeError(f"the test never let the {what} go")

    def produce(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """A model computes ``values`` into ``target``, which is handed over next."""
        self._made.append(lambda: target.copy_(values))

    def happens_early(self) -> bool:
        return not self._held and self._chance.random() < self._early

    # -- what a device is asked --------------------------------------------------------------------------------------

    def empty(self, nbytes: int, memory_device: str) -> torch.Tensor:
        return torch.full((nbytes,), GARBAGE, dtype=torch.uint8)

    def mark(self, tensor: torch.Tensor) -> Event:
        work, self._made = self._made, []
        return _Mark(self, work)

    def drain(self) -> None:
        self.mark(torch.empty(0)).synchronize()

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        self.pinned.append(memory.data_ptr())
        return lambda: self.pinned.remove(memory.data_ptr())

    def checksum(self, memory: torch.Tensor) -> int:
        return checksum_in_slices(self, memory)

    def _queue(self) -> Queue:
        return _Copies(self)


class CarelessDevice(AsynchronousDevice):
    """One that says that copies have happened when they were only asked for: the mistake that the tests must notice."""

    def _queue(self) -> Queue:
        queue = _Copies(self)
        queue.synchronize = lambda: None  # type: ignore[method-assign]
        return queue
