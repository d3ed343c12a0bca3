"""Owns everything an endpoint takes from the operating system: clock, threads, sockets, look-ups, memory, data paths.

Endpoints get all of it from a ``Runtime``. The simulator (tests/simulator) replaces it, and so drives the unchanged
endpoints step by step.
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
    """The operating system's clock, threads, sockets and memory. The simulator replaces this class."""

    # An encoder writes embeddings up to this size inline, and a language rank copies out windows up to this size
    # inline: waking another thread takes about as long as copying this much. Inline, rooms of 1 MiB took 0.8 times as
    # long one at a time, and many concurrent rooms reached 1.4 times the rate.
    inline_limit_bytes = 2 << 20
    # If an embedding is uncontended, the control thread writes up to this much of it inline: a worker would have to
    # wake the control thread again to send the confirmation. Inline, rooms of 4 MiB took 0.94 times as long; rooms of
    # 16 MiB took 0.99 times as long on a quiet host and down to 0.8 on a busy one, where waking takes longer (``bench
    # --transports memcpy,shm --sizes 4M,16M`` with 2 MiB here and with 16). Messages that arrive meanwhile wait for
    # this one copy, in addition to what a batch may take (control.limits.BATCH_SECONDS). docs/performance.md has
    # memcpy's time for 16 MiB; the copy takes many times as long if all cores are busy.
    uncontended_inline_limit_bytes = 16 << 20
    # Smaller results are copied out: a view of one would keep a whole block and cost no less than the copy.
    view_least_bytes = HOLD_GIL_BELOW + 1
    device = Device()

    def __init__(self, device: Device | None = None) -> None:
        """``device``: the device that this process computes on; without one, the CPU."""
        if device is not None:
            self.device = device
        warm_up()

    def clock(self) -> float:
        """Seconds; monotonic."""
        return time.monotonic()

    def start_thread(self, target: Callable[[], None], name: str) -> threading.Thread:
        """Start a daemon thread that runs ``target``."""
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        return thread

    def executor(self, threads: int, name: str) -> Executor:
        """All its threads run when this returns: starting one takes milliseconds, which the first request would pay."""
        executor = ThreadPoolExecutor(threads, name)
        all_started = threading.Barrier(threads)
        try:
            for _ in range(threads):
                executor.submit(all_started.wait)
        except BaseException:  # a thread could not be started: those at the barrier would keep the process from ending
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
        """See ``control.bootstrap.look_up``, also for what this raises."""
        return look_up(encoder_url, key, insecure=insecure)

    def pool(self, geometry: Geometry, *, shared: bool, memory_device: str) -> BlockPool:
        """Raises MemoryUnavailable."""
        return BlockPool(geometry, shared=shared, device=self.device, memory_device=memory_device)

    def reserve_port(self) -> tuple[int, Callable[[], None]]:
        """Reserve a port with a bound socket that never listens. Returns the port and how to release it."""
        holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        holder.bind(("", 0))
        return int(holder.getsockname()[1]), holder.close

    def receive_paths(self, settings: Settings, host: str, pool: BlockPool) -> Mapping[str, ReceivePath]:
        """The data paths into ``pool``: see datapath.factory. Raises DataPathUnavailable."""
        return receive_paths(settings, host, pool, self.reserve_port)
