"""Owns the records of registration: an encoder URL with its look-ups, a process with its registration. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang_mm_conn.core.actions import EncoderRefused, Log, LookUp, RegistrationAction
from sglang_mm_conn.core.dispatch.encoders import EncoderStatus
from sglang_mm_conn.core.messages import Registered
from sglang_mm_conn.core.states import (
    LOOK_UP_TRANSITIONS,
    REGISTRATION_TRANSITIONS,
    LookUpState,
    RegistrationState,
    StateMachine,
)
from sglang_mm_conn.core.texts import as_text

# Back-off of look-ups, in seconds: the first delay, the factor from one delay to the next, the longest delay.
FIRST_DELAY_SECONDS = 0.5
DELAY_FACTOR = 1.5
MOST_DELAY_SECONDS = 5.0


@dataclass(slots=True)
class EncoderProcess:
    """One encoder process. Several URLs may lead to it.

    Attributes:
        incarnation: random id of the process life.
        slot: the writer slot that this rank's Register offers it.
        path: the data path that this rank offers it.
        last_seen: time of the last frame from it.
        machine: the state of the registration.
        registered_once: whether it was ever READY. Only then does the log report its loss each time.
        granted: its last Registered, whatever the state.
        unanswered: number of Registers that it has not answered; they may not have been sent yet.
        register_sent: whether one was ever sent.
        register_at: time to send the next Register; None: no Register is scheduled.
        load: requests that it says its server holds.
        draining: whether it says that it takes no new work.
    """

    incarnation: str
    slot: int
    path: str
    last_seen: float
    machine: StateMachine[RegistrationState] = field(
        default_factory=lambda: StateMachine(REGISTRATION_TRANSITIONS, RegistrationState.CONNECTING)
    )
    registered_once: bool = False
    granted: Registered | None = None
    unanswered: int = 0
    register_sent: bool = False
    register_at: float | None = None
    load: int = 0
    draining: bool = False

    @property
    def state(self) -> RegistrationState:
        return self.machine.state

    @property
    def ready(self) -> bool:
        return self.machine.state is RegistrationState.READY

    def become(self, state: RegistrationState) -> None:
        """Change to ``state``, unless it is the current one. Raises IllegalTransition."""
        if self.machine.state is not state:
            self.machine.transition_to(state)

    def takes_answer(self) -> bool:
        """Whether a Register is unanswered. If so, this answer is counted as the answer to one."""
        if self.unanswered < 1:
            return False
        self.unanswered -= 1
        return True


@dataclass(slots=True)
class EncoderUrl:
    """One encoder URL.

    Attributes:
        url: of the encoder server.
        last_used: time of the last request that named it.
        processes: the processes that serve it, by incarnation.
        machine: the state of its look-up.
        look_up_at: no look-up begins before this time.
        delay: seconds from the next look-up to the one after it.
        refusal: why no request can use it; empty: it can be used, or that is not known yet.
        logged: the last line about it, so that a cause that persists is logged once.
        silences: how many of its processes were lost because they fell silent.
    """

    url: str
    last_used: float
    processes: dict[str, EncoderProcess] = field(default_factory=dict)
    machine: StateMachine[LookUpState] = field(
        default_factory=lambda: StateMachine(LOOK_UP_TRANSITIONS, LookUpState.WAITING)
    )
    look_up_at: float = 0.0
    delay: float = FIRST_DELAY_SECONDS
    refusal: str = ""
    logged: str = ""
    silences: int = 0

    @property
    def status(self) -> EncoderStatus:
        """What the dispatcher should know of it."""
        processes = list(self.processes.values())
        return EncoderStatus(
            self.url,
            connected=any(one.registered_once for one in processes),
            silences=self.silences,
            refusal=as_text(self.refusal),
            draining=any(one.draining for one in processes),
            load=sum(one.load for one in processes),
        )

    @property
    def reachable(self) -> bool:
        """Whether a process that serves it is ready. Any thread may call this."""
        return any(process.ready for process in list(self.processes.values()))

    def look_up(self, now: float) -> list[RegistrationAction]:
        """Begin a look-up if one is due and none is under way."""
        if self.machine.state is LookUpState.LOOKING_UP or now < self.look_up_at:
            return []
        self.machine.transition_to(LookUpState.LOOKING_UP)
        self.look_up_at = now + self.delay
        self.delay = min(self.delay * DELAY_FACTOR, MOST_DELAY_SECONDS)
        return [LookUp(self.url)]

    def look_up_soon(self) -> None:
        """The result of the last look-up may be outdated, so the next one is due now."""
        self.look_up_at, self.delay = 0.0, FIRST_DELAY_SECONDS
        if self.machine.state is LookUpState.RESOLVED:
            self.machine.transition_to(LookUpState.WAITING)

    def log(self, level: int, text: str) -> list[RegistrationAction]:
        if text == self.logged:
            return []
        self.logged = text
        return [Log(level, f"Encoder {self.url}: {text}")]

    def refuse(self, reason: str) -> list[RegistrationAction]:
        self.refusal = reason
        return [EncoderRefused(self.url, reason)]
