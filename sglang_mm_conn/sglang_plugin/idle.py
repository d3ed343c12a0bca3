"""What a scheduler without work does while its requests wait for embeddings: it sleeps, where sglang's would spin.

A spinning scheduler takes a core from an encoder on the same host, and the GIL from the thread that receives what it
waits for. It is woken by a message of its own sockets and by the end of a room; beside that it looks at what else there
may be many times a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import zmq

# For what wakes nobody: the timeout of a request, another rank's failure, and whatever sglang does in a tick that we do
# not know of.
_LONGEST_MS = 10


class WaitingSleeper:
    """In the place of sglang's ``IdleSleeper`` (``--sleep-on-idle``), which sleeps whenever there is nothing to do."""

    def __init__(self, waits: Callable[[], bool]) -> None:
        """``waits``: whether requests wait for embeddings; sglang's own idle time stays as it is."""
        self.poller = zmq.Poller()
        self._waits = waits

    def maybe_sleep(self) -> None:
        """Called by sglang in a tick that found nothing to do: no request runs, queues, or moves between servers."""
        if self._waits():
            self.poller.poll(_LONGEST_MS)


def wake_on(scheduler: Any, descriptor: int, waits: Callable[[], bool]) -> None:
    """Let the idle ``scheduler`` sleep while ``waits()``, and ``descriptor`` end its sleep, sglang's own too.

    Only the rank that receives requests sleeps (as in sglang's ``init_idle_sleeper``). The others wait for its
    broadcast of requests at the beginning of every tick (``SchedulerRequestReceiver``), so they tick when it does.
    """
    sleeper = scheduler.idle_sleeper
    if sleeper is None:
        sleeper = _install(scheduler, waits)
    if hasattr(sleeper, "poller"):  # sglang's own polls its sockets only, once a second
        sleeper.poller.register(descriptor, zmq.POLLIN)


def _install(scheduler: Any, waits: Callable[[], bool]) -> WaitingSleeper | None:
    channels = scheduler.ipc_channels
    requests = channels.recv_from_tokenizer  # None on other ranks
    if not isinstance(requests, zmq.Socket):
        return None
    sleeper = WaitingSleeper(waits)
    for socket in (requests, channels.recv_from_rpc):
        if socket is not None:
            sleeper.poller.register(socket, zmq.POLLIN)
    scheduler.idle_sleeper = sleeper
    return sleeper
