"""Owns network-cut: one of two encoders is on another host, whose network is cut and mended, while clients ask.

A host is a network namespace: the clients, the language server and one encoder are on one, the other encoder is on
another, with a /dev/shm of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from sglang_mm_conn.control.authentication import generate
from sglang_mm_conn.demo.launch import Launch
from sglang_mm_conn.demo.servers import Server, stop_all, wait_ready
from tests.connector.worker_process import enter_network
from tests.faults.network import Cable, Side, why_impossible
from tests.fleet.fleet import LANGUAGE_FLAGS, Fleet
from tests.fleet.load import Load
from tests.fleet.outcome import Outcome
from tests.servers.observe import encodes_begun

NAME = "network-cut"
WHAT = "the network of one of two encoders is cut for 30 s, without a word to anybody"
SERVERS = "1 encoder here, 1 on another host"


def run(fleet: Fleet) -> list[Outcome]:
    if impossible := why_impossible():
        return [Outcome(NAME, SERVERS, skipped=impossible)]
    fleet.learn(fleet.asked)
    fleet.reset()
    cable = Cable("10.0.0")
    try:
        with Hosts(fleet, cable).running() as hosts:
            return [hosts.cut()]
    finally:
        cable.close()


class Hosts:
    """Three servers on two hosts."""

    def __init__(self, fleet: Fleet, cable: Cable) -> None:
        self._fleet, self._cable = fleet, cable
        self._near, far = cable.sides
        key = fleet.directory / "network-cut.key"
        if not key.exists():
            generate(str(key))
        # Forced data paths would not fit: there is shared memory on one host, and Mooncake between two.
        env = {**fleet.env, "SGLANG_MM_CONN_KEY_FILE": str(key), "SGLANG_MM_CONN_DATA_PATH": "auto"}
        inside = ("nsenter", f"--net={self._near.path}")
        self.here = self._server(Launch("encoder", fleet.model, env=env), self._near, inside)
        self.there = self._server(Launch("encoder", fleet.model, env=env), far, far.as_host)
        urls = (self.here.url, self.there.url)
        language = Launch("language", fleet.model, encoder_urls=urls, flags=LANGUAGE_FLAGS, env=env)
        self.language = self._server(language, self._near, inside)
        # Whoever asks a server must be in there.
        self._inside = ThreadPoolExecutor(1, initializer=enter_network, initargs=(self._near.path,))

    def _server(self, launch: Launch, side: Side, prefix: tuple[str, ...]) -> Server:
        launch = replace(
            launch,
            program=(*prefix, *launch.program),
            flags=(*launch.flags, "--host", side.address),
            env={**launch.env, "SGLANG_HOST_IP": side.address},
        )
        server = Server(launch, self._fleet.directory / "network-cut", f"{launch.role}-at-{side.address}")
        server.url = f"http://{side.address}:{server.port}"
        return server

    @contextmanager
    def running(self) -> Iterator[Hosts]:
        servers = [self.here, self.there, self.language]
        try:
            for server in servers:
                server.start()
            self._fleet.story.say("two encoders and a language server on two hosts: starting")
            self._inside.submit(wait_ready, servers).result()
            self._fleet.story.event("two encoders and a language server on two hosts are ready")
            yield self
        finally:
            stop_all(servers)
            self._inside.shutdown()

    def cut(self) -> Outcome:
        fleet, seconds = self._fleet, self._fleet.options.seconds
        enter: Callable[[], None] = partial(enter_network, self._near.path)
        with Load([self.language.url], fleet.asked, fleet.right, enter=enter) as load:
            time.sleep(seconds)
            fleet.story.say(f"undisturbed: {load.tally()}")
            self._cable.cut()
            cut_at = fleet.story.event(f"the network of {self.there.name} is cut")
            time.sleep(fleet.options.frozen)
            fleet.story.say(f"cut: {load.tally(since=cut_at)}")
            self._cable.mend()
            mended_at = fleet.story.event(f"the network of {self.there.name} is mended")
            time.sleep(1)  # what was on its way to it is no sign of trust
            before = encodes_begun(self.there)
            used_after = fleet.seconds_until_used(self.there, mended_at, load, before=before)
            time.sleep(seconds)
        return fleet.outcome(NAME, SERVERS, load.tally(), (), [f"used again {used_after:.1f} s after the mending"])
