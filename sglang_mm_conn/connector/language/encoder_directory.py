"""The encoders a language rank knows: looking them up, connecting, registering, noticing that they are gone.

It drives the control client; what becomes of rooms is told to the callbacks. Everything but ``use`` extents on the
control thread, lookups and first registrations (which may be slow) on a small pool.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from sglang_mm_conn.connector.language.sessions import LocalSessions
from sglang_mm_conn.connector.runtime import Runtime
from sglang_mm_conn.control.authentication import DeploymentKey
from sglang_mm_conn.control.bootstrap import BootstrapInfo, EncoderAbsent, Worker, control_address
from sglang_mm_conn.control.client import ControlClient
from sglang_mm_conn.core.errors import ConnError, ProtocolError
from sglang_mm_conn.core.messages import Heartbeat, Refused, Registered, Retire, encode
from sglang_mm_conn.core.receiver import Peer

logger = logging.getLogger(__name__)

_LOOK_UP_AGAIN_SECONDS = 0.5
_LOOK_UP_AGAIN_MOST_SECONDS = 5.0
# An encoder that no request has named for this long, and that is not there, is forgotten.
_FORGET_SECONDS = 600.0


@dataclass
class _Process:
    """One encoder process; more than one URL may lead to it."""

    worker: Worker
    slot: int
    path: str
    last_seen: float
    ready: bool = False
    known: bool = False  # it has been ready
    asked: int = 0  # registrations that it has not answered
    register_at: float | None = None


@dataclass
class _Encoder:
    """One encoder URL."""

    url: str
    last_used: float
    processes: dict[str, _Process] = field(default_factory=dict)
    look_up_at: float = 0.0
    delay: float = _LOOK_UP_AGAIN_SECONDS
    looking: bool = False
    complete: bool = False  # nothing happened since a look-up said which processes there are
    refusal: str = ""
    complaint: str = ""  # logged last, so that one cause is logged once


class Encoders:
    """Keeps a registered control connection to every process of every encoder in use."""

    def __init__(
        self,
        sessions: LocalSessions,
        key: DeploymentKey | None,
        incarnation: str,
        *,
        insecure: bool,
        peer_timeout: float,
        heartbeat: float,
        on_ready: Callable[[Peer], None],
        on_lost: Callable[[str, str], None],
        on_refused: Callable[[str, str], None],
        runtime: Runtime,
    ) -> None:
        """``on_ready(peer)``; ``on_lost(incarnation, reason)``; ``on_refused(encoder url, reason)``."""
        self._sessions = sessions
        self._key = key
        self._insecure = insecure
        self._incarnation = incarnation
        self._peer_timeout = peer_timeout
        self._heartbeat = heartbeat
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._on_refused = on_refused
        self._runtime = runtime
        self._clock = runtime.clock
        self._encoders: dict[str, _Encoder] = {}
        self._processes: dict[str, _Process] = {}
        self._slots: dict[str, int] = {}
        self._registrations = itertools.count(1)
        self._next_heartbeat = 0.0
        self._pool = runtime.executor(4, "mm-conn-bootstrap")
        self.control: ControlClient  # set once by the endpoint, before the control thread starts

    def use(self, url: str) -> None:
        """A request names ``url`` (any thread). Connects where that has not been done; costs nothing where it has."""
        encoder = self._encoders.get(url)
        if encoder is not None and not encoder.refusal and any(one.ready for one in list(encoder.processes.values())):
            # Where it is lost in this very moment, that starts the look-up, and fails the rooms, that ``_use`` would.
            encoder.last_used = self._clock()
            return
        self.control.call(lambda: self._use(url))

    def is_registered(self, url: str) -> bool:
        """Whether a process of the encoder at ``url`` has accepted this rank's registration (any thread)."""
        encoder = self._encoders.get(url)
        return encoder is not None and any(one.ready for one in list(encoder.processes.values()))

    def slot_of(self, incarnation: str) -> int | None:
        """The writer slot that the process was given, also after it was lost."""
        return self._slots.get(incarnation)

    def replace_slot(self, incarnation: str) -> None:
        """The process cannot attach with its slot any more: if it lives, its next registration names another."""
        self._slots.pop(incarnation, None)
        process = self._processes.get(incarnation)
        if process is not None:
            process.slot = self._slots[incarnation] = self._sessions.new_slot()

    def forget_slots(self, keep: set[str]) -> None:
        """Drop the slots of processes that are neither connected nor in ``keep``, once nobody can write with them."""
        for incarnation in [key for key in self._slots if key not in self._processes and key not in keep]:
            if self._sessions.retire_writer(self._slots[incarnation]):
                del self._slots[incarnation]

    def register_again(self, path: str) -> None:
        """Present the session anew to every process that writes over ``path`` (control thread)."""
        for process in self._processes.values():
            if process.path == path and process.ready:
                self._register(process)

    def send_retired(self, path: str) -> None:
        """Tell every registered process that writes over ``path`` which epochs were revoked (control thread)."""
        for process in self._processes.values():
            if process.path == path and process.ready:
                self._send_retire_to(process)

    def _send_retire_to(self, process: _Process) -> None:
        epoch = self._sessions.retired_epoch(process.path)
        if epoch is not None:
            message = Retire(mooncake_session_id=self._sessions.session(process.path), epoch=epoch)
            self.control.send(process.worker.incarnation, encode(message))

    def _use(self, url: str) -> None:
        now = self._clock()
        encoder = self._encoders.get(url)
        if encoder is None:
            encoder = self._encoders[url] = _Encoder(url, now)
        encoder.last_used = now
        if encoder.refusal:
            self._on_refused(url, encoder.refusal)
        if not any(process.ready for process in encoder.processes.values()):
            encoder.look_up_at, encoder.delay = min(encoder.look_up_at, now), _LOOK_UP_AGAIN_SECONDS
            self._maybe_look_up(encoder, now)

    # -- looking up ----------------------------------------------------------------------------------------------

    def _maybe_look_up(self, encoder: _Encoder, now: float) -> None:
        if encoder.looking or now < encoder.look_up_at:
            return
        encoder.looking = True
        encoder.look_up_at = now + encoder.delay
        encoder.delay = min(encoder.delay * 1.5, _LOOK_UP_AGAIN_MOST_SECONDS)

        def work() -> None:
            try:
                answer: BootstrapInfo | Exception = self._runtime.look_up(
                    encoder.url, self._key, insecure=self._insecure
                )
            except Exception as error:
                answer = error
            self.control.call(lambda: self._looked_up(encoder, answer))

        self._pool.submit(work)

    def _looked_up(self, encoder: _Encoder, answer: BootstrapInfo | Exception) -> None:
        encoder.looking = False
        if isinstance(answer, EncoderAbsent):
            self._complain(encoder, logging.INFO, f"not there yet: {answer}")
            if answer.refused:
                for incarnation in list(encoder.processes):
                    self._lose(incarnation, "the encoder's port refuses connections")
            return
        if isinstance(answer, Exception):
            self._complain(encoder, logging.ERROR, str(answer))
            if isinstance(answer, ConnError):
                self._refuse(encoder, str(answer))
            return
        listed = {worker.incarnation: worker for worker in answer.workers}
        for incarnation in [key for key in encoder.processes if key not in listed]:
            self._lose(incarnation, "the encoder was restarted")
        for incarnation, worker in listed.items():
            process = self._processes.get(incarnation)
            if process is None:
                slot = self._slots.setdefault(incarnation, self._sessions.new_slot())
                process = _Process(worker, slot, self._sessions.first_path, self._clock())
                self._processes[incarnation] = process
                self.control.connect(incarnation, control_address(encoder.url, worker))
            encoder.processes[incarnation] = process
        encoder.complete = True

    def _complain(self, encoder: _Encoder, level: int, text: str) -> None:
        if text != encoder.complaint:
            encoder.complaint = text
            logger.log(level, "Encoder %s: %s", encoder.url, text)

    def _encoders_of(self, process: _Process) -> list[_Encoder]:
        return [item for item in self._encoders.values() if process.worker.incarnation in item.processes]

    def _refuse(self, encoder: _Encoder, reason: str) -> None:
        encoder.refusal = reason
        self._on_refused(encoder.url, reason)

    # -- one process ---------------------------------------------------------------------------------------------

    def on_connected(self, incarnation: str) -> None:
        process = self._processes.get(incarnation)
        if process is not None:
            process.last_seen = self._clock()
            self._register(process)

    def on_disconnected(self, incarnation: str) -> None:
        """The connection broke: the process is gone, or only the connection. A look-up tells which."""
        process = self._processes.get(incarnation)
        if process is None:
            return
        process.ready = False
        for encoder in self._encoders_of(process):
            encoder.complete = False
            encoder.look_up_at, encoder.delay = 0.0, _LOOK_UP_AGAIN_SECONDS
            self._maybe_look_up(encoder, self._clock())

    def on_seen(self, incarnation: str) -> None:
        process = self._processes.get(incarnation)
        if process is not None:
            process.last_seen = self._clock()

    def _register(self, process: _Process) -> None:
        process.register_at = None
        process.asked += 1
        number = next(self._registrations)

        def work() -> None:
            try:
                message = self._sessions.register_message(process.path, process.slot, number)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                self.control.call(lambda: self._cannot_register(process, reason))
                return
            self.control.send(process.worker.incarnation, encode(message))

        self._pool.submit(work)

    def on_registered(self, incarnation: str, message: Registered) -> None:
        process = self._processes.get(incarnation)
        if process is None:
            return
        if not self._answers(process):
            return
        if message.incarnation != incarnation:
            self._lose(incarnation, "another process answers on the encoder's control port")
            return
        if message.mooncake_session_id != self._sessions.session(process.path):
            raise ProtocolError(f"registered session {message.mooncake_session_id}, which is not this rank's")
        if not self._sessions.is_newest(process.path, message.epoch):
            # The engine was replaced when this process was not yet among those to be told.
            process.register_at = self._clock()
            return
        for encoder in self._encoders_of(process):
            encoder.refusal = encoder.complaint = ""
            encoder.delay = _LOOK_UP_AGAIN_SECONDS
            logger.info("Encoder %s: registered with process %s, path=%s", encoder.url, incarnation, process.path)
        process.ready = process.known = True
        self._send_retire_to(process)  # it may not have been among those that were told
        self._on_ready(Peer(incarnation, message.mooncake_session_id, process.path, message.epoch))

    @staticmethod
    def _answers(process: _Process) -> bool:
        """Whether a registration awaits an answer: an answer to nothing changes nothing, however often it is said."""
        if process.asked < 1:
            return False
        process.asked -= 1
        return True

    def on_refused(self, incarnation: str, message: Refused) -> None:
        process = self._processes.get(incarnation)
        if process is None or (message.kind == "data_path" and message.data_path != process.path):
            return  # it was presented twice, and the path that this answers has been given up
        if not self._answers(process) and message.kind != "register_first":
            return
        was_ready, process.ready = process.ready, False
        if message.kind == "register_first":
            process.register_at = self._clock()  # at the next tick: an encoder that is busy is not asked in a loop
            return
        other = self._sessions.other_path(process.path) if message.kind == "data_path" else None
        if other is not None:
            logger.info("Encoder process %s: %s; trying %s", incarnation, message.reason, other)
            process.path = other
            self._register(process)
            return
        reason = f"refused this language server: {message.reason}"
        if was_ready:
            self._on_lost(incarnation, reason)
        self._cannot_register(process, reason)

    def _cannot_register(self, process: _Process, reason: str) -> None:
        """Nothing to be had from this process as things are; it is asked again now and then."""
        for encoder in self._encoders_of(process):
            self._complain(encoder, logging.ERROR, reason)
            self._refuse(encoder, reason)
        process.register_at = self._clock() + _LOOK_UP_AGAIN_MOST_SECONDS

    def _lose(self, incarnation: str, reason: str) -> None:
        process = self._processes.pop(incarnation, None)
        if process is None:
            return
        encoders = self._encoders_of(process)
        for encoder in encoders:
            del encoder.processes[incarnation]
            encoder.refusal = ""  # what comes next may fit
            encoder.complete = False
            encoder.look_up_at, encoder.delay = 0.0, _LOOK_UP_AGAIN_SECONDS
        self.control.disconnect(incarnation)
        text = f"encoder {', '.join(encoder.url for encoder in encoders)} (process {incarnation}) lost: {reason}"
        if process.known:
            logger.warning("%s", text)
        else:
            for encoder in encoders:
                self._complain(encoder, logging.WARNING, f"process {incarnation} does not answer: {reason}")
        self._on_lost(incarnation, text)

    # -- time ----------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        now = self._clock()
        for process in list(self._processes.values()):
            if now - process.last_seen > self._peer_timeout:
                self._lose(process.worker.incarnation, f"silent for {self._peer_timeout:g} s")
            elif process.register_at is not None and now >= process.register_at:
                self._register(process)
        for encoder in list(self._encoders.values()):
            if encoder.complete and any(process.ready for process in encoder.processes.values()):
                continue
            if now - encoder.last_used > _FORGET_SECONDS and not encoder.processes and not encoder.looking:
                del self._encoders[encoder.url]
            else:
                self._maybe_look_up(encoder, now)
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + self._heartbeat
            beat = encode(Heartbeat(incarnation=self._incarnation))
            for process in self._processes.values():
                if process.ready:
                    self.control.send(process.worker.incarnation, beat)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
