"""Lets an idle scheduler sleep while its requests wait for embeddings; sglang's would spin.

A spinning scheduler takes a core from an encoder on the same host, and the GIL from the threads that receive the
embeddings. A message on the scheduler's sockets and the end of a room wake it, and so does a timeout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import zmq

# For events that wake no sleeper: the timeout of a request, a failure on another rank, anything else that sglang does
# in a tick.
_LONGEST_MS = 10


class WaitingSleeper:
    """In place of sglang's ``IdleSleeper`` (``--sleep-on-idle``), which sleeps whenever the scheduler is idle."""

    def __init__(self, waits: Callable[[], bool]) -> None:
        """``waits``: whether requests wait for embeddings. If not, ``maybe_sleep`` does nothing."""
        self.poller = zmq.Poller()
        self._waits = waits

    def maybe_sleep(self) -> None:
        """Called by sglang in an idle tick: no request runs, is queued, or moves between servers."""
        if self._waits():
            self.poller.poll(_LONGEST_MS)


def wake_on(scheduler: Any, descriptor: int, waits: Callable[[], bool]) -> None:
    """Let the idle ``scheduler`` sleep while ``waits()``, and wake it when ``descriptor`` is readable.

    With ``--sleep-on-idle`` the scheduler has sglang's sleeper, which ``descriptor`` then wakes too. Only the rank that
    receives requests sleeps, as in sglang's ``init_idle_sleeper``: the others wait for its broadcast of requests at the
    start of every tick (``SchedulerRequestReceiver``).
    """
    sleeper = scheduler.idle_sleeper
    if sleeper is None:
        sleeper = _install(scheduler, waits)
    if hasattr(sleeper, "poller"):  # sglang's polls its own sockets only, with a timeout of a second
        sleeper.poller.register(descriptor, zmq.POLLIN)


def _install(scheduler: Any, waits: Callable[[], bool]) -> WaitingSleeper | None:
    channels = scheduler.ipc_channels
    requests = channels.recv_from_tokenizer  # None on ranks that receive no requests
    if not isinstance(requests, zmq.Socket):
        return None
    sleeper = WaitingSleeper(waits)
    for socket in (requests, channels.recv_from_rpc):
        if socket is not None:
            sleeper.poller.register(socket, zmq.POLLIN)
    scheduler.idle_sleeper = sleeper
    return sleeper
