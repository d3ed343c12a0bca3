"""A thousand rooms with checksums while the GPU is busy, over every transport; then everything that they held is back.

A command of its own (``python -m tests.gpu.endurance --help``), one of the steps of ``python -m tests.gpu``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from sglang_mm_conn.memory.device import CudaDevice, Device
from tests.connector.endpoints import BLOCKS, ROW_BYTES, STAGING_BYTES, TOKENS, TRANSPORTS, Ends
from tests.connector.processes import wait_for

IN_FLIGHT = 8
WARM_ROOMS = 100  # whatever is made once only is made in these
_MODEL_CYCLES = 500_000  # a fraction of a millisecond, which an embedding's own kernels take
# The engine keeps connections for later and returns its memory late; nothing of it may grow with the rooms.
_DESCRIPTORS_OVER = {"shm": 0, "mooncake": 8}
_GPU_BYTES_OVER = 64 << 20  # of the whole card: other processes and CUDA's own


class Pins:
    """Bytes of host memory that are pinned now, counted where they are pinned and unpinned."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.now += nbytes
            self.most = max(self.most, self.now)


class CountingCudaDevice(CudaDevice):
    def __init__(self, index: int, pins: Pins) -> None:
        super().__init__(index)
        self._pins = pins

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        unpin = super().pin(memory)
        if not memory.is_pinned():
            return unpin
        self._pins.add(memory.numel())

        def undo() -> None:
            unpin()
            self._pins.add(-memory.numel())

        return undo


