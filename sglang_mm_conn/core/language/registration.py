"""Owns a language rank's registrations: when to look an encoder up, register with it, retry, and drop it. Pure.

A request names an encoder by its URL. A look-up over HTTP finds the processes that serve the URL. This rank connects to
each process and registers a session there. Several URLs may lead to one process.

core.states has the tables of states. These fields extend a state:

- ``EncoderProcess.unanswered`` counts Registers that the process has not answered. An answer without such a Register
  changes nothing, however often it arrives. READY with an unanswered Register means that the registration is renewed
  for a newer engine epoch, while rooms continue.
- ``EncoderProcess.register_at`` is the time to send the next Register, None while an answer is awaited.
- ``EncoderUrl.refusal`` is why no request can use the URL now. Every new request that names the URL fails with it.

``Registrations`` never acts itself. It returns actions; connector.language.encoder_directory carries them out in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Protocol

from sglang_mm_conn.core.actions import (
    ERROR,
    INFO,
    WARNING,
    Connect,
    Disconnect,
    EncoderRefused,
    Log,
    ProcessLost,
    ProcessReady,
    RegistrationAction,
    SendHeartbeat,
    SendRegister,
    SendRetire,
)
from sglang_mm_conn.core.dispatch.encoders import EncoderStatus
from sglang_mm_conn.core.errors import ProtocolError
from sglang_mm_conn.core.language.encoder_records import FIRST_DELAY_SECONDS, EncoderProcess, EncoderUrl
from sglang_mm_conn.core.messages import Heartbeat, RefusalKind, Refused, Registered
from sglang_mm_conn.core.states import LookUpState, RegistrationState

# The rank registers again this long after a process refused it, or after a Register could not be built.
RETRY_SECONDS = 5.0
# An unreachable encoder is forgotten when no request has named it for this long.
FORGET_SECONDS = 600.0


class OfferedPath(Protocol):
    """A data path that this rank offers. No call blocks."""

    @property
    def session_id(self) -> str:
        """The id of the session over this path."""

    def is_current(self, epoch: int) -> bool:
        """Whether ``epoch`` is the newest engine epoch."""


class OfferedSessions(Protocol):
    """The data paths that this rank offers. No call blocks."""

    @property
    def paths(self) -> Mapping[str, OfferedPath]:
        """The data paths by name."""

    @property
    def first_path(self) -> str:
        """The data path to offer a new process first."""

    def other_path(self, refused: str) -> str | None:
        """The data path to offer after ``refused`` was refused; None if there is no other."""


class Registrations:
    """All encoders of one language rank. Only the control thread uses it, except for ``is_usable``."""

    def __init__(self, sessions: OfferedSessions, *, peer_timeout: float, heartbeat: float) -> None:
        """``peer_timeout``: a process that is silent for this many seconds is lost. ``heartbeat``: its interval, s."""
        self.encoders: dict[str, EncoderUrl] = {}
        self.processes: dict[str, EncoderProcess] = {}
        self.slots: dict[str, int] = {}  # writer slots by incarnation, also of lost processes that may still write
        self._sessions = sessions
        self._peer_timeout = peer_timeout
        self._heartbeat = heartbeat
        self._next_heartbeat = 0.0
        self._numbers = itertools.count(1)  # of registrations
        self._next_slot = itertools.count()

    # -- calls for requests --------------------------------------------------------------------------------------

    def is_usable(self, url: str, now: float) -> bool:
        """Whether a request may use ``url`` without a call of ``use``. Any thread may call this."""
        encoder = self.encoders.get(url)
        if encoder is None or encoder.refusal or not encoder.reachable:
            return False
        # The control thread may lose it concurrently. It then fails the rooms and starts the look-up, as ``use`` would.
        encoder.last_used = now
        return True

    def use(self, url: str, now: float) -> list[RegistrationAction]:
        """A request names ``url``."""
        encoder = self.encoders.get(url)
        if encoder is None:
            encoder = self.encoders[url] = EncoderUrl(url, now)
        encoder.last_used = now
        actions: list[RegistrationAction] = [EncoderRefused(url, encoder.refusal)] if encoder.refusal else []
        if not encoder.reachable:
            encoder.look_up_at, encoder.delay = min(encoder.look_up_at, now), FIRST_DELAY_SECONDS
            actions += encoder.look_up(now)
        return actions

    # -- look-ups ------------------------------------------------------------------------------------------------

    def looked_up(self, url: str, workers: Mapping[str, int], now: float) -> list[RegistrationAction]:
        """The look-up of ``url`` has succeeded. ``workers``: control ports of its processes, by incarnation."""
        encoder = self.encoders.get(url)
        if encoder is None:
            return []
        actions: list[RegistrationAction] = []
        for incarnation in [key for key in encoder.processes if key not in workers]:
            actions += self._lose(incarnation, "the encoder was restarted")
        for incarnation, port in workers.items():
            process = self.processes.get(incarnation)
            if process is None:
                slot = self.slots.setdefault(incarnation, self._new_slot())
                process = EncoderProcess(incarnation, slot, self._sessions.first_path, now)
                self.processes[incarnation] = process
                actions.append(Connect(incarnation, url, port))
            encoder.processes[incarnation] = process
        encoder.machine.transition_to(LookUpState.RESOLVED)
        if encoder.reachable:  # a process is registered already, through another URL
            encoder.refusal = encoder.logged = ""
        return actions + [self._is_ready(process) for process in encoder.processes.values() if process.ready]

    def absent(self, url: str, reason: str, *, connection_refused: bool) -> list[RegistrationAction]:
        """Nothing answered at ``url``. ``connection_refused``: because no process listens there."""
        encoder = self.encoders.get(url)
        if encoder is None:
            return []
        encoder.machine.transition_to(LookUpState.WAITING)
        actions = encoder.log(INFO, f"not available yet: {reason}")
        if connection_refused:
            for incarnation in list(encoder.processes):
                actions += self._lose(incarnation, "the encoder's port refuses connections")
        return actions

    def look_up_failed(self, url: str, reason: str, *, refuse: bool) -> list[RegistrationAction]:
        """The look-up failed. ``refuse``: the server at ``url`` answered, but is no encoder that fits."""
        encoder = self.encoders.get(url)
        if encoder is None:
            return []
        encoder.machine.transition_to(LookUpState.WAITING)
        # A process that is READY serves requests, whatever one look-up says.
        refuse = refuse and not encoder.reachable
        return encoder.log(ERROR, reason) + (encoder.refuse(reason) if refuse else [])

    # -- one process ---------------------------------------------------------------------------------------------

    def connected(self, incarnation: str, now: float) -> list[RegistrationAction]:
        """The control connection is up."""
        process = self.processes.get(incarnation)
        if process is None:
            return []
        process.last_seen = now
        if not process.ready:
            process.become(RegistrationState.REGISTERING)
        return self._register(process)

    def disconnected(self, incarnation: str, now: float) -> list[RegistrationAction]:
        """The control connection is lost. A look-up finds out whether the process has ended, too."""
        process = self.processes.get(incarnation)
        if process is None:
            return []
        process.become(RegistrationState.CONNECTING)
        actions: list[RegistrationAction] = []
        for encoder in self._encoders_of(process):
            encoder.look_up_soon()
            actions += encoder.look_up(now)
        return actions

    def seen(self, incarnation: str, now: float) -> None:
        """A frame of the process arrived."""
        process = self.processes.get(incarnation)
        if process is not None:
            process.last_seen = now

    def heartbeat(self, incarnation: str, message: Heartbeat) -> None:
        """The process says how it is."""
        process = self.processes.get(incarnation)
        if process is not None:
            process.load, process.draining = message.load, message.draining

    def statuses(self) -> list[EncoderStatus]:
        """What the dispatchers of this server should know of each encoder."""
        return [encoder.status for encoder in self.encoders.values()]

    def registered(self, incarnation: str, message: Registered, now: float) -> list[RegistrationAction]:
        """The process answered Registered. Raises ProtocolError if it names a session of another rank."""
        process = self.processes.get(incarnation)
        if process is None or not process.takes_answer():
            return []
        if message.incarnation != incarnation:
            return self._lose(incarnation, "another process answers on the encoder's control port")
        path = self._sessions.paths[process.path]
        if message.mooncake_session_id != path.session_id:
            raise ProtocolError(f"registered session {message.mooncake_session_id}, which is not this rank's")
        if not path.is_current(message.epoch):
            # A newer epoch came before this process was READY, so ``register_again`` left it out.
            process.register_at = now
            return []
        actions: list[RegistrationAction] = []
        for encoder in self._encoders_of(process):
            encoder.refusal = encoder.logged = ""
            encoder.delay = FIRST_DELAY_SECONDS
            text = f"Encoder {encoder.url}: registered with process {incarnation}, path={process.path}"
            actions.append(Log(INFO, text))
        process.become(RegistrationState.READY)
        process.registered_once, process.granted = True, message
        # An epoch may have been revoked before the process was READY, so ``retired`` left it out.
        actions.append(SendRetire(incarnation, process.path))
        actions.append(self._is_ready(process))
        return actions

    def _is_ready(self, process: EncoderProcess) -> ProcessReady:
        message = process.granted
        assert message is not None
        urls = tuple(encoder.url for encoder in self._encoders_of(process))
        return ProcessReady(process.incarnation, message.mooncake_session_id, process.path, message.epoch, urls)

    def refused(self, incarnation: str, message: Refused, now: float) -> list[RegistrationAction]:
        """The process refused the session, or does not know it (any more)."""
        process = self.processes.get(incarnation)
        if process is None or (message.kind is RefusalKind.DATA_PATH and message.data_path != process.path):
            return []  # the path was offered twice; after the first refusal this rank offers another one
        if not process.takes_answer() and message.kind is not RefusalKind.REGISTER_FIRST:
            return []
        was_ready = process.ready
        if message.kind is RefusalKind.REGISTER_FIRST:
            process.become(RegistrationState.REGISTERING)
            process.register_at = now  # the next tick sends it: no busy loop if the encoder is busy
            return []
        other = self._sessions.other_path(process.path) if message.kind is RefusalKind.DATA_PATH else None
        if other is not None:
            text = f"Encoder process {incarnation}: {message.reason}; trying {other}"
            process.path = other
            process.become(RegistrationState.REGISTERING)
            return [Log(INFO, text), *self._register(process)]
        reason = f"refused this language server: {message.reason}"
        process.become(RegistrationState.REFUSED)
        lost: list[RegistrationAction] = [ProcessLost(incarnation, reason)] if was_ready else []
        return lost + self.cannot_register(incarnation, reason, now)

    def register_sent(self, incarnation: str, now: float) -> None:
        """A Register was made, which may have taken long, and sent: its answer is awaited from now on."""
        process = self.processes.get(incarnation)
        if process is not None:
            process.register_sent, process.last_seen = True, max(process.last_seen, now)

    def cannot_register(self, incarnation: str, reason: str, now: float) -> list[RegistrationAction]:
        """Registration is impossible for now. It is retried after RETRY_SECONDS."""
        process = self.processes.get(incarnation)
        if process is None:
            return []
        actions: list[RegistrationAction] = []
        for encoder in self._encoders_of(process):
            actions += encoder.log(ERROR, reason) + encoder.refuse(reason)
        if not process.ready:  # a READY one that could not be renewed keeps its rooms and heartbeats
            process.become(RegistrationState.REFUSED)
        process.register_at = now + RETRY_SECONDS
        return actions

    def register_again(self, path: str) -> list[RegistrationAction]:
        """``path`` has a newer engine epoch: register again with every READY process that writes over ``path``."""
        return [action for process in self._ready_over(path) for action in self._register(process)]

    def retired(self, path: str) -> list[RegistrationAction]:
        """An epoch of ``path`` was revoked: send a Retire to every READY process that writes over ``path``."""
        return [SendRetire(process.incarnation, path) for process in self._ready_over(path)]

    def _ready_over(self, path: str) -> Iterator[EncoderProcess]:
        return (process for process in self.processes.values() if process.path == path and process.ready)

    def _register(self, process: EncoderProcess) -> list[RegistrationAction]:
        process.register_at = None
        process.unanswered += 1
        return [SendRegister(process.incarnation, process.path, process.slot, next(self._numbers))]

    def _encoders_of(self, process: EncoderProcess) -> list[EncoderUrl]:
        return [item for item in self.encoders.values() if process.incarnation in item.processes]

    def _lose(self, incarnation: str, reason: str) -> list[RegistrationAction]:
        process = self.processes.pop(incarnation, None)
        if process is None:
            return []
        process.become(RegistrationState.LOST)
        encoders = self._encoders_of(process)
        for encoder in encoders:
            del encoder.processes[incarnation]
            encoder.refusal = ""  # the next process may fit
            encoder.look_up_soon()
        actions: list[RegistrationAction] = [Disconnect(incarnation)]
        text = f"encoder {', '.join(encoder.url for encoder in encoders)} (process {incarnation}) lost: {reason}"
        if process.registered_once:
            actions.append(Log(WARNING, text))
        else:
            for encoder in encoders:
                actions += encoder.log(WARNING, f"process {incarnation} does not answer: {reason}")
        return [*actions, ProcessLost(incarnation, text)]

    def _fell_silent(self, process: EncoderProcess) -> list[RegistrationAction]:
        """Drop a process. If it owes the answer to the first Register, its encoder's HTTP port answers and its control
        port does not: no request can use the encoder before a process is registered."""
        silent, encoders = f"silent for {self._peer_timeout:g} s", self._encoders_of(process)
        owes = process.register_sent or process.state is RegistrationState.CONNECTING
        for encoder in encoders:
            encoder.silences += process.registered_once
        actions = self._lose(process.incarnation, silent)
        for encoder in [one for one in encoders if owes and not process.registered_once and not one.reachable]:
            actions += encoder.refuse(f"encoder {encoder.url} is {silent} on its control port")
        return actions

    # -- writer slots --------------------------------------------------------------------------------------------

    def replace_slot(self, incarnation: str) -> None:
        """The process can never write with its slot again. If it is alive, its next Register has another slot."""
        self.slots.pop(incarnation, None)
        process = self.processes.get(incarnation)
        if process is not None:
            process.slot = self.slots[incarnation] = self._new_slot()

    def unused_slots(self, keep: set[str]) -> list[tuple[str, int]]:
        """(incarnation, slot) of lost processes that are not in ``keep``.

        The caller drops a slot when it has proven that no process can write with it.
        """
        return [
            (incarnation, slot)
            for incarnation, slot in self.slots.items()
            if incarnation not in self.processes and incarnation not in keep
        ]

    def _new_slot(self) -> int:
        return next(self._next_slot)

    # -- time ----------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[RegistrationAction]:
        """Drop silent processes, send Registers and look-ups that are due, forget old encoders, send heartbeats."""
        actions: list[RegistrationAction] = []
        for process in list(self.processes.values()):
            if now - process.last_seen > self._peer_timeout:
                actions += self._fell_silent(process)
            elif process.register_at is not None and now >= process.register_at:
                if not process.ready:
                    process.become(RegistrationState.REGISTERING)
                actions += self._register(process)
        for encoder in list(self.encoders.values()):
            if encoder.machine.state is LookUpState.RESOLVED and encoder.reachable:
                continue
            looking = encoder.machine.state is LookUpState.LOOKING_UP
            if now - encoder.last_used > FORGET_SECONDS and not encoder.processes and not looking:
                del self.encoders[encoder.url]
            else:
                actions += encoder.look_up(now)
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + self._heartbeat
            actions += [SendHeartbeat(one.incarnation) for one in self.processes.values() if one.ready]
        return actions
