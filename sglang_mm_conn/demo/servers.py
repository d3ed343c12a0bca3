"""Owns real sglang server processes: their start, ports, logs, readiness and end."""

import contextlib
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from sglang_mm_conn.demo import guard
from sglang_mm_conn.demo.launch import OUR_BACKEND, Launch

STOP_GRACE = 5.0  # seconds between asking a server to end and killing its process group
READY_TIMEOUT = 300.0  # on two busy cores a language server was seen to need more than a minute
_TAIL_LINES = 30
# Outside the kernel's range for outgoing connections and outside sglang's for its own ports (22000 to 29999), so that a
# port stays free until the server binds it.
_PORTS = range(12000, 22000)
_taken_ports: set[int] = set()
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

OnReady = Callable[["Server", float], None]


class ServerError(RuntimeError):
    """A server did not start, or ended by itself. The message has the end of its log."""


def free_port() -> int:
    """A loopback port that nothing listens on, another one each time."""
    for port in random.sample(_PORTS, len(_PORTS)):
        if port in _taken_ports:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _taken_ports.add(port)
        return port
    raise ServerError(f"no free port between {_PORTS.start} and {_PORTS.stop - 1} on 127.0.0.1")


class Server:
    """One sglang server. As a context manager it starts on entry, without waiting for readiness, and stops on exit."""

    def __init__(self, launch: Launch, log_dir: Path, name: str | None = None, port: int | None = None) -> None:
        self.launch = launch
        self.name = name or launch.role
        self.port = port or free_port()
        self.bootstrap_port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = log_dir / f"{self.name}.log"
        self.pid = 0  # the server's own process, which also leads its process group; 0 until started
        self._guard: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0

    def start(self) -> None:
        if self._guard is not None:
            raise ServerError(f"{self.name} is already running with process id {self.pid}")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        command = self.launch.command(self.port, self.bootstrap_port)
        with self.log_path.open("a") as log:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            self._guard = self._spawn(command, log)
        self._started_at = time.monotonic()
        assert self._guard.stdout is not None
        self.pid = int(self._guard.stdout.readline() or 0)
        if not self.pid:
            raise self._ended("could not be started")

    def _spawn(self, command: list[str], log: IO[str]) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            # The guard needs nothing of site-packages, and starts faster without.
            [sys.executable, "-I", "-S", os.fspath(guard.__file__), str(STOP_GRACE), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=self.launch.environment(),
            start_new_session=True,
        )

    @property
    def alive(self) -> bool:
        return self._guard is not None and self._guard.poll() is None

    def ready(self) -> bool:
        try:
            with _direct.open(f"{self.url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def wait_ready(self, timeout: float = READY_TIMEOUT) -> float:
        """Seconds from start to the first healthy answer."""
        return wait_ready([self], timeout)[0]

    def pids(self) -> list[int]:
        """All its processes: those of its process group."""
        found = []
        for name in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(int(name)) == self.pid:
                    found.append(int(name))
        return found

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the server's process and its children, for example SIGSTOP or SIGKILL."""
        if not self.alive:
            raise ServerError(f"{self.name} is not running, so {number.name} cannot be sent")
        os.killpg(self.pid, number)

    def stop(self) -> None:
        """Ends the server and everything it started. Does nothing when it has ended already."""
        process, self._guard = self._guard, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        try:
            process.wait(STOP_GRACE + 5)
        except subprocess.TimeoutExpired:
            for group in (self.pid, process.pid):
                os.killpg(group, signal.SIGKILL)
            process.wait()
        process.stdout.close()

    def request_stop(self) -> None:
        """Makes the server end without waiting for it, so that several end at the same time."""
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def check_alive(self) -> None:
        if not self.alive:
            raise self._ended("ended by itself")

    def not_ready(self, timeout: float) -> ServerError:
        return self._ended(f"was not ready within {timeout:.0f} s at {self.url}/health")

    def seconds_since_start(self) -> float:
        return time.monotonic() - self._started_at

    def _ended(self, what: str) -> ServerError:
        tail = "\n".join(self.log().splitlines()[-_TAIL_LINES:])
        return ServerError(f"server {self.name!r} {what}. The end of {self.log_path}:\n{tail}")

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def wait_ready(
    servers: Sequence[Server], timeout: float = READY_TIMEOUT, on_ready: OnReady | None = None
) -> list[float]:
    """Waits until all are ready. Returns the seconds of each. Raises ServerError at the timeout or when one ends."""
    seconds: dict[str, float] = {}
    deadline = time.monotonic() + timeout
    while True:
        for server in servers:
            if server.name in seconds:
                continue
            server.check_alive()
            if server.ready():
                seconds[server.name] = server.seconds_since_start()
                if on_ready:
                    on_ready(server, seconds[server.name])
            elif time.monotonic() > deadline:
                raise server.not_ready(timeout)
        if len(seconds) == len(servers):
            return [seconds[server.name] for server in servers]
        time.sleep(0.25)


class ServerGroup:
    """Encoders and language servers that use them. As a context manager it is ready on entry and stops on exit."""

    def __init__(
        self,
        model: Path,
        log_dir: Path,
        *,
        backend: str = OUR_BACKEND,
        device: str = "cpu",
        encoders: int = 1,
        languages: int = 1,
        env: Mapping[str, str] | None = None,
        encoder_env: Mapping[str, str] | None = None,
        language_env: Mapping[str, str] | None = None,
        encoder_flags: Sequence[str] = (),
        language_flags: Sequence[str] = (),
    ) -> None:
        """`env` goes to all servers; `encoder_env` and `language_env` override it for one role."""
        self.encoders = [
            Server(
                Launch(
                    "encoder", model, backend, device, flags=tuple(encoder_flags),
                    env={**(env or {}), **(encoder_env or {})},
                ),
                log_dir, _numbered("encoder", index, encoders),
            )
            for index in range(encoders)
        ]  # fmt: skip
        self.languages = [
            Server(
                Launch(
                    "language", model, backend, device, flags=tuple(language_flags),
                    encoder_urls=tuple(server.url for server in self.encoders),
                    env={**(env or {}), **(language_env or {})},
                ),
                log_dir, _numbered("language", index, languages),
            )
            for index in range(languages)
        ]  # fmt: skip

    @property
    def encoder(self) -> Server:
        return self.encoders[0]

    @property
    def language(self) -> Server:
        return self.languages[0]

    @property
    def servers(self) -> list[Server]:
        return [*self.encoders, *self.languages]

    def start(self) -> None:
        for server in self.servers:
            server.start()

    def wait_ready(self, timeout: float = READY_TIMEOUT, on_ready: OnReady | None = None) -> None:
        wait_ready(self.servers, timeout, on_ready)

    def stop(self) -> None:
        stop_all(self.servers)

    def __enter__(self) -> "ServerGroup":
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def stop_all(servers: Sequence[Server]) -> None:
    for server in servers:
        server.request_stop()
    for server in servers:
        server.stop()


def _numbered(role: str, index: int, count: int) -> str:
    return role if count == 1 else f"{role}-{index}"
