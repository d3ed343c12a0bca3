"""The encoders that a language rank knows: when to look them up, register, ask again, and give them up. Pure.

An encoder is a URL that requests name; a look-up over HTTP says which processes serve it. This rank connects to each
process and registers its session there. One process may be reached by several URLs.

The tables of states are in core.states. What extends a state:

- ``EncoderProcess.unanswered`` counts Registers that the process has not answered. An answer to none of them changes
  nothing, however often it is sent. READY with unanswered ones is a registration that is being renewed for a newer
  engine epoch: rooms go on meanwhile.
- ``EncoderProcess.register_at``: when to send the next Register; None while an answer is awaited.
- ``EncoderUrl.refusal``: why no request can use the URL now; every new request that names it fails with it.

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
from sglang_mm_conn.core.encoder_records import FIRST_DELAY_SECONDS, EncoderProcess, EncoderUrl
from sglang_mm_conn.core.errors import ProtocolError
from sglang_mm_conn.core.messages import RefusalKind, Refused, Registered
from sglang_mm_conn.core.states import LookUpState, RegistrationState

# A process that refused for good, as things are, is asked again after this.
RETRY_SECONDS = 5.0
# An unreachable encoder that no request has named for this long is forgotten.
FORGET_SECONDS = 600.0


class OfferedPath(Protocol):
    """A data path as this rank offers it; every answer is immediate."""

    @property
    def session_id(self) -> str:
        """The id of the session over this path."""

    def is_current(self, epoch: int) -> bool:
        """Whether ``epoch`` is the one to offer now."""


class OfferedSessions(Protocol):
    """What this rank offers; every answer is immediate."""

    @property
    def paths(self) -> Mapping[str, OfferedPath]:
        """The data paths by name."""

    @property
    def first_path(self) -> str:
        """The data path to offer a new process first."""

    def other_path(self, refused: str) -> str | None:
        """The data path to offer after ``refused`` was refused; None where there is none."""


class Registrations:
    """All encoders of one language rank. Not thread-safe, but for ``is_usable``: the control thread alone uses it."""

    def __init__(self, sessions: OfferedSessions, *, peer_timeout: float, heartbeat: float) -> None:
        """``peer_timeout``: a process that is silent for so many seconds is lost. ``heartbeat``: seconds."""
        self.encoders: dict[str, EncoderUrl] = {}
        self.processes: dict[str, EncoderProcess] = {}
        self.slots: dict[str, int] = {}  # writer slots by incarnation, also of lost processes that may still write
        self._sessions = sessions
        self._peer_timeout = peer_timeout
        self._heartbeat = heartbeat
        self._next_heartbeat = 0.0
        self._numbers = itertools.count(1)  # of registrations
        self._next_slot = itertools.count()

    # -- what requests ask for -----------------------------------------------------------------------------------

    def is_usable(self, url: str, now: float) -> bool:
        """Whether a request may use ``url`` without further ado (any thread)."""
        encoder = self.encoders.get(url)
        if encoder is None or encoder.refusal or not encoder.reachable:
            return False
        # Where it is lost at this very moment, its loss fails the rooms and starts the look-up that ``use`` would.
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

    # -- looking up ----------------------------------------------------------------------------------------------

    def looked_up(self, url: str, workers: Mapping[str, int], now: float) -> list[RegistrationAction]:
        """``url`` answered: its processes and their control ports, by incarnation."""
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
        return actions

    def absent(self, url: str, reason: str, *, connection_refused: bool) -> list[RegistrationAction]:
        """Nothing answers at ``url``; with ``connection_refused`` no process listens there."""
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
        """What answers at ``url`` is not an encoder that fits (``refuse``), or the look-up itself failed."""
        encoder = self.encoders.get(url)
        if encoder is None:
            return []
        encoder.machine.transition_to(LookUpState.WAITING)
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
        """The connection broke: the process is gone, or only the connection. A look-up tells which."""
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

    def registered(self, incarnation: str, message: Registered, now: float) -> list[RegistrationAction]:
        """Raises ProtocolError where the session is not this rank's."""
        process = self.processes.get(incarnation)
        if process is None or not process.takes_answer():
            return []
        if message.incarnation != incarnation:
            return self._lose(incarnation, "another process answers on the encoder's control port")
        path = self._sessions.paths[process.path]
        if message.mooncake_session_id != path.session_id:
            raise ProtocolError(f"registered session {message.mooncake_session_id}, which is not this rank's")
        if not path.is_current(message.epoch):
            # The epoch was replaced while this process was not yet among those to be told.
            process.register_at = now
            return []
        actions: list[RegistrationAction] = []
        for encoder in self._encoders_of(process):
            encoder.refusal = encoder.logged = ""
            encoder.delay = FIRST_DELAY_SECONDS
            text = f"Encoder {encoder.url}: registered with process {incarnation}, path={process.path}"
            actions.append(Log(INFO, text))
        process.become(RegistrationState.READY)
        process.registered_once = True
        # It may not have been among those that were told of a revocation.
        actions.append(SendRetire(incarnation, process.path))
        actions.append(ProcessReady(incarnation, message.mooncake_session_id, process.path, message.epoch))
        return actions

    def refused(self, incarnation: str, message: Refused, now: float) -> list[RegistrationAction]:
        """The process refused the session, or does not know it (any more)."""
        process = self.processes.get(incarnation)
        if process is None or (message.kind is RefusalKind.DATA_PATH and message.data_path != process.path):
            return []  # it was offered twice, and the path that this answers has been given up
        if not process.takes_answer() and message.kind is not RefusalKind.REGISTER_FIRST:
            return []
        was_ready = process.ready
        if message.kind is RefusalKind.REGISTER_FIRST:
            process.become(RegistrationState.REGISTERING)
            process.register_at = now  # at the next tick: an encoder that is busy is not asked in a loop
            return []
        other = self._sessions.other_path(process.path) if message.kind is RefusalKind.DATA_PATH else None
        if other is not None:
            text = f"Encoder process {incarnation}: {message.reason}; trying {other}"
            process.path = other
            process.become(RegistrationState.REGISTERING)
            return [Log(INFO, text), *self._register(process)]
        reason = f"refused this language server: {message.reason}"
        lost: list[RegistrationAction] = [ProcessLost(incarnation, reason)] if was_ready else []
        return lost + self.cannot_register(incarnation, reason, now)

    def cannot_register(self, incarnation: str, reason: str, now: float) -> list[RegistrationAction]:
        """Registration is impossible for now; it is tried again after RETRY_SECONDS."""
        process = self.processes.get(incarnation)
        if process is None:
            return []
        actions: list[RegistrationAction] = []
        for encoder in self._encoders_of(process):
            actions += encoder.log(ERROR, reason) + encoder.refuse(reason)
        process.become(RegistrationState.REFUSED)
        process.register_at = now + RETRY_SECONDS
        return actions

    def register_again(self, path: str) -> list[RegistrationAction]:
        """Offer the session anew to every registered process that writes over ``path``: it has a newer epoch."""
        return [action for process in self._ready_over(path) for action in self._register(process)]

    def retired(self, path: str) -> list[RegistrationAction]:
        """An epoch of ``path`` was revoked: tell every registered process that writes over it."""
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
            encoder.refusal = ""  # what comes next may fit
            encoder.look_up_soon()
        actions: list[RegistrationAction] = [Disconnect(incarnation)]
        text = f"encoder {', '.join(encoder.url for encoder in encoders)} (process {incarnation}) lost: {reason}"
        if process.registered_once:
            actions.append(Log(WARNING, text))
        else:
            for encoder in encoders:
                actions += encoder.log(WARNING, f"process {incarnation} does not answer: {reason}")
        return [*actions, ProcessLost(incarnation, text)]

    # -- writer slots --------------------------------------------------------------------------------------------

    def replace_slot(self, incarnation: str) -> None:
        """The process can never write with its slot again: if it lives, its next Register names another one."""
        self.slots.pop(incarnation, None)
        process = self.processes.get(incarnation)
        if process is not None:
            process.slot = self.slots[incarnation] = self._new_slot()

    def unused_slots(self, keep: set[str]) -> list[tuple[str, int]]:
        """(incarnation, slot) of processes that are neither known nor in ``keep``: to be dropped once nobody can write
        with the slot."""
        return [
            (incarnation, slot)
            for incarnation, slot in self.slots.items()
            if incarnation not in self.processes and incarnation not in keep
        ]

    def _new_slot(self) -> int:
        return next(self._next_slot)

    # -- time ----------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[RegistrationAction]:
        """Give up silent processes, register and look up what is due, forget encoders, send heartbeats."""
        actions: list[RegistrationAction] = []
        for process in list(self.processes.values()):
            if now - process.last_seen > self._peer_timeout:
                actions += self._lose(process.incarnation, f"silent for {self._peer_timeout:g} s")
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
