"""What an endpoint lives on: the clock, threads, sockets, look-ups, memory, data paths.

Endpoints take all of it from here, so that a simulator can put a simulated one in its place (tests/simulator) and
drive the very same endpoints step by step.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor

from sglang_mm_conn.control.authentication import DeploymentKey
from sglang_mm_conn.control.bootstrap import BootstrapInfo, look_up
from sglang_mm_conn.control.client import ControlClient
from sglang_mm_conn.control.server import ControlServer
from sglang_mm_conn.control.thread import ControlCallbacks
from sglang_mm_conn.core.layout import Geometry
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.datapath.base import ReceivePath
from sglang_mm_conn.datapath.factory import receive_paths
from sglang_mm_conn.memory.copying import HOLD_GIL_BELOW, warm_up
from sglang_mm_conn.memory.device import Device
from sglang_mm_conn.memory.pool import BlockPool


class Runtime:
    """The real one."""

    # Embeddings up to this size, and at a language rank windows, are copied by the thread that received the message:
    # waking another takes about as long as copying as much. 1 MiB rooms took 0.8 times as long so, and a flow of them
    # was 1.4 times as fast.
    inline_limit_bytes = 2 << 20
    # Of the only embedding that is at an encoder, as much is written by the control thread: it need not be woken once
    # more to say so. Rooms of 4 MiB took 0.94 times as long so; of 16 MiB 0.99 on a quiet host and down to 0.8 on a
    # busy one, where waking takes longer (``bench --transports memcpy,shm --sizes 4M,16M`` with 2 MiB here and with
    # 16). Whoever comes next waits for that one copy, beside what a turn may take anyway (control.loop.BATCH_SECONDS):
    # memcpy's 16 MiB in docs/performance.md, and many times that where all cores are busy.
    uncontended_inline_limit_bytes = 16 << 20
    # Smaller results are copied out, so that they do not keep a whole block each; a view would not be cheaper.
    view_least_bytes = HOLD_GIL_BELOW + 1
    device = Device()

    def __init__(self, device: Device | None = None) -> None:
        """``device``: what this process computes on, if not on the CPU alone."""
        if device is not None:
            self.device = device
        warm_up()

    def clock(self) -> float:
        """Seconds; monotonic."""
        return time.monotonic()

    def start_thread(self, target: Callable[[], None], name: str) -> threading.Thread:
        """A daemon thread that runs ``target``."""
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        return thread

    def executor(self, threads: int, name: str) -> Executor:
        """Its threads are there from the beginning: starting one takes milliseconds, of somebody's first request."""
        executor = ThreadPoolExecutor(threads, name)
        all_started = threading.Barrier(threads)
        try:
            for _ in range(threads):
                executor.submit(all_started.wait)
        except BaseException:  # no more threads to be had: those that wait would keep the process from ending
            all_started.abort()
            executor.shutdown(wait=False)
            raise
        return executor

    def control_server(
        self, host: str, callbacks: ControlCallbacks, *, key: DeploymentKey | None, max_frame_bytes: int
    ) -> ControlServer:
        return ControlServer(host, callbacks, key=key, max_frame_bytes=max_frame_bytes)

    def control_client(
        self, callbacks: ControlCallbacks, *, key: DeploymentKey | None, max_frame_bytes: int
    ) -> ControlClient:
        return ControlClient(callbacks, key=key, max_frame_bytes=max_frame_bytes)

    def look_up(self, encoder_url: str, key: DeploymentKey | None, *, insecure: bool) -> BootstrapInfo:
        """Raises what ``control.bootstrap.look_up`` raises."""
        return look_up(encoder_url, key, insecure=insecure)

    def pool(self, geometry: Geometry, *, shared: bool, memory_device: str) -> BlockPool:
        """Raises MemoryUnavailable."""
        return BlockPool(geometry, shared=shared, device=self.device, memory_device=memory_device)

    def reserve_port(self) -> tuple[int, Callable[[], None]]:
        """A port that is this process's own, and how to give it up: a bound socket that never listens."""
        holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        holder.bind(("", 0))
        return int(holder.getsockname()[1]), holder.close

    def receive_paths(self, settings: Settings, host: str, pool: BlockPool) -> Mapping[str, ReceivePath]:
        """The paths into ``pool``, see datapath.factory. Raises DataPathUnavailable."""
        return receive_paths(settings, host, pool, self.reserve_port)
