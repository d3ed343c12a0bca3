"""What a process computes on, as its transfers need to know it: where memory is, and when a copy has happened.

Who owns a byte is decided as on the host. Work on a GPU is only queued by the call that asks for it, so two waits come
in addition (promise P2):

- a source may be read only after the event that wrote it. ``mark`` takes that event when an embedding is handed over,
  and the transfer worker waits for it before its data call.
- a copy has happened only after its event. ``copy`` waits for it before it returns, so a worker that says Done, a
  copier that frees blocks and a room that lets go of its source need to know nothing of events.

Worker and copier threads wait; the scheduler's tick and the encoder's event loop only take marks. This holds for any
number of streams on the consumer's side as well: when a room is said to have succeeded, the events of all its copies
were waited for on the host, so whatever the consumer queues afterwards, on any stream, comes after them.

docs/gpu.md says what of the GPU half was run, and on which card. tests/memory/asynchronous.py is a device whose
copies happen as late as they may, for everything above it.
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
        """Return when everything before it has happened."""


class Queue(Protocol):
    """Copies of one thread, done in order."""

    def copy(self, slices: Iterable[Slice]) -> None:
        """Done at any moment up to the end of ``synchronize``; nobody may change either side meanwhile."""

    def synchronize(self) -> None:
        """Return when every copy is in place."""


class _Happened:
    """Host memory: copies are in place when it returns."""

    copy = staticmethod(copy_slices)

    def synchronize(self) -> None:
        """There is nothing to wait for."""


_HAPPENED = _Happened()


class Device:
    """A process without a GPU, or whose transfers have nothing to do with it. Thread-safe, as are the others."""

    name = "cpu"
    memory_devices: tuple[str, ...] = ("cpu",)  # where there is memory
    # Whether nothing is under way any more when ``copy`` has ended, however it ended.
    synchronous = True

    def require(self, settings: Settings) -> None:
        """Raises MemoryUnavailable where ``settings`` ask for memory that is not there, naming the one that does."""
        for variable, memory_device in (
            ("SGLANG_MM_CONN_POOL_DEVICE", settings.pool_device),
            ("SGLANG_MM_CONN_EMBEDDING_DEVICE", settings.resolved_embedding_device),
        ):
            if memory_device not in self.memory_devices:
                raise MemoryUnavailable(f"{variable}={memory_device}, but this process computes on {self.name}")

    def empty(self, nbytes: int, memory_device: str) -> torch.Tensor:
        """New memory (uint8, one dimension) that nobody reads or writes any more. Raises MemoryUnavailable."""
        if memory_device not in self.memory_devices:
            raise MemoryUnavailable(f"there is no {memory_device} memory in a process that computes on {self.name}")
        return torch.empty(nbytes, dtype=torch.uint8)

    def mark(self, tensor: torch.Tensor) -> Event:
        """The event after which ``tensor`` is as the calling thread has made it (on the stream current in it).

        Raises ConnError where this device knows nothing of the tensor's.
        """
        if not tensor.is_cpu:
            raise ConnError(f"an embedding on {tensor.device}, where embeddings are expected on {self.name}")
        return _HAPPENED

    def copy(self, slices: Iterable[Slice]) -> None:
        """Every byte is in place when this returns. May wait."""
        queue = self._queue()
        try:
            queue.copy(slices)
        finally:
            queue.synchronize()  # after an error too: the caller will give both memories back

    def drain(self) -> None:
        """Wait for what the calling thread has queued on its current stream."""

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        """Let the GPU, where there is one, copy from and to ``memory`` at full rate. Returns how to undo it, which must
        be done before the memory is unmapped, with no copy under way."""
        return lambda: None

    def checksum(self, memory: torch.Tensor) -> int:
        """CRC-32 of ``memory`` (uint8, one dimension), wherever it is. May wait."""
        return zlib.crc32(memory.numpy())

    def _queue(self) -> Queue:
        return _HAPPENED


def checksum_in_slices(device: Device, memory: torch.Tensor) -> int:
    """CRC-32 of memory that the CPU cannot read."""
    value = 0
    for slice_ in memory.split(_CHECKSUM_SLICE):
        on_host = torch.empty_like(slice_, device="cpu")
        device.copy([(on_host, 0, slice_, 0, slice_.numel())])
        value = zlib.crc32(on_host.numpy(), value)
    return value


class CudaDevice(Device):
    """A process that computes on GPU ``index``: its own memory, and the host's."""

    memory_devices = ("cpu", "cuda")
    synchronous = False  # what is under way after a CUDA error is not known

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        self._device = torch.device("cuda", index)
        self._threads = threading.local()

    def empty(self, nbytes: int, memory_device: str) -> torch.Tensor:
        if memory_device == "cpu":
            return torch.empty(nbytes, dtype=torch.uint8)
        # Hazard: torch's allocator hands memory out again as soon as its tensor is gone, although work that reads it
        # may still be queued; it is safe only for work queued behind that, on the stream that it was allocated on. Our
        # copies run on streams of their own. So: allocate on the stream that is current here, which is the default one
        # in a thread of ours, and wait until that has come to this point. A consumer that reads the memory on another
        # stream than the default one says so with Tensor.record_stream before it lets go, as sglang 0.5.23 does.
        try:
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            raise MemoryUnavailable(f"{nbytes >> 20} MiB of memory of {self.name}: {error}") from error
        self.drain()
        return memory

    def mark(self, tensor: torch.Tensor) -> Event:
        if not tensor.is_cuda:
            return _HAPPENED
        # blocking: a waiting thread sleeps. The default spins, and there are many workers.
        event: Event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(tensor.device))  # type: ignore[attr-defined]
        return event

    def drain(self) -> None:
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        event.synchronize()

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        # The calls below work on the thread's own current GPU, which is 0 in a new thread.
        cudart: Any = torch.cuda.cudart()
        with torch.cuda.device(self._device):
            code = cudart.cudaHostRegister(memory.data_ptr(), memory.numel(), _PORTABLE)
            if code != cudart.cudaError.success:
                logger.warning(
                    "%d MiB of host memory could not be pinned (CUDA error %s): copies between them and %s are slower",
                    memory.numel() >> 20, code, self.name,
                )  # fmt: skip
                # The error would be found, and raised, by the next kernel that this thread launches.
                with contextlib.suppress(RuntimeError):
                    torch.zeros(1, device=self._device)
                return lambda: None

        def unpin() -> None:
            with torch.cuda.device(self._device):
                torch.cuda.synchronize()  # nobody reads it here, but a consumer may hold a view of it
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
    """Copies on a stream of the calling thread's own, so that they wait for nobody's kernels."""

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
            with torch.cuda.stream(self._stream):  # once: to enter it takes longer than to queue a copy
                for target, at, source, start, nbytes in others:
                    target[at : at + nbytes].copy_(source[start : start + nbytes], non_blocking=True)
        copy_slices(within_host)

    def synchronize(self) -> None:
        if self._used:
            event = torch.cuda.Event(blocking=True)
            event.record(self._stream)
            event.synchronize()


def device_of(device: torch.device, settings: Settings) -> Device:
    """What a process that computes on ``device`` needs under ``settings``. Accelerators other than CUDA's count as
    none; and one that keeps embeddings and pool on the host copies to no GPU: it waits for nothing and pins nothing."""
    if device.type != "cuda" or (settings.pool_device, settings.resolved_embedding_device) == ("cpu", "cpu"):
        return Device()
    return CudaDevice(torch.cuda.current_device() if device.index is None else device.index)
