"""Owns the record of one encoder at a dispatcher: its state, the evidence for it, its probes, errors and load. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import msgspec

from sglang_mm_conn.core.dispatch.load import EncoderLoad
from sglang_mm_conn.core.states import ENCODER_TRANSITIONS, EncoderState, StateMachine

FIRST_PROBE_SECONDS = 0.25
# So many errors or losses in a row, without an embedding in between, make an encoder SUSPECT whatever a probe says. It
# then gets one part at a time, as a trial, at intervals from FIRST_TRIAL_SECONDS on, each twice the one before.
FAILURES_IN_A_ROW = 3
FIRST_TRIAL_SECONDS = 2.0


class EncoderStatus(msgspec.Struct, frozen=True):
    """What the scheduler's side knows of an encoder.

    Attributes:
        url: of the encoder.
        connected: whether a process of it was registered and is not lost. A frozen one, or one whose connection is
            broken, is lost after the peer timeout.
        silences: how many of its processes were lost because they fell silent, since this server started.
        refusal: why it cannot serve this server; empty: it can, or that is not known.
        draining: whether it says so.
        load: requests that its server holds, from all language servers.
    """

    url: str
    connected: bool
    silences: int = 0
    refusal: str = ""
    draining: bool = False
    load: int = 0


@dataclass(frozen=True, slots=True)
class StateChange:
    """An encoder has another state. ``loses``: the parts that it has are lost."""

    url: str
    old: EncoderState
    new: EncoderState
    reason: str
    loses: bool = False


@dataclass(slots=True)
class Encoder:
    """One encoder URL.

    Attributes:
        url: without a trailing slash.
        machine: its state.
        reason: why it has this state.
        status: what the scheduler's side last said.
        probing: whether a probe is under way; ``probed_at``: when the last one began.
        silent_since: when the first of the last probes in a row began that were not answered, in this state.
        mute: whether that was the peer timeout or more before the end of the last one.
        doubted: whether a part was lost there, or a report speaks against it, and no probe has been answered since.
        probe_at: the next probe is due then.
        probe_delay: seconds from the next probe to the one after it.
        heard_at: time of the last sign of life.
        delivered_at: time of the last embedding.
        connected_at: when the scheduler's side last said that it is connected, which is true of a frozen one, too.
        errors: errors in a row, each of a part posted when the one before was known: a batch fails together.
        losses: parts lost in a row, each posted when the one before was lost (``lost_at``): one death is one loss.
        erred_at: time of the last error that was counted.
        listed: whether it is still one of the server's encoders. One that is not keeps its parts, and gets none.
        trial_at, trial_delay: when it may get a part as a trial while it fails, and the interval after that.
        prefix_cache: whether it keeps embeddings of earlier items.
        load: the work that it has.
        tried, failed: parts posted to it, and those that it did not deliver.
    """

    url: str
    machine: StateMachine[EncoderState] = field(
        default_factory=lambda: StateMachine(ENCODER_TRANSITIONS, EncoderState.SUSPECT)
    )
    reason: str = "not probed yet"
    status: EncoderStatus | None = None
    probing: bool = False
    probed_at: float = -math.inf
    silent_since: float = math.inf
    mute: bool = False
    doubted: bool = False
    probe_at: float = -math.inf
    probe_delay: float = FIRST_PROBE_SECONDS
    heard_at: float = -math.inf
    delivered_at: float = -math.inf
    connected_at: float = -math.inf
    errors: int = 0
    losses: int = 0
    lost_at: float = -math.inf
    erred_at: float = -math.inf
    listed: bool = True
    trial_at: float = math.inf
    trial_delay: float = FIRST_TRIAL_SECONDS
    prefix_cache: bool = False
    load: EncoderLoad = field(default_factory=EncoderLoad)
    tried: int = 0
    failed: int = 0

    @property
    def state(self) -> EncoderState:
        return self.machine.state

    @property
    def connected(self) -> bool:
        return self.status is not None and self.status.connected

    @property
    def failing(self) -> bool:
        """Whether it answers, but with errors, or answers probes and delivers nothing."""
        return max(self.errors, self.losses) >= FAILURES_IN_A_ROW

    @property
    def undecided(self) -> bool:
        """Whether a probe will soon say more."""
        if self.state is EncoderState.SUSPECT and not self.failing:
            return True
        return self.state in (EncoderState.UP, EncoderState.SUSPECT) and self.doubted and not self.mute

    def report(self) -> dict[str, object]:
        """What operators see."""
        work = round(self.load.backlog, 3)
        counts = {"parts": self.load.parts, "work": work, "tried": self.tried, "failed": self.failed}
        return {"state": self.state.value, "reason": self.reason, **counts}
