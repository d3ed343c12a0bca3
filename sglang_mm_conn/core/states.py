"""Owns the state machines: for each an Enum and one table of allowed transitions.

``Poll`` has the same numbers as sglang's ``KVPoll``. A room's poll value never goes back: a caller that saw
Transferring twice would act twice.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Generic, TypeVar

from sglang_mm_conn.core.errors import IllegalTransition


class Poll(IntEnum):
    """The values that ``poll()`` returns on both sides."""

    Failed = 0
    Bootstrapping = 1
    WaitingForInput = 2
    Transferring = 3
    Success = 4


class _State(Enum):
    """Hashes members by identity, which is how they compare. Enum hashes their names in Python, ten times slower."""

    __hash__ = object.__hash__


class ReceiverState(_State):
    """A room on the language side."""

    EXPECTED = "expected"  # a request waits for the room. Left by: Announce
    QUEUED = "queued"  # announced; waits for blocks and holds none. Left by: blocks are free, an offer is sent
    OFFERED = "offered"  # the encoder may write its blocks at any moment. Left by: Progress or Done of this window
    COPYING = "copying"  # the window is confirmed; its rows are copied out of the blocks. Left by: copied out
    SUCCESS = "success"  # every row is in the result
    FAILED = "failed"  # from any state: an error of either side, an abort, the deadline, a lost encoder


RECEIVER_TRANSITIONS: dict[ReceiverState, frozenset[ReceiverState]] = {
    ReceiverState.EXPECTED: frozenset({ReceiverState.QUEUED, ReceiverState.FAILED}),
    ReceiverState.QUEUED: frozenset({ReceiverState.OFFERED, ReceiverState.FAILED}),
    ReceiverState.OFFERED: frozenset({ReceiverState.COPYING, ReceiverState.FAILED}),
    ReceiverState.COPYING: frozenset({ReceiverState.QUEUED, ReceiverState.SUCCESS, ReceiverState.FAILED}),
    ReceiverState.SUCCESS: frozenset(),
    ReceiverState.FAILED: frozenset(),
}


class SenderState(_State):
    """A room on the encoder side, over all its sessions."""

    ANNOUNCED = "announced"  # an Init is missing. Left by: the last required Init
    READY = "ready"  # every rank has sent Init; the embedding is not computed yet. Left by: the embedding
    TRANSFERRING = "transferring"  # complete; its queue is chosen. Left by: the last window of the last session
    SUCCESS = "success"  # every session has every row
    FAILED = "failed"  # from any state: a failed write, an Abort, the deadline, a lost language rank


SENDER_TRANSITIONS: dict[SenderState, frozenset[SenderState]] = {
    SenderState.ANNOUNCED: frozenset({SenderState.READY, SenderState.TRANSFERRING, SenderState.FAILED}),
    SenderState.READY: frozenset({SenderState.TRANSFERRING, SenderState.FAILED}),
    SenderState.TRANSFERRING: frozenset({SenderState.SUCCESS, SenderState.FAILED}),
    SenderState.SUCCESS: frozenset(),
    SenderState.FAILED: frozenset(),
}


class WindowState(_State):
    """The current window of one (room, session) on the encoder side."""

    OFFERED = "offered"  # blocks are offered, no byte is written. Left by: a data call begins
    WRITING = "writing"  # a data call is under way. Left by: the data call returns
    PARTIAL = "partial"  # confirmed, rows remain. Left by: Resume
    DONE = "done"  # every row is confirmed
    CLOSED = "closed"  # failed; no write is under way or will come
    IN_DOUBT = "in_doubt"  # a data call failed, and its bytes may still land


WINDOW_TRANSITIONS: dict[WindowState, frozenset[WindowState]] = {
    WindowState.OFFERED: frozenset({WindowState.WRITING, WindowState.CLOSED}),
    WindowState.WRITING: frozenset({WindowState.PARTIAL, WindowState.DONE, WindowState.CLOSED, WindowState.IN_DOUBT}),
    WindowState.PARTIAL: frozenset({WindowState.OFFERED, WindowState.CLOSED}),
    WindowState.DONE: frozenset(),
    WindowState.CLOSED: frozenset(),
    WindowState.IN_DOUBT: frozenset(),
}


class LookUpState(_State):
    """An encoder URL on the language side. A look-up over HTTP finds the processes that serve it."""

    WAITING = "waiting"  # no look-up is under way; the next one begins at its time
    LOOKING_UP = "looking_up"  # a look-up is under way; its answer leads to RESOLVED, its failure to WAITING
    RESOLVED = "resolved"  # the processes are known; the loss of one leads to WAITING


LOOK_UP_TRANSITIONS: dict[LookUpState, frozenset[LookUpState]] = {
    LookUpState.WAITING: frozenset({LookUpState.LOOKING_UP}),
    LookUpState.LOOKING_UP: frozenset({LookUpState.WAITING, LookUpState.RESOLVED}),
    LookUpState.RESOLVED: frozenset({LookUpState.WAITING, LookUpState.LOOKING_UP}),
}


class RegistrationState(_State):
    """The registration of this rank's session with one encoder process, on the language side."""

    CONNECTING = "connecting"  # no control connection; a connection leads to REGISTERING
    REGISTERING = "registering"  # Registered leads to READY; after a temporary refusal the rank registers again
    READY = "ready"  # registered: it serves rooms and gets heartbeats; stays READY while a newer epoch is registered
    REFUSED = "refused"  # the two sides do not fit, or no Register could be built; the rank registers again every 5 s
    LOST = "lost"  # the process has ended or is silent; its record is dropped, a look-up makes a new one


