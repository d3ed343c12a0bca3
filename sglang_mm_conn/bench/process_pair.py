"""The two processes of a transport, an encoder's and a language server's, forked from one that has imported torch.

Each ends when its pipe to the benchmark does, so none outlives the benchmark, however that ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from sglang_mm_conn.bench import worker
from sglang_mm_conn.bench.records import Measurement, Result, Side
from sglang_mm_conn.bench.transports import TransportVariant
from sglang_mm_conn.bench.transports.base import Config
from sglang_mm_conn.core.rooms import new_id

START_SECONDS = 600.0  # importing sglang takes half a minute, and many times that on a busy machine
ANSWER_SECONDS = 300.0
_END_SECONDS = 10.0  # from the end of a process's pipe to its exit status
_GLANCE_SECONDS = 0.5  # for the exit of a process whose peer has already failed
_LAST_LINES = 12

_context = multiprocessing.get_context("forkserver")
_PRELOAD = ["sglang_mm_conn.bench.worker", "sglang_mm_conn.bench.transports.connector"]
_PRELOAD_BUILTIN = ["sglang.srt.disaggregation.encoder.http_server", "sglang.srt.disaggregation.encoder.receiver"]

ENVIRONMENT = {
    "MC_FORCE_TCP": "1",
    "MC_LOG_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "SGLANG_USE_CPU_ENGINE": "1",
}
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def environment(device: str) -> dict[str, str]:
    """Variables of the transports' processes, with embeddings on ``device``."""
    return ENVIRONMENT if device == "cuda" else {**ENVIRONMENT, **NO_GPU}


def _context_for(device: str) -> Any:
    """How processes start. With a GPU, each is a new interpreter: what the forkserver imports may initialize CUDA,
    after which no process forked from it can use a GPU."""
    return multiprocessing.get_context("spawn") if device == "cuda" else _context


class BenchError(Exception):
    """A transport did not start, failed, or delivered wrong bytes. The message names it, and why."""


class _Process:
    def __init__(
        self,
        role: str,
        transport: TransportVariant,
        config: Config,
        payload: tuple[str, int, int],
        peer: Connection,
        log: Path,
    ) -> None:
        self._what = f"{transport.name}, {role} process"
        self._log = log
        context = _context_for(config.device)
        self.commands, theirs = context.Pipe()
        self._process = context.Process(
            target=worker.serve,
            args=(theirs, role, transport.base, config, payload, peer, environment(config.device), str(log)),
            name=f"bench-{transport.name}-{role}",
            daemon=True,
        )
        self._process.start()
        theirs.close()

    def send(self, name: str, *arguments: Any) -> None:
        try:
            self.commands.send((name, arguments))
        except OSError as error:
            raise self.failed(self._end()) from error

    def answer(self, seconds: float = ANSWER_SECONDS) -> Any:
        if not self.commands.poll(seconds):
            raise self.failed(f"no answer within {seconds:g} s")
        try:
            verdict, value = self.commands.recv()
        except (EOFError, OSError):
            raise self.failed(self._end()) from None
        if verdict != "ok":
            raise self.failed(value)
        return value

    def check(self) -> None:
        """Raises BenchError where the process has ended with an error, or is just ending."""
        self._process.join(_GLANCE_SECONDS)
        if self._process.exitcode:
            raise self.failed(self._end())

    def _end(self) -> str:
        self._process.join(_END_SECONDS)
        code = self._process.exitcode
        if code == -signal.SIGKILL:
            return "was killed, probably because memory is short: measure fewer transports or smaller sizes"
        if code is None:
            return "has ended"
        return f"has ended with exit status {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"

    def failed(self, why: str) -> BenchError:
        lines = self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:] if self._log.exists() else []
        return BenchError("\n".join([f"{self._what}: {why}", *lines]))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.commands.send(("close", ()))
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(10)
        self.commands.close()


