"""Encoder and language processes for tests: started, driven by commands, frozen, killed; and a proxy between them."""

from __future__ import annotations

import itertools
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sglang_mm_conn.core.rooms import new_id, new_room_base
from sglang_mm_conn.core.states import Poll
from tests.connector.payload import ITEM_BYTES, Part

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
WIDTH = 256
BLOCK_SIZE = 16
BLOCKS = 32
HEARTBEAT = 0.2
PEER_TIMEOUT = 2.0
# Longer than blocks are watched in quarantine.
DOUBT_PATIENCE = 4.0
# Longest wait for something that must happen; much longer than it takes, for machines with other work to do.
PATIENCE = 30.0
COMMAND_SECONDS = 60.0

Value = TypeVar("Value")


def wait_for(condition: Callable[[], Value], what: str, timeout: float = PATIENCE) -> Value:
    """The first true value of ``condition``."""
    until = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > until:
            raise AssertionError(f"not within {timeout:g} s: {what}")
        time.sleep(0.005)


def stays(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Assert that ``condition`` holds all the time for ``seconds``."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert condition(), what
        time.sleep(0.02)


class CommandFailed(Exception):
    """The process answered a command with an exception."""


class Zygote:
    """The process that forks the others (see tests.connector.worker_process)."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {**os.environ, "MC_FORCE_TCP": "1", "MC_LOG_LEVEL": "ERROR", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.connector.worker_process", str(theirs.fileno())],
            cwd=ROOT,
            env=environment,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._socket = ours
        self._lock = threading.Lock()

    def fork(
        self, role: str, config: dict[str, Any], env: dict[str, str], log: Path, network: str
    ) -> tuple[int, socket.socket]:
        ours, theirs = socket.socketpair()
        with self._lock, theirs, log.open("ab") as file:
            request = json.dumps({"role": role, "config": config, "env": env, "network": network}).encode()
            socket.send_fds(self._socket, [request], [theirs.fileno(), file.fileno()])
            pid = int(self._socket.recv(64))
        return pid, ours

    def close(self) -> None:
        self._socket.close()
        self._process.wait(10)


class Child:
    """One process under test. Any thread may call it, one command at a time."""

    def __init__(
        self, zygote: Zygote, role: str, config: dict[str, Any], env: dict[str, str], log: Path, network: str
    ) -> None:
        self.config = config
        self.log = log
        self._lock = threading.Lock()
        self.pid, self._socket = zygote.fork(role, config, env, log, network)
        self._pidfd = os.pidfd_open(self.pid)  # it waits for its first command: it cannot have ended yet
        self._socket.settimeout(COMMAND_SECONDS)
        self._answers = self._socket.makefile("r")
        self.hello: dict[str, Any] = self.call("start")

    def call(self, do: str, /, **args: Any) -> Any:
        with self._lock:
            self._socket.sendall(json.dumps({"do": do, "args": args}).encode() + b"\n")
            line = self._answers.readline()
        assert line, f"process {self.pid} is gone: {self.log.read_text()[-4000:]}"
        answer = json.loads(line)
        if "error" in answer:
            raise CommandFailed(answer["error"])
        return answer["result"]

    def stats(self) -> dict[str, Any]:
        return dict(self.call("stats"))

    def log_matches(self, pattern: str) -> list[dict[str, str]]:
        """The named groups of every line of the log that ``pattern`` is found in."""
        lines = self.log.read_text().splitlines()
        return [match.groupdict() for line in lines if (match := re.search(pattern, line))]

    @property
    def alive(self) -> bool:
        return not select.select([self._pidfd], [], [], 0)[0]

    def freeze(self) -> None:
        signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)
        wait_for(lambda: self._state() == "T", f"process {self.pid} stops")

    def thaw(self) -> None:
        signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)

    def _state(self) -> str:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2][0]

    def kill(self) -> None:
        """SIGKILL, and wait until the process is gone. Nothing where it is gone already."""
        if self.alive:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        wait_for(lambda: not self.alive, f"process {self.pid} ends")

    def end(self) -> None:
        self.kill()
        self._answers.close()
        self._socket.close()
        os.close(self._pidfd)


class Encoder(Child):
    """An encoder process."""

    @property
    def url(self) -> str:
        return str(self.hello["url"])

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def announce(self, part: Part) -> None:
        self.call("announce", **part.as_dict())

    def send(self, part: Part) -> None:
        self.call("send", **part.as_dict())

    def offer(self, part: Part) -> None:
        """Announce the part and hand its embedding over."""
        self.announce(part)
        self.send(part)

    def hold(self, part: Part, window: int = 0, *, rank: int | None = None, action: str = "hold") -> None:
        """Stop the data call of this window half-way, until ``release``. ``action``: another gate that holds."""
        self.call("gate", room=part.room, window=window, action=action, rank=rank)

    def wait_held(self, part: Part, window: int = 0) -> None:
        what = f"window {window} of {part.room} is being written"
        wait_for(lambda: self.call("reached", room=part.room, window=window), what)

    def release(self, part: Part, window: int = 0) -> None:
        self.call("release", room=part.room, window=window)

    def calls(self, part: Part) -> list[dict[str, Any]]:
        return list(self.call("calls", room=part.room))

    def room(self, part: Part) -> dict[str, Any] | None:
        answer: dict[str, Any] | None = self.call("room", room=part.room)
        return answer

    def wait_init(self, part: Part) -> None:
        wait_for(lambda: (self.room(part) or {}).get("infos"), f"Init of {part.room} is there")

    def wait_ended(self, part: Part, timeout: float = PATIENCE) -> dict[str, Any]:
        ended: dict[str, Any] = wait_for(
            lambda: self.call("ended", room=part.room), f"room {part.room} ends on the encoder", timeout
        )
        return ended


class Rank(Child):
    """A language rank of either kind."""

    def expect(self, part: Part, encoder: Encoder, timeout: float = PATIENCE) -> None:
        self.call("expect", room=part.room, url=encoder.url, timeout=timeout)

    def poll(self, part: Part) -> Poll:
        return Poll(self.call("poll", room=part.room))

    def wait_end(self, part: Part, timeout: float = PATIENCE) -> Poll:
        """Success or Failed."""
        what = f"room {part.room} ends on the language side"
        wait_for(lambda: self.poll(part) in (Poll.Success, Poll.Failed), what, timeout)
        return self.poll(part)

    def succeeds(self, part: Part, timeout: float = PATIENCE) -> None:
        """Assert that the part arrives, and that it is the part that was sent: P1."""
        assert self.wait_end(part, timeout) is Poll.Success, self.outcome(part)
        self.has(part)
        self.forget(part)

    def has(self, part: Part) -> None:
        """Assert that the part is here, as it was sent."""
        assert self.call("take", room=part.room) == part.expected()

    def fails(self, part: Part, timeout: float = PATIENCE) -> dict[str, Any]:
        """Assert that the part fails, and says why."""
        assert self.wait_end(part, timeout) is Poll.Failed
        outcome = self.outcome(part)
        assert outcome["reason"] and 400 <= outcome["code"] <= 599, outcome
        return outcome

    def outcome(self, part: Part) -> dict[str, Any]:
        return dict(self.call("outcome", room=part.room))

    def abort(self, part: Part, reason: str = "the client is gone") -> None:
        self.call("abort", room=part.room, reason=reason)

    def forget(self, part: Part) -> None:
        self.call("forget", room=part.room)


class Follower(Rank):
    """A rank that reads what the leader of its host received."""


class Language(Rank):
    """A language process that receives."""

    def use(self, encoder: Encoder) -> None:
        self.call("use_encoder", url=encoder.url)

    def wait_ready(self, encoder: Encoder, timeout: float = PATIENCE) -> None:
        """Until this very process of the encoder is registered with."""

        def ready() -> bool:
            return any(
                process["ready"] and process["incarnation"] == encoder.hello["incarnation"]
                for process in self.call("processes")
            )

        wait_for(ready, f"registered with {encoder.url}", timeout)

    def room(self, part: Part) -> dict[str, Any]:
        return dict(self.call("room", room=part.room))

    @property
    def quarantined(self) -> int:
        return int(self.stats()["quarantined"])

    def wait_all_free(self, timeout: float = PATIENCE) -> None:
        """Until every block is free again."""
        wait_for(lambda: (stats := self.stats())["free"] == stats["blocks"], "all blocks are free", timeout)
        self.call("check_integrity")


class Proxy:
    """A TCP proxy on loopback, to cut connections of processes that live on.

    ``mute`` holds back what travels in one direction (a silent network), ``cut`` closes all connections and throws
    away what was held back. New connections are accepted as long as ``open``.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._muted: set[str] = set()
        self._rounds = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self.open = True
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    def mute(self, *directions: str) -> None:
        """Hold back bytes "to_encoder", "to_language"; an empty call holds nothing back any more."""
        with self._lock:
            self._muted = set(directions)
            rounds = self._rounds
        wait_for(lambda: self._rounds > rounds + 1, "the proxy has seen it")

    def cut(self) -> None:
        """Close every connection; nothing is held back on new ones."""
        with self._lock:
            pairs, self._pairs, self._muted = self._pairs, [], set()
        for pair in pairs:
            for end in pair:
                end.close()

    def _run(self) -> None:
        while not self._closing:
            self._rounds += 1
            with self._lock:
                far_ends = {
                    near: far
                    for client, encoder in self._pairs
                    for near, far, direction in ((client, encoder, "to_encoder"), (encoder, client, "to_language"))
                    if direction not in self._muted
                }
            try:
                readable, _, _ = select.select([self._listener, *far_ends], [], [], 0.01)
                for near in readable:
                    if near is self._listener:
                        self._accept()
                    else:
                        self._forward(near, far_ends[near])
            except (OSError, ValueError):
                continue  # cut meanwhile

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        if not self.open:
            client.close()
            return
        encoder = socket.create_connection(("127.0.0.1", self._target))
        self.connections += 1
        with self._lock:
            self._pairs.append((client, encoder))

    def _forward(self, near: socket.socket, far: socket.socket) -> None:
        data = near.recv(1 << 16)
        if data:
            far.sendall(data)
            return
        with self._lock:
            self._pairs = [pair for pair in self._pairs if near not in pair]
        near.close()
        far.close()

    def close(self) -> None:
        self._closing = True
        self._thread.join(5)
        self.cut()
        self._listener.close()


class World:
    """All processes of one test, on one data path, with short settings. They end with the test."""

    def __init__(self, zygote: Zygote, path: str, directory: Path) -> None:
        self.path = path
        self._zygote = zygote
        self._directory = directory
        self._children: list[Child] = []
        self._proxies: list[Proxy] = []
        self._numbers = itertools.count(1)
        self._logs = itertools.count()

    def settings(self, **changes: Any) -> dict[str, Any]:
        return {
            "data_path": self.path,
            "blocks": BLOCKS,
            "block_size": BLOCK_SIZE,
            "heartbeat": HEARTBEAT,
            "peer_timeout": PEER_TIMEOUT,
            "claim_timeout": 2.0,
            "doubt_patience": DOUBT_PATIENCE,
            "staging_bytes": 4 << 20,
            "workers": 32,  # enough that data calls which a test holds do not use up those of one queue
            "checksum": True,
            **changes,
        }

    def encoder(
        self,
        *,
        port: int = 0,
        dtype: str = "float32",
        width: int = WIDTH,
        send_timeout: float = PATIENCE,
        refusals: dict[str, str] | None = None,
        tamper: tuple[str, ...] = (),
        inline: bool = False,
        host: str = HOST,
        network: str = "",
        env: dict[str, str] | None = None,
        **settings: Any,
    ) -> Encoder:
        """An encoder process. ``inline``: it writes small embeddings without a worker, as a real one does; no gate may
        be set then, since it would hold the control thread."""
        config = {
            "host": host,
            "settings": self.settings(**settings),
            "port": port,
            "dtype": dtype,
            "row_bytes": width * ITEM_BYTES[dtype],
            "send_timeout": send_timeout,
            "refusals": refusals or {},
            "tamper": list(tamper),
            "inline": inline,
        }
        return self._add(Encoder(self._zygote, "encoder", config, env or {}, self._log("encoder"), network))

    def language(
        self,
        *encoders: Encoder,
        dtype: str = "float32",
        width: int = WIDTH,
        server: str | None = None,
        rank: int = 0,
        size: int = 1,
        leads: bool = False,
        inline: bool = True,
        host: str = HOST,
        network: str = "",
        env: dict[str, str] | None = None,
        **settings: Any,
    ) -> Language:
        """A language process that is registered with ``encoders``. ``network``: as for ``Zygote.fork``. ``leads``: it
        shares what it receives with followers. ``inline``: it copies small windows without a copier, as a real one."""
        config = {
            "host": host,
            "settings": self.settings(**settings),
            "server": server or new_id(),
            "dtype": dtype,
            "row_bytes": width * ITEM_BYTES[dtype],
            "rank": rank,
            "size": size,
            "leads": leads,
            "inline": inline,
        }
        language = self._add(Language(self._zygote, "language", config, env or {}, self._log("language"), network))
        for encoder in encoders:
            language.use(encoder)
        for encoder in encoders:
            language.wait_ready(encoder)
        return language

    def follower(self, leader: Language, rank: int = 1, **settings: Any) -> Follower:
        """A rank on the host of ``leader``."""
        config = {"settings": self.settings(**settings), "rank": rank, "host_index": leader.config["rank"]}
        return self._add(Follower(self._zygote, "follower", config, {}, self._log("follower"), ""))

    def proxy(self, encoder: Encoder) -> Proxy:
        """Put a proxy in front of the encoder's control port, for language processes that come after this."""
        proxy = Proxy(int(encoder.hello["control_port"]))
        self._proxies.append(proxy)
        encoder.call("advertise", control_port=proxy.port)
        return proxy

    def part(
        self, language: Language, tokens: int, width: int = WIDTH, *, dtype: str = "float32", metadata: bool = True
    ) -> Part:
        """A new part for ``language``; no two of one test have the same bytes."""
        room = new_room_base(language.config["server"])
        return Part(room, tokens, width, next(self._numbers), dtype, metadata)

    def transfer(self, encoder: Encoder, language: Language, tokens: int = 100, timeout: float = PATIENCE) -> None:
        """Assert that a new part gets from ``encoder`` to ``language``."""
        part = self.part(language, tokens)
        language.expect(part, encoder, timeout)
        encoder.offer(part)
        language.succeeds(part, timeout)

    def end(self, child: Child) -> None:
        """Kill a process and forget it."""
        self._children.remove(child)
        child.end()

    def _add(self, child: Value) -> Value:
        self._children.append(child)  # type: ignore[arg-type]
        return child

    def _log(self, role: str) -> Path:
        return self._directory / f"{role}-{next(self._logs)}.log"

    def close(self) -> None:
        for child in self._children:
            child.end()
        for proxy in self._proxies:
            proxy.close()
