"""The processes that sglang starts without loading plugins: how the hooks get into them, and what they tell back.

An encoder's DP workers and TP followers are spawned with a function of sglang as their target. A hooked function
keeps its name and would be pickled as the original, so functions of ours are put in their places, which load the
plugins first. A DP worker tells the process that has the HTTP route its control port, through a pipe. Tokenizer
workers import the application they are told; see tokenizer_app.py.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Collection
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from sglang_mm_conn.control.bootstrap import Worker
from sglang_mm_conn.sglang_plugin.names import APP_ENV

_OUR_APP = "sglang_mm_conn.sglang_plugin.tokenizer_app:app"
_to_route: Connection | None = None  # in a DP worker: where to tell its control port


class DpWorkers:
    """In the process that has the HTTP route: the control sockets of the DP workers, as far as they were told."""

    def __init__(self, readers: list[Connection]) -> None:
        self._readers = readers
        self._told: dict[int, Worker] = {}

    def known(self, ranks: Collection[int]) -> list[Worker] | None:
        """The workers of ``ranks``; None as long as one of them is missing: a part would be taken for the whole."""
        for rank in ranks:
            if rank not in self._told and self._readers[rank].poll():
                self._told[rank] = msgspec.json.decode(self._readers[rank].recv_bytes(), type=Worker)
        if any(rank not in self._told for rank in ranks):
            return None
        return [self._told[rank] for rank in ranks]


def replace_spawn_targets(dp_size: int) -> DpWorkers:
    """Put our functions where sglang's runtime looks for its spawn targets."""
    from sglang.srt.disaggregation.encoder import runtime

    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(dp_size)]
    # The pipes' writing ends travel as an argument: a spawned process inherits no others.
    runtime.launch_dp_worker = functools.partial(_run_dp_worker, [writer for _, writer in pipes])
    runtime.launch_encoder = _run_tp_follower
    return DpWorkers([reader for reader, _ in pipes])


def publish_control_port(worker: Worker) -> None:
    """In a DP worker: the route is told. In the process that has the route, nothing is needed."""
    if _to_route is not None:
        _to_route.send_bytes(msgspec.json.encode(worker))


def _run_dp_worker(writers: list[Connection], server_args: Any, dp_rank: int, *args: Any) -> None:
    global _to_route
    _to_route = writers[dp_rank]
    _end_with_parent()
    hook_this_process()
    from sglang.srt.disaggregation.encoder.runtime import launch_dp_worker

    launch_dp_worker(server_args, dp_rank, *args)


def _run_tp_follower(server_args: Any, schedule_path: Any, dist_init_method: Any, rank: int) -> None:
    """A rank other than 0: it takes part in the encoding, but holds no embedding and sends none."""
    _end_with_parent()
    hook_this_process()
    from sglang.srt.disaggregation.encoder.server import launch_encoder

    launch_encoder(server_args, schedule_path, dist_init_method, rank)


def use_our_application() -> None:
    """sglang starts tokenizer workers with the path of their application, which is a setting: set it to ours."""
    from sglang.srt.environ import envs

    theirs = envs.SGLANG_HTTP_SERVER_APP_PATH.get()
    if theirs != _OUR_APP:
        os.environ[APP_ENV] = theirs
        envs.SGLANG_HTTP_SERVER_APP_PATH.set(_OUR_APP)


def hook_this_process() -> None:
    """Load the plugins and make sure of ours. Raises IncompatibleSglang."""
    from sglang.srt.plugins import load_plugins

    from sglang_mm_conn.sglang_plugin import hooks

    load_plugins()
    hooks.hook_all()  # loading may have failed, which sglang only logs
    hooks.apply_and_verify()


def _end_with_parent() -> None:
    """sglang leaves these processes behind when their server is killed. A DP worker left behind would go on answering
    heartbeats, so that nobody would look for its successor on the same port."""
    from sglang.srt.utils.common import kill_itself_when_parent_died

    kill_itself_when_parent_died()
