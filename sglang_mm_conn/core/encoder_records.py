"""The records of core.registration: an encoder URL and its look-ups, an encoder process and its registration. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang_mm_conn.core.actions import EncoderRefused, Log, LookUp, RegistrationAction
from sglang_mm_conn.core.states import (
    LOOK_UP_TRANSITIONS,
    REGISTRATION_TRANSITIONS,
    LookUpState,
    RegistrationState,
    StateMachine,
)

# Back-off of look-ups: seconds after the first one, the factor from one to the next, and the most.
FIRST_DELAY_SECONDS = 0.5
DELAY_FACTOR = 1.5
MOST_DELAY_SECONDS = 5.0


@dataclass(slots=True)
class EncoderProcess:
    """One encoder process; more than one URL may lead to it.

    Attributes:
        incarnation: the random id of its life.
        slot: the writer slot that its Register names.
        path: the data path that is offered to it.
        last_seen: when it was last received from, in seconds.
        machine: the state of the registration.
        registered_once: whether it has ever been READY: its loss is then news.
        unanswered: Registers that it has not answered.
        register_at: when to send the next Register; None: not by time.
    """

    incarnation: str
    slot: int
    path: str
    last_seen: float
    machine: StateMachine[RegistrationState] = field(
        default_factory=lambda: StateMachine(REGISTRATION_TRANSITIONS, RegistrationState.CONNECTING)
    )
    registered_once: bool = False
    unanswered: int = 0
    register_at: float | None = None

    @property
    def ready(self) -> bool:
        return self.machine.state is RegistrationState.READY

    def become(self, state: RegistrationState) -> None:
        """Change to ``state``, if it is not the present one. Raises IllegalTransition."""
        if self.machine.state is not state:
            self.machine.transition_to(state)

    def takes_answer(self) -> bool:
        """Whether a Register awaits an answer; this one counts as it."""
        if self.unanswered < 1:
            return False
        self.unanswered -= 1
        return True


@dataclass(slots=True)
class EncoderUrl:
    """One encoder URL.

    Attributes:
        last_used: when a request last named it, in seconds.
        processes: those that serve it, by incarnation.
        machine: the state of looking it up.
        look_up_at: no look-up begins before this.
        delay: seconds from the next look-up to the one after it.
        refusal: why it cannot be used; empty where it can or is not known yet.
        logged: the last line about it, so that one cause is logged once.
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

    @property
    def reachable(self) -> bool:
        """Whether a process of it is ready. May be asked by any thread."""
        return any(process.ready for process in list(self.processes.values()))

    def look_up(self, now: float) -> list[RegistrationAction]:
        """A look-up, if it is time for one and none is under way."""
        if self.machine.state is LookUpState.LOOKING_UP or now < self.look_up_at:
            return []
        self.machine.transition_to(LookUpState.LOOKING_UP)
        self.look_up_at = now + self.delay
        self.delay = min(self.delay * DELAY_FACTOR, MOST_DELAY_SECONDS)
        return [LookUp(self.url)]

    def look_up_soon(self) -> None:
        """What the last look-up said may not hold any more."""
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