class Pair:
    """Both processes of one transport; as a context manager, connected on entry and ended on exit."""

    def __init__(
        self, transport: TransportVariant, config: Config, payload: tuple[str, int, int], key_file: str
    ) -> None:
        """``key_file``: the deployment key; the processes' logs go beside it."""
        self.transport = transport
        logs = Path(key_file).parent
        self.config = transport.config(config, key_file)
        self._number = 0
        near, far = _context_for(config.device).Pipe()
        self._sender = _Process(
            "encoder", transport, self.config, payload, near, logs / f"{transport.name}-encoder.log"
        )
        self._receiver = _Process(
            "language", transport, self.config, payload, far, logs / f"{transport.name}-language.log"
        )
        near.close()
        far.close()
        self.facts: dict[str, Any] = {}
        self.server = new_id()

    def start(self) -> None:
        """Wait until both have opened their ends, and connect them."""
        try:
            language, encoder = self._both(START_SECONDS)
            self.server = language.get("server", self.server)
            self._sender.send("connect", language)
            self._receiver.send("connect", encoder)
            _, facts = self._both()
            self.facts = {**facts, "encoder_pid": encoder["pid"], "language_pid": language["pid"]}
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Pair:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, count: int, nbytes: int, in_flight: int = 0, round_number: int = 0) -> Result:
        """Move ``count`` rooms. Raises BenchError where one failed or arrived with wrong bytes."""
        width = self.config.width
        run = Measurement(self.server, self._number, count, nbytes // (width * 2), width, in_flight)
        self._number += count
        self._receiver.send("run", run)
        self._sender.send("run", run)
        language: Side
        encoder: Side
        language, encoder = self._both()
        seconds = [end - begin for begin, end in zip(encoder.times, language.times, strict=True)]
        return Result(
            transport=self.transport.name,
            nbytes=nbytes,
            in_flight=in_flight,
            seconds=seconds,
            wall=max(language.times) - min(encoder.times),
            cpu=encoder.cpu + language.cpu,
            encoder=_costs(encoder),
            language=_costs(language),
            round=round_number,
        )

    def _both(self, seconds: float = ANSWER_SECONDS) -> tuple[Any, Any]:
        """The answers of the language and the encoder process.

        Raises BenchError where one fails; where the other has ended, the error is about that one, as the likely cause.
        """
        both = (self._receiver, self._sender)
        answers: dict[_Process, Any] = {}
        until = time.monotonic() + seconds
        while waiting := [process for process in both if process not in answers]:
            ready = wait([process.commands for process in waiting], max(0.0, until - time.monotonic()))
            if not ready:
                raise waiting[0].failed(f"no answer within {seconds:g} s")
            process = next(process for process in waiting if process.commands in ready)
            try:
                answers[process] = process.answer()
            except BenchError:
                for other in both:
                    if other is not process:
                        other.check()
                raise
        return answers[self._receiver], answers[self._sender]

    def park(self, count: int, nbytes: int) -> None:
        """Announce ``count`` rooms that no request claims."""
        width = self.config.width
        self._sender.send("park", self.server, self._number, count, nbytes // (width * 2), width)
        self._number += count
        self._sender.answer()
        time.sleep(0.2)

    def close(self) -> None:
        self._sender.close()
        self._receiver.close()


def _costs(side: Side) -> dict[str, Any]:
    return {
        "cpu": side.cpu,
        "by_thread": side.by_thread,
        "calls": side.calls,
        "threads": side.threads,
        "descriptors": side.descriptors,
    }


def warm_up(*, builtin: bool, device: str = "cpu") -> None:
    """Start the process that the transports' processes are forked from; with a GPU there is none.

    It imports torch, and with ``builtin`` sglang's transports, in the background: both take long and start no thread.
    A module that is missing raises where it is used, not here.
    """
    from multiprocessing import forkserver

    os.environ.update(environment(device))  # before the imports, which read some of it
    if _context_for(device) is not _context:
        return
    _context.set_forkserver_preload([*_PRELOAD, *(_PRELOAD_BUILTIN if builtin else ())])
    forkserver.ensure_running()
