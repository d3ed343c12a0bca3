"""Owns what transfers need of the compute device: where memory lives, and when a copy has completed.

The rules about who owns a byte are the same as on the host. But a call only queues work on a GPU, so two waits are
needed in addition (P2 in docs/protocol.md):

- A source may be read only after the event of the work that wrote it. ``mark`` records that event when an embedding is
  handed over, and the transfer worker waits for it before its data call.
- A copy has completed only after its event. ``copy`` waits for it before it returns. So a worker that sends Done, a
  copier that frees blocks and a room that releases its source need not know of events.

Worker and copier threads wait. The scheduler's tick and the encoder's event loop only record marks. This is enough for
any number of streams on the consumer's side: before a room succeeds, the host has waited for the events of all its
copies, so work that the consumer queues afterwards, on any stream, runs after them.

docs/gpu.md lists which GPU code was run, and on which card. tests/memory/asynchronous.py has a device for tests whose
copies complete as late as this interface allows.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import zlib
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from sglang_mm_conn.core.errors import ConnError, MemoryUnavailable
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.memory.copying import Slice, check_within, copy_slices

logger = logging.getLogger(__name__)

_CHECKSUM_SLICE = 16 << 20
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context of the process


class Event(Protocol):
    """A point in queued work."""

    def synchronize(self) -> None:
        """Return when all work before this point has completed."""


class Queue(Protocol):
    """The copies of one thread, made in order."""

    def copy(self, slices: Iterable[Slice]) -> None:
        """Queue copies. Each is made at some point before ``synchronize`` returns. Until then, neither side may
        change."""

    def synchronize(self) -> None:
        """Return when every copy has completed."""


class _Happened:
    """For host memory: ``copy`` has completed when it returns."""

    copy = staticmethod(copy_slices)

    def synchronize(self) -> None:
        """Nothing to wait for."""


_HAPPENED = _Happened()


class Device:
    """For a process without a GPU, or whose transfers use only host memory. Thread-safe, like its subclasses."""

    name = "cpu"
    memory_devices: tuple[str, ...] = ("cpu",)  # the kinds of memory that it has
    # Whether no copy is under way once ``copy`` has returned or raised.
    synchronous = True

    def require(self, settings: Settings) -> None:
        """Raises MemoryUnavailable if a setting asks for memory that this device does not have. It names the
        setting."""
        for variable, memory_device in (
            ("SGLANG_MM_CONN_POOL_DEVICE", settings.pool_device),
            ("SGLANG_MM_CONN_EMBEDDING_DEVICE", settings.resolved_embedding_device),
        ):
            if memory_device not in self.memory_devices:
                raise MemoryUnavailable(f"{variable}={memory_device}, but this process computes on {self.name}")

    def empty(self, nbytes: int, memory_device: str) -> torch.Tensor:
        """New memory (uint8, one dimension). No earlier work still reads or writes it. Raises MemoryUnavailable."""
        if memory_device not in self.memory_devices:
            raise MemoryUnavailable(f"no {memory_device} memory in a process that computes on {self.name}")
        return torch.empty(nbytes, dtype=torch.uint8)

    def mark(self, tensor: torch.Tensor) -> Event:
        """The event after which ``tensor`` has the values that the calling thread computes on its current stream.

        Raises ConnError if the tensor is on a device that this one does not know.
        """
        if not tensor.is_cpu:
            raise ConnError(f"an embedding on {tensor.device}, where embeddings are expected on {self.name}")
        return _HAPPENED

    def copy(self, slices: Iterable[Slice]) -> None:
        """Make all copies. Every byte is in place when this returns. May wait."""
        queue = self._queue()
        try:
            queue.copy(slices)
        finally:
            queue.synchronize()  # after an error too, since the caller then frees both memories

    def drain(self) -> None:
        """Wait for the work that the calling thread has queued on its current stream."""

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        """Pin ``memory``, so that a GPU copies from and to it at full rate. Returns the function that unpins it.

        The caller must unpin it before the memory is unmapped, and while no copy is under way."""
        return lambda: None

    def checksum(self, memory: torch.Tensor) -> int:
        """CRC-32 of ``memory`` (uint8, one dimension), on the host or a GPU. May wait."""
        return zlib.crc32(memory.numpy())

    def _queue(self) -> Queue:
        return _HAPPENED


def checksum_in_slices(device: Device, memory: torch.Tensor) -> int:
    """CRC-32 of memory that the CPU cannot read: copies it to the host slice by slice."""
    value = 0
    for slice_ in memory.split(_CHECKSUM_SLICE):
        on_host = torch.empty_like(slice_, device="cpu")
        device.copy([(on_host, 0, slice_, 0, slice_.numel())])
        value = zlib.crc32(on_host.numpy(), value)
    return value


class CudaDevice(Device):
    """For a process that computes on GPU ``index``: GPU memory and host memory."""

    memory_devices = ("cpu", "cuda")
    synchronous = False  # after a CUDA error, copies may still be under way

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        self._device = torch.device("cuda", index)
        self._threads = threading.local()

    def empty(self, nbytes: int, memory_device: str) -> torch.Tensor:
        if memory_device == "cpu":
            return torch.empty(nbytes, dtype=torch.uint8)
        # Hazard: torch's allocator reuses memory as soon as its tensor is gone, although queued work may still read it.
        # The reuse is safe only for work that is queued later on the stream that the memory was allocated on, and the
        # connector copies on separate streams. So allocate on the current stream, which is the default stream in the
        # connector's threads, and wait until that stream has reached this point. A consumer that reads the memory on
        # another stream than the default one must call Tensor.record_stream before it releases the tensor, as sglang
        # 0.5.23 does.
        try:
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            raise MemoryUnavailable(f"cannot allocate {nbytes >> 20} MiB of memory on {self.name}: {error}") from error
        self.drain()
        return memory

    def mark(self, tensor: torch.Tensor) -> Event:
        if not tensor.is_cuda:
            return _HAPPENED
        # blocking: a waiting thread sleeps. By default it would spin, which is too costly with many workers.
        event: Event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(tensor.device))  # type: ignore[attr-defined]
        return event

    def drain(self) -> None:
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        event.synchronize()

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        # The calls below use the thread's current GPU, which is GPU 0 in a new thread.
        cudart: Any = torch.cuda.cudart()
        with torch.cuda.device(self._device):
            code = cudart.cudaHostRegister(memory.data_ptr(), memory.numel(), _PORTABLE)
            if code != cudart.cudaError.success:
                logger.warning(
                    "%d MiB of host memory could not be pinned (CUDA error %s): copies between them and %s are slower",
                    memory.numel() >> 20, code, self.name,
                )  # fmt: skip
                # Clear the error: otherwise the next kernel that this thread launches would raise it.
                with contextlib.suppress(RuntimeError):
                    torch.zeros(1, device=self._device)
                return lambda: None

        def unpin() -> None:
            with torch.cuda.device(self._device):
                torch.cuda.synchronize()  # the connector no longer reads it, but a consumer may through a view
                cudart.cudaHostUnregister(memory.data_ptr())

        return unpin

    def checksum(self, memory: torch.Tensor) -> int:
        return checksum_in_slices(self, memory) if memory.is_cuda else super().checksum(memory)

    def _queue(self) -> Queue:
        stream = getattr(self._threads, "stream", None)
        if stream is None:
            stream = self._threads.stream = torch.cuda.Stream(self._device)
        return _CudaQueue(stream)


class _CudaQueue:
    """Copies on a separate stream per thread, so that they do not wait for any kernel."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._used = False

    def copy(self, slices: Iterable[Slice]) -> None:
        within_host, others = [], []
        for slice_ in slices:
            target, _, source, _, _ = slice_
            if not (target.is_cuda or source.is_cuda):
                within_host.append(slice_)
                continue
            check_within(slice_)  # slicing would cut it short, and copy_ would broadcast one element
            others.append(slice_)
        if others:
            self._used = True
            with torch.cuda.stream(self._stream):  # enter it once: that takes longer than queueing a copy
                for target, at, source, start, nbytes in others:
                    target[at : at + nbytes].copy_(source[start : start + nbytes], non_blocking=True)
        copy_slices(within_host)

    def synchronize(self) -> None:
        if self._used:
            event = torch.cuda.Event(blocking=True)
            event.record(self._stream)
            event.synchronize()


def device_of(device: torch.device, settings: Settings) -> Device:
    """The Device of a process that computes on ``device``, under ``settings``.

    Accelerators other than CUDA count as none. A process that keeps embeddings and pool on the host makes no GPU
    copies, so it waits for no event and pins no memory."""
    if device.type != "cuda" or (settings.pool_device, settings.resolved_embedding_device) == ("cpu", "cpu"):
        return Device()
    return CudaDevice(torch.cuda.current_device() if device.index is None else device.index)