class BusyGpu:
    """A thread that keeps the device computing, on a stream of its own, until it is closed."""

    def __init__(self, device: str) -> None:
        self.kernels = 0
        self._end = threading.Event()
        self._device = device
        self._thread = threading.Thread(target=self._run, name="busy", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        on_gpu = self._device == "cuda"
        side = 8192 if on_gpu else 128
        stream = torch.cuda.Stream() if on_gpu else None
        # In place, and no matrix product: cuBLAS would keep memory of its own for each stream.
        with torch.cuda.stream(stream):
            matrix = torch.rand(side, side, device=self._device)
            while not self._end.is_set():
                for _ in range(8 if on_gpu else 1):  # enough to be busy while this thread sleeps
                    matrix.sin_()
                    self.kernels += 1
                if stream is not None:
                    stream.synchronize()
                else:
                    time.sleep(0.001)

    def close(self) -> None:
        self._end.set()
        self._thread.join()


@dataclass(frozen=True)
class Held:
    """What this process holds."""

    descriptors: int
    pinned_bytes: int
    torch_bytes: int  # of GPU memory, in tensors
    gpu_bytes: int  # of the whole card, by the driver

    @classmethod
    def now(cls, device: str, pins: Pins) -> Held:
        gc.collect()
        torch_bytes = gpu_bytes = 0
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch_bytes = torch.cuda.memory_allocated()
            free, whole = torch.cuda.mem_get_info()
            gpu_bytes = whole - free
        return cls(len(os.listdir("/proc/self/fd")), pins.now, torch_bytes, gpu_bytes)

    def growth(self, before: Held, path: str) -> list[str]:
        allowed = {"descriptors": _DESCRIPTORS_OVER[path], "pinned_bytes": 0, "torch_bytes": 0}
        allowed["gpu_bytes"] = _GPU_BYTES_OVER
        return [
            f"{name} {getattr(before, name)} before, {getattr(self, name)} after"
            for name, over in allowed.items()
            if getattr(self, name) > getattr(before, name) + over
        ]


@dataclass
class Endurance:
    """One transport's rooms."""

    transport: str
    rooms: int = 0
    wrong: int = 0
    seconds: float = 0.0
    most_pinned_bytes: int = 0
    kernels: int = 0  # of the work that kept the device busy
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def transports_of(device: str) -> list[str]:
    """Every transport on a GPU, pools on it last: if Mooncake's engine crashes there, the others' figures are written.
    Without a GPU each data path once."""
    if device == "cuda":
        return sorted(TRANSPORTS, key=lambda transport: TRANSPORTS[transport][1] == "cuda")
    return list({path: transport for transport, (path, pool, _) in TRANSPORTS.items() if pool == "cpu"}.values())


def kept_pinned(transport: str, device: str) -> int:
    """Bytes that stay pinned: Mooncake's engines, with their staging memory, end with the process."""
    path, pool, embeddings = TRANSPORTS[transport]
    return STAGING_BYTES if device == "cuda" and path != "shm" and pool == "cpu" and embeddings == "cuda" else 0


def play(transport: str, device: str, rooms: int, seconds: float, seed: int) -> Endurance:
    """``rooms`` rooms over ``transport``, or as many as ``seconds`` allow."""
    result, pins = Endurance(transport), Pins()

    def make() -> Device:
        return CountingCudaDevice(torch.cuda.current_device(), pins) if device == "cuda" else Device()

    chance = random.Random(seed)
    ends = Ends(transport, make(), make(), checksum=True)
    busy = BusyGpu(device)  # before the baseline, which holds what its stream needs
    try:
        _pass(ends, device, WARM_ROOMS, time.monotonic() + seconds, Endurance(transport), chance)
        before = _at_rest(ends, device, pins)
        began = time.monotonic()
        _pass(ends, device, rooms, began + seconds, result, chance)
        result.seconds, result.kernels = time.monotonic() - began, busy.kernels
        after = _at_rest(ends, device, pins)
    finally:
        busy.close()
        ends.close()
    del ends
    gc.collect()
    result.most_pinned_bytes = pins.most
    result.before, result.after = asdict(before), asdict(after)
    result.problems += after.growth(before, "shm" if TRANSPORTS[transport][0] == "shm" else "mooncake")
    if pins.now != kept_pinned(transport, device):
        result.problems.append(f"{pins.now} bytes are pinned although everything is closed")
    if result.wrong:
        result.problems.append(f"{result.wrong} of {result.rooms} rooms with wrong bytes")
    return result


def _pass(ends: Ends, device: str, rooms: int, until: float, result: Endurance, chance: random.Random) -> None:
    waiting: deque[tuple[str, torch.Tensor]] = deque()

    def finish() -> None:
        room, expected = waiting.popleft()
        arrived = ends.finish(room)
        result.rooms += 1
        result.wrong += not torch.equal(arrived.cpu(), expected)

    while result.rooms + len(waiting) < rooms and time.monotonic() < until:
        expected = torch.randn(chance.randint(1, TOKENS), ROW_BYTES // 4)
        waiting.append((ends.begin(_made_by_a_model(expected, device)), expected))
        if len(waiting) >= IN_FLIGHT:
            finish()
    while waiting:
        finish()


def _at_rest(ends: Ends, device: str, pins: Pins) -> Held:
    """What is held when every block is free and every source released. Raises AssertionError where that never comes."""
    wait_for(lambda: ends.language.core.allocator.free_count == BLOCKS, "every block is free again")
    wait_for(lambda: not ends.encoder._sources, "every source is released")
    return Held.now(device, pins)


def _made_by_a_model(expected: torch.Tensor, device: str) -> torch.Tensor:
    """On a GPU: NaN until the stream has come to it."""
    if device != "cuda":
        return expected.clone()
    rows = torch.full_like(expected, float("nan"), device="cuda")
    torch.cuda._sleep(_MODEL_CYCLES)
    rows.copy_(expected.pin_memory(), non_blocking=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.endurance", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--rooms", type=int, default=1000, help="rooms over each transport (default: 1000)")
    parser.add_argument("--seconds", type=float, default=20.0, help="most seconds for each transport (default: 20)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args()
    os.environ.setdefault("MC_FORCE_TCP", "1")
    results: list[Endurance] = []
    for transport in transports_of(args.device):
        try:
            result = play(transport, args.device, args.rooms, args.seconds, args.seed)
        except Exception as error:  # the other transports are still tried
            result = Endurance(transport, problems=[f"{type(error).__name__}: {error}"])
        results.append(result)
        if args.json is not None:  # after each transport: a step that runs out of time leaves what it has
            args.json.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n")
        line = f"{transport}: {result.rooms} rooms, {result.wrong} wrong, {result.seconds:.1f} s"
        print(line, *result.problems, sep="\n  ", flush=True)
    return 1 if any(result.problems for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