REGISTRATION_TRANSITIONS: dict[RegistrationState, frozenset[RegistrationState]] = {
    RegistrationState.CONNECTING: frozenset(
        {RegistrationState.REGISTERING, RegistrationState.READY, RegistrationState.REFUSED, RegistrationState.LOST}
    ),
    RegistrationState.REGISTERING: frozenset(
        {RegistrationState.CONNECTING, RegistrationState.READY, RegistrationState.REFUSED, RegistrationState.LOST}
    ),
    RegistrationState.READY: frozenset(
        {RegistrationState.CONNECTING, RegistrationState.REGISTERING, RegistrationState.REFUSED, RegistrationState.LOST}
    ),
    RegistrationState.REFUSED: frozenset(
        {RegistrationState.CONNECTING, RegistrationState.REGISTERING, RegistrationState.READY, RegistrationState.LOST}
    ),
    RegistrationState.LOST: frozenset(),
}


class EncoderState(_State):
    """An encoder URL, as the dispatcher of a language server sees it."""

    UP = "up"  # it answers, so it gets work. Left by: evidence against it
    SUSPECT = "suspect"  # unknown, or there is evidence against it; a probe decides
    DRAINING = "draining"  # it says that it will end; it finishes what it has and gets no new work
    DOWN = "down"  # it does not answer, or is no encoder that fits; it gets no work, only probes


_ENCODER_STATES = frozenset(EncoderState)
# Evidence comes from several sources in any order, so every change is possible.
ENCODER_TRANSITIONS: dict[EncoderState, frozenset[EncoderState]] = {
    EncoderState.UP: _ENCODER_STATES - {EncoderState.UP},
    EncoderState.SUSPECT: _ENCODER_STATES - {EncoderState.SUSPECT},
    EncoderState.DRAINING: _ENCODER_STATES - {EncoderState.DRAINING},
    EncoderState.DOWN: frozenset({EncoderState.UP, EncoderState.SUSPECT, EncoderState.DRAINING}),
}


class DrainState(_State):
    """Whether an encoder server takes new work, and what becomes of the work that it holds."""

    SERVING = "serving"  # takes new work. Left by: an order to drain, SIGTERM
    DRAINING = "draining"  # refuses new work and finishes what it holds. Left by: the order is undone, SIGTERM
    ENDING = "ending"  # the same, for a limited time; cannot be undone. Left by: nothing is held, or the time is up
    OVER = "over"  # what is still held fails, and the process ends


DRAIN_TRANSITIONS: dict[DrainState, frozenset[DrainState]] = {
    DrainState.SERVING: frozenset({DrainState.DRAINING, DrainState.ENDING}),
    DrainState.DRAINING: frozenset({DrainState.SERVING, DrainState.ENDING}),
    DrainState.ENDING: frozenset({DrainState.OVER}),
    DrainState.OVER: frozenset(),
}


State = TypeVar("State", bound=Enum)


class StateMachine(Generic[State]):
    """Holds one state and refuses every transition that its table does not allow."""

    __slots__ = ("_allowed", "_table", "state")

    def __init__(self, transitions: dict[State, frozenset[State]], start: State) -> None:
        self._table = transitions
        self.state = start
        self._allowed = transitions[start]

    def transition_to(self, target: State) -> None:
        """Change to ``target``. Raises IllegalTransition, and changes nothing, if the table does not allow it."""
        if target not in self._allowed:
            raise IllegalTransition(f"{type(target).__name__}: {self.state.value} -> {target.value} is not allowed")
        self.state = target
        self._allowed = self._table[target]

    @property
    def final(self) -> bool:
        """Whether no transition leaves this state."""
        return not self._allowed
