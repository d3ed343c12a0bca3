"""Owns a language rank's connections to encoders: carries out look-ups, connects, and sends Register messages.

``core.language.registration`` decides; this module carries its actions out on the control thread. ``use`` may be called
from any thread. Look-ups and Register messages may be slow, so a small thread pool makes them. Events that concern
rooms (a process is ready or lost, an encoder was refused) go to one handler.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from sglang_mm_conn.connector.language.sessions import LocalSessions
from sglang_mm_conn.connector.runtime import Runtime
from sglang_mm_conn.control.authentication import DeploymentKey
from sglang_mm_conn.control.bootstrap import BootstrapInfo, EncoderAbsent, Worker, control_address
from sglang_mm_conn.control.client import ControlClient
from sglang_mm_conn.control.limits import guarded
from sglang_mm_conn.core.actions import (
    Connect,
    Disconnect,
    EncoderRefused,
    Log,
    LookUp,
    ProcessLost,
    ProcessReady,
    RegistrationAction,
    SendHeartbeat,
    SendRegister,
    SendRetire,
)
from sglang_mm_conn.core.dispatch.encoders import EncoderStatus
from sglang_mm_conn.core.errors import ConnError
from sglang_mm_conn.core.language.registration import Registrations
from sglang_mm_conn.core.messages import Heartbeat, Refused, Registered, Retire, encode

logger = logging.getLogger(__name__)

_POOL_THREADS = 4

EncoderEvent: TypeAlias = ProcessReady | ProcessLost | EncoderRefused


class EncoderDirectory:
    """Keeps a registered control connection to every process of every encoder in use."""

    def __init__(
        self,
        sessions: LocalSessions,
        control: ControlClient,
        key: DeploymentKey | None,
        incarnation: str,
        *,
        insecure: bool,
        peer_timeout: float,
        heartbeat: float,
        on_event: Callable[[EncoderEvent], None],
        runtime: Runtime,
    ) -> None:
        """``incarnation``: of this rank. ``on_event`` is called on the control thread, in the order of the events."""
        self.registrations = Registrations(sessions, peer_timeout=peer_timeout, heartbeat=heartbeat)
        self._sessions = sessions
        self._control = control
        self._key = key
        self._insecure = insecure
        self._heartbeat = encode(Heartbeat(incarnation=incarnation))
        self._on_event = on_event
        self._runtime = runtime
        self._clock = runtime.clock
        self._pool = runtime.executor(_POOL_THREADS, "mm-conn-bootstrap")

    def use(self, url: str) -> None:
        """Connect to the encoder at ``url``, which a request needs (any thread). Costs nothing if it is connected."""
        if not self.registrations.is_usable(url, self._clock()):
            self._control.call(lambda: self._perform(self.registrations.use(url, self._clock())))

    def is_registered(self, url: str) -> bool:
        """Whether a process of the encoder at ``url`` is registered (any thread)."""
        encoder = self.registrations.encoders.get(url)
        return encoder is not None and encoder.reachable

    # -- callbacks of the control thread -------------------------------------------------------------------------

    def on_connected(self, incarnation: str) -> None:
        self._perform(self.registrations.connected(incarnation, self._clock()))

    def on_disconnected(self, incarnation: str) -> None:
        self._perform(self.registrations.disconnected(incarnation, self._clock()))

    def on_seen(self, incarnation: str) -> None:
        self.registrations.seen(incarnation, self._clock())

    def on_heartbeat(self, incarnation: str, message: Heartbeat) -> None:
        self.registrations.heartbeat(incarnation, message)

    def statuses(self) -> list[EncoderStatus]:
        """What is known of each encoder (control thread)."""
        return self.registrations.statuses()

    def on_registered(self, incarnation: str, message: Registered) -> None:
        """Raises ProtocolError."""
        self._perform(self.registrations.registered(incarnation, message, self._clock()))

    def on_refused(self, incarnation: str, message: Refused) -> None:
        self._perform(self.registrations.refused(incarnation, message, self._clock()))

    def tick(self) -> None:
        self._perform(self.registrations.tick(self._clock()))

    # -- epochs and writer slots ---------------------------------------------------------------------------------

    def register_again(self, path: str) -> None:
        """``path`` has a newer epoch: register it with every registered process (control thread)."""
        self._perform(self.registrations.register_again(path))

    def send_retired(self, path: str) -> None:
        """Send every registered process that writes over ``path`` the revoked epochs (control thread)."""
        self._perform(self.registrations.retired(path))

    def slot_of(self, incarnation: str) -> int | None:
        """The writer slot of the process. Still known after the process was lost."""
        return self.registrations.slots.get(incarnation)

    def replace_slot(self, incarnation: str) -> None:
        """Give the process another slot: it can never write with its present one again. If the process is alive, the
        next Register to it names the new slot."""
        self.registrations.replace_slot(incarnation)

    def forget_slots(self, keep: set[str]) -> None:
        """Drop the slots of processes that are neither known nor in ``keep``, once no process can write with them."""
        for incarnation, slot in self.registrations.unused_slots(keep):
            if self._sessions.retire_writer(slot):
                del self.registrations.slots[incarnation]

    # -- carrying out --------------------------------------------------------------------------------------------

    def _perform(self, actions: list[RegistrationAction]) -> None:
        # Each by itself: the states have changed already, so one that fails must not take the others with it. A look-up
        # that was never made would leave its URL in LOOKING_UP for ever.
        for action in actions:
            guarded(partial(self._carry_out, action))

    def _carry_out(self, action: RegistrationAction) -> None:
        match action:
            case ProcessReady() | ProcessLost() | EncoderRefused():
                self._on_event(action)
            case SendHeartbeat(incarnation):
                self._control.send(incarnation, self._heartbeat)
            case SendRegister():
                self._pool.submit(self._make_register, action)
            case SendRetire(incarnation, path):
                self._send_retire(incarnation, path)
            case LookUp(url):
                self._pool.submit(self._look_up, url)
            case Connect(incarnation, url, port):
                self._control.connect(incarnation, control_address(url, Worker(incarnation, port)))
            case Disconnect(incarnation):
                self._control.disconnect(incarnation)
            case Log(level, text):
                logger.log(level, "%s", text)

    def _send_retire(self, incarnation: str, path: str) -> None:
        offered = self._sessions.paths[path]
        epoch = offered.retired_epoch
        if epoch is not None:
            self._control.send(incarnation, encode(Retire(mooncake_session_id=offered.session_id, epoch=epoch)))

    def _make_register(self, action: SendRegister) -> None:
        """On the thread pool: make the Register and send it."""
        try:
            message = self._sessions.register_message(action.path, action.slot, action.number)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self._control.call(
                lambda: self._perform(self.registrations.cannot_register(action.incarnation, reason, self._clock()))
            )
            return
        self._control.send(action.incarnation, encode(message))
        self._control.call(lambda: self.registrations.register_sent(action.incarnation, self._clock()))

    def _look_up(self, url: str) -> None:
        """On the thread pool: look the encoder up, and pass the answer to the control thread."""
        try:
            answer: BootstrapInfo | Exception = self._runtime.look_up(url, self._key, insecure=self._insecure)
        except Exception as error:
            answer = error
        self._control.call(lambda: self._looked_up(url, answer))

    def _looked_up(self, url: str, answer: BootstrapInfo | Exception) -> None:
        if isinstance(answer, EncoderAbsent):
            actions = self.registrations.absent(url, str(answer), connection_refused=answer.refused)
        elif isinstance(answer, Exception):
            actions = self.registrations.look_up_failed(url, str(answer), refuse=isinstance(answer, ConnError))
        else:
            workers = {worker.incarnation: worker.control_port for worker in answer.workers}
            actions = self.registrations.looked_up(url, workers, self._clock())
        self._perform(actions)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
