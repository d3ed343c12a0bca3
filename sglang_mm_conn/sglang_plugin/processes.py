"""Loads the hooks in processes that sglang starts without plugins, and collects the control ports of DP workers.

sglang spawns an encoder's DP workers and TP followers with a function of its own as target. A hook would not reach
them, since a hooked function is pickled by its name, as the original. So the targets are replaced by functions of this
module that load the plugins first. A DP worker sends its control port to the process that has the HTTP route, through a
pipe, and is told over the same pipe when its server begins or ceases to drain. Tokenizer workers import an application
by its path; see tokenizer_app.py.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import select
import threading
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from sglang_mm_conn.control.bootstrap import Worker
from sglang_mm_conn.sglang_plugin import internals
from sglang_mm_conn.sglang_plugin.names import APP_ENV

_OUR_APP = "sglang_mm_conn.sglang_plugin.tokenizer_app:app"
_to_route: Connection | None = None  # in a DP worker: the pipe to the process that has the HTTP route


class Notice(msgspec.Struct, frozen=True):
    """To the DP workers: whether their server drains; and, if ``reason`` is not empty, that every open room fails."""

    draining: bool
    reason: str = ""
    code: int = 0


_NOTICE = msgspec.json.Decoder(Notice)  # made at import, see control/bootstrap.py


class DpWorkers:
    """In the process that has the HTTP route: the pipes to the DP workers, and their control ports, as far as they have
    arrived."""

    def __init__(self, pipes: list[Connection]) -> None:
        self._pipes = pipes
        self._arrived: dict[int, Worker] = {}

    def known(self, ranks: Collection[int]) -> list[Worker] | None:
        """The workers of ``ranks``, or None while one is missing: language ranks would take a part for all of them."""
        for rank in ranks:
            if rank not in self._arrived and self._pipes[rank].poll():
                self._arrived[rank] = msgspec.json.decode(self._pipes[rank].recv_bytes(), type=Worker)
        if any(rank not in self._arrived for rank in ranks):
            return None
        return [self._arrived[rank] for rank in ranks]

    def tell(self, notice: Notice) -> None:
        """A worker that has not started yet finds the notice when it has. Never waits: one that died reads nothing."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # it has died
                writable = select.poll()
                writable.register(pipe, select.POLLOUT)
                if writable.poll(0):
                    pipe.send_bytes(msgspec.json.encode(notice))


def replace_spawn_targets(dp_size: int) -> DpWorkers:
    """Let sglang start an encoder's DP workers and TP followers with functions of this module."""
    pipes = [multiprocessing.Pipe() for _ in range(dp_size)]
    # The workers' ends are passed as an argument, since a spawned process inherits no other descriptors.
    run_dp_worker = functools.partial(_run_dp_worker, [theirs for _, theirs in pipes])
    internals.replace_spawn_targets(run_dp_worker, _run_tp_follower)
    return DpWorkers([ours for ours, _ in pipes])


def publish_control_port(worker: Worker) -> None:
    """In a DP worker: send it to the process that has the route. Does nothing in that process."""
    if _to_route is not None:
        _to_route.send_bytes(msgspec.json.encode(worker))


def follow_notices(heed: Callable[[Notice], None]) -> None:
    """In a DP worker: call ``heed`` with each notice, on a thread of its own. Does nothing in another process."""
    pipe = _to_route
    if pipe is None:
        return

    def follow() -> None:
        with contextlib.suppress(EOFError, OSError):  # the other process has ended
            while True:
                heed(_NOTICE.decode(pipe.recv_bytes()))

    threading.Thread(target=follow, name="mm-conn-notices", daemon=True).start()


def _run_dp_worker(pipes: list[Connection], server_args: Any, dp_rank: int, *args: Any) -> None:
    global _to_route
    _to_route = pipes[dp_rank]
    _end_with_parent()
    hook_this_process()
    from sglang.srt.disaggregation.encoder.runtime import launch_dp_worker

    launch_dp_worker(server_args, dp_rank, *args)


def _run_tp_follower(server_args: Any, schedule_path: Any, dist_init_method: Any, rank: int) -> None:
    """A rank other than 0: it takes part in encoding, but holds and sends no embeddings."""
    _end_with_parent()
    hook_this_process()
    from sglang.srt.disaggregation.encoder.server import launch_encoder

    launch_encoder(server_args, schedule_path, dist_init_method, rank)


def use_our_application() -> None:
    """Let sglang start tokenizer workers with this plugin's application, whose path is a setting of sglang."""
    from sglang.srt.environ import envs

    theirs = envs.SGLANG_HTTP_SERVER_APP_PATH.get()
    if theirs != _OUR_APP:
        os.environ[APP_ENV] = theirs
        envs.SGLANG_HTTP_SERVER_APP_PATH.set(_OUR_APP)


def hook_this_process() -> None:
    """Load the plugins, and verify this one. Raises IncompatibleSglang."""
    from sglang.srt.plugins import load_plugins

    from sglang_mm_conn.sglang_plugin import hooks

    load_plugins()
    hooks.hook_all()  # sglang only logs a failure to load
    hooks.apply_and_verify()


def _end_with_parent() -> None:
    """sglang leaves these processes running when their server is killed. A DP worker left behind would still answer
    heartbeats, and language ranks would not look up the server that replaces it on the same port."""
    from sglang.srt.utils.common import kill_itself_when_parent_died

    kill_itself_when_parent_died()
