"""Pairs of real processes, an encoder's and a language server's, one pair a transport, forked from one that knows
torch.

Every process ends when its pipe does, so none outlives the benchmark, however that ends.
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

START_SECONDS = 600.0  # sglang's import alone takes half a minute, and many times that on a busy machine
ANSWER_SECONDS = 300.0
_END_SECONDS = 10.0  # from the end of a process's pipe to its own, and to the word of it
_GLANCE_SECONDS = 0.5  # for a process to end of which only the other one tells as yet
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
    """What the processes of a transport have in theirs, with embeddings on ``device``."""
    return ENVIRONMENT if device == "cuda" else {**ENVIRONMENT, **NO_GPU}


def _context_for(device: str) -> Any:
    """How processes are started. What the forkserver imports may look for a GPU, after which no forked process can use
    one, so with a GPU each is a new interpreter."""
    return multiprocessing.get_context("spawn") if device == "cuda" else _context


class BenchError(Exception):
    """A transport that could not be started, failed, or delivered wrong bytes; the message says which and why."""


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
        """Raises BenchError where the process has ended, or does in this moment, without a word about why."""
        self._process.join(_GLANCE_SECONDS)
        if self._process.exitcode:
            raise self.failed(self._end())

    def _end(self) -> str:
        self._process.join(_END_SECONDS)
        code = self._process.exitcode
        if code == -signal.SIGKILL:
            return "was killed, as the kernel does where memory is short: fewer transports or a smaller size need less"
        if code is None:
            return "has ended"
        return f"has ended with exit status {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"

    def failed(self, why: str) -> BenchError:
        words = self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:] if self._log.exists() else []
        return BenchError("\n".join([f"{self._what}: {why}", *words]))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.commands.send(("close", ()))
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(10)
        self.commands.close()


class Pair:
    """Both processes of one transport. A context manager: connected on entry, gone on exit."""

    def __init__(
        self, transport: TransportVariant, config: Config, payload: tuple[str, int, int], key_file: str
    ) -> None:
        """``key_file``: the deployment's key; the processes' logs lie beside it."""
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
        """Raises BenchError where a room failed or came with wrong bytes."""
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
        """What the language and the encoder process answer. Raises BenchError of the first one that fails, or of one
        that has ended: the other may only miss it."""
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
    """Start the process that the others are forked from, if they are. It imports torch meanwhile, and sglang's
    transports (``builtin``), which takes long and starts no thread; a module that is missing is missed where it is
    used."""
    from multiprocessing import forkserver

    os.environ.update(environment(device))  # before the imports, which read some of it
    if _context_for(device) is not _context:
        return
    _context.set_forkserver_preload([*_PRELOAD, *(_PRELOAD_BUILTIN if builtin else ())])
    forkserver.ensure_running()
