"""Owns what a dispatcher knows of its encoders: the state of each, the evidence for it, and when to probe it. Pure.

Evidence comes from the answers to ``/encode``, from probes (look-ups by the bootstrap route), and from the server's
scheduler, which has a control connection to each encoder (``EncoderStatus``). A user's request is never the probe: an
encoder that is DOWN or SUSPECT gets no part before a probe or its control connection says that it is well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from sglang_mm_conn.core.dispatch.encoders import (
    FAILURES_IN_A_ROW,
    FIRST_PROBE_SECONDS,
    FIRST_TRIAL_SECONDS,
    Encoder,
    EncoderStatus,
    StateChange,
)
from sglang_mm_conn.core.states import EncoderState

# Intervals of the probes of an encoder that is not up, from FIRST_PROBE_SECONDS on. The longest one is shorter than the
# 5 s within which an encoder that is back is to be used again.
PROBE_FACTOR = 1.6
MOST_PROBE_SECONDS = 2.0
# An encoder that is up and from which nothing was heard for so long is probed.
QUIET_SECONDS = 5.0
MOST_TRIAL_SECONDS = 60.0


class Fleet:
    """All encoders of one dispatcher. Every method returns the changes of states that it makes."""

    def __init__(self, peer_timeout: float = 10.0) -> None:
        """``peer_timeout``: a SUSPECT encoder that answers no probe for so many seconds is DOWN."""
        self.encoders: dict[str, Encoder] = {}
        self._peer_timeout = peer_timeout

    def know(self, urls: Iterable[str]) -> None:
        """Exactly the encoders at ``urls`` may get parts from now on. A new one is SUSPECT until it was probed."""
        listed = set()
        for url in urls:
            listed.add(url)
            if url not in self.encoders:
                self.encoders[url] = Encoder(url)
        for one in list(self.encoders.values()):
            one.listed = one.url in listed
            self.forget(one.url)

    def forget(self, url: str) -> None:
        """Drop ``url`` if it is not listed and nothing is under way there."""
        one = self.encoders.get(url)
        if one is not None and not one.listed and not one.load.parts:
            del self.encoders[url]

    def usable(self, now: float) -> list[Encoder]:
        """The encoders that may get a part now: those that are up, or else those that only fail."""
        up = [one for one in self.encoders.values() if one.state is EncoderState.UP and one.listed]
        return up + [one for one in self.failing if not up or (now >= one.trial_at and not one.load.parts)]

    @property
    def failing(self) -> list[Encoder]:
        """Encoders that answer, and fail. They may get a part that no other can have."""
        suspect = (one for one in self.encoders.values() if one.state is EncoderState.SUSPECT and one.listed)
        return [one for one in suspect if one.failing]

    @property
    def undecided(self) -> bool:
        """Whether a probe may soon find an encoder that can be used."""
        return any(one.undecided for one in self.encoders.values() if one.listed)

    # -- probes --------------------------------------------------------------------------------------------------

    def due_probes(self, now: float) -> list[str]:
        """The encoders to probe now. Each of them counts as being probed until ``probed`` or ``probe_failed``."""
        due = [one for one in self.encoders.values() if not one.probing and now >= self._probe_time(one)]
        for one in due:
            one.probing, one.probed_at = True, now
            one.probe_at = now + one.probe_delay
            one.probe_delay = min(one.probe_delay * PROBE_FACTOR, MOST_PROBE_SECONDS)
        return [one.url for one in due]

    @staticmethod
    def _probe_time(one: Encoder) -> float:
        if one.state is not EncoderState.UP or one.doubted:
            return one.probe_at
        return max(one.probe_at, max(one.heard_at, one.connected_at) + QUIET_SECONDS)

    def look_again(self, since: float) -> bool:
        """Whether an encoder may have come up unnoticed by ``since``: each is probed after that, once."""
        unsure = [one for one in self.encoders.values() if one.listed and (one.probing or one.probed_at < since)]
        for one in unsure:
            if not one.probing:
                one.probe_at = min(one.probe_at, since)
        return bool(unsure)

    def probe_now(self, url: str) -> None:
        """Probe ``url`` as soon as possible: there is a doubt about it."""
        one = self.encoders.get(url)
        if one is not None:
            one.doubted, one.probe_at, one.probe_delay = True, -math.inf, FIRST_PROBE_SECONDS

    def probed(self, url: str, *, draining: bool, prefix_cache: bool, now: float) -> list[StateChange]:
        """The encoder has answered a look-up."""
        one = self.encoders.get(url)
        if one is None:
            return []
        one.probing = False
        self._answers(one)
        one.prefix_cache = prefix_cache
        one.heard_at = max(one.heard_at, one.probed_at)  # it may have been lost since
        if one.probe_at == -math.inf:
            return []  # there is a doubt that is newer than the probe; the next probe says more
        one.doubted, one.probe_at, one.probe_delay = False, now + MOST_PROBE_SECONDS, FIRST_PROBE_SECONDS
        return self._well(one, draining, "it answers")

    def probe_failed(self, url: str, reason: str, *, silent: bool, now: float) -> list[StateChange]:
        """A look-up has failed. ``silent``: because no answer came in time, which a busy encoder may owe."""
        one = self.encoders.get(url)
        if one is None:
            return []
        one.probing = False
        if silent:
            one.silent_since = min(one.silent_since, one.probed_at)
            one.mute = now >= one.silent_since + self._peer_timeout
        if silent and one.connected and one.state in (EncoderState.UP, EncoderState.DRAINING):
            return []  # its heartbeats came within the peer timeout; its event loop is busy
        if silent and not one.mute and (one.connected or one.state in (EncoderState.UP, EncoderState.SUSPECT)):
            changes = self._become(one, EncoderState.SUSPECT, reason)
            one.silent_since = min(one.silent_since, one.probed_at)  # in its new state, too
            return changes
        return self._become(one, EncoderState.DOWN, reason)

    # -- what the scheduler's side says --------------------------------------------------------------------------

    def reported(self, statuses: Sequence[EncoderStatus], now: float) -> list[StateChange]:
        """The scheduler's side reports all encoders that it knows. What it has forgotten holds no longer."""
        reported = {status.url for status in statuses}
        for one in self.encoders.values():
            if one.url not in reported:
                one.status = None
        return [change for status in statuses for change in self.reported_one(status, now)]

    def reported_one(self, status: EncoderStatus, now: float) -> list[StateChange]:
        """The scheduler's side reports an encoder. Reports are repeated; only what is new changes anything."""
        one = self.encoders.get(status.url)
        if one is None:
            return []
        before, one.status = one.status, status
        one.load.reported(status.load)
        if before is not None and status.silences > before.silences:
            self.probe_now(one.url)
            if status.connected:  # one of several processes; which one has which part is not known
                return self._become(one, EncoderState.SUSPECT, "one of its processes fell silent", loses=True)
            return self._become(one, EncoderState.DOWN, "it fell silent")
        if status.refusal:
            if before is not None and before.refusal == status.refusal:
                return []
            return self._become(one, EncoderState.DOWN, status.refusal)
        if status.connected:
            one.connected_at = now
            if before is None or not before.connected or before.draining != status.draining or before.refusal:
                self.probe_now(one.url)  # the report may be old
                self._answers(one)
                return self._well(one, status.draining, "it is registered")
            return []
        if before is not None and before.connected and one.state is EncoderState.UP:
            self.probe_now(one.url)
            return self._become(one, EncoderState.SUSPECT, "its control connection is lost")
        return []

    # -- what became of parts ------------------------------------------------------------------------------------

    def posted(self, url: str, now: float) -> None:
        """A part is posted to ``url``."""
        one = self.encoders.get(url)
        if one is None:
            return
        one.tried += 1
        if one.failing:
            one.trial_at = now + one.trial_delay
            one.trial_delay = min(2 * one.trial_delay, MOST_TRIAL_SECONDS)

    def delivered(self, url: str, now: float) -> list[StateChange]:
        """``url`` has delivered a part."""
        one = self.encoders.get(url)
        if one is None:
            return []
        one.heard_at = one.delivered_at = now
        self._answers(one)
        one.errors, one.losses, one.trial_at, one.trial_delay = 0, 0, math.inf, FIRST_TRIAL_SECONDS
        return self._become(one, EncoderState.UP, "it delivers") if one.state is EncoderState.SUSPECT else []

    def erred(self, url: str, reason: str, *, began: float, now: float) -> list[StateChange]:
        """``url`` has answered that it failed, for no fault of the input. The part was posted at ``began``."""
        one = self.encoders.get(url)
        if one is None:
            return []
        one.failed += 1
        one.heard_at = now
        self._answers(one)
        if began < one.erred_at:
            return []
        one.errors, one.erred_at = one.errors + 1, now
        if one.errors == FAILURES_IN_A_ROW:
            one.trial_at = now + one.trial_delay
        if not one.failing or one.state is not EncoderState.UP:
            return []
        return self._become(one, EncoderState.SUSPECT, f"{one.errors} errors in a row, the last: {reason}")

    def lost(self, url: str, to: EncoderState | None, reason: str, *, began: float, now: float) -> list[StateChange]:
        """A part that was posted at ``began`` was lost at ``url``. ``to``: the state that this proves, if any.

        A probe follows in any case.
        """
        one = self.encoders.get(url)
        if one is None:
            return []
        one.failed += 1
        self.probe_now(url)
        if to is not EncoderState.DRAINING and began >= one.lost_at:
            one.losses, one.lost_at = one.losses + 1, now
            if one.losses == FAILURES_IN_A_ROW:
                one.trial_at = now + one.trial_delay
            if one.failing:
                to, reason = to or EncoderState.SUSPECT, f"{one.losses} losses in a row, the last: {reason}"
        if to is None or (to is EncoderState.SUSPECT and one.state is not EncoderState.UP):
            return []
        return self._become(one, to, reason)

    def held(self, url: str, *, began: float, now: float) -> list[StateChange]:
        """A part that was posted at ``began`` is given up while ``url`` has it.

        If it has delivered nothing since, for the peer timeout or longer, its HTTP loop may hang while its heartbeats
        go on: the part counts as lost there.
        """
        one = self.encoders.get(url)
        if one is None or one.delivered_at >= began or now < began + self._peer_timeout:
            return []
        return self.lost(url, None, f"it has delivered nothing for {now - began:.0f} s", began=began, now=now)

    def _well(self, one: Encoder, draining: bool, reason: str) -> list[StateChange]:
        if one.status is not None and one.status.refusal:
            return self._become(one, EncoderState.DOWN, one.status.refusal)
        if draining:
            return self._become(one, EncoderState.DRAINING, "it drains")
        if one.state is EncoderState.DOWN:  # perhaps another process
            one.errors = 0
            if not one.failing:
                one.trial_at, one.trial_delay = math.inf, FIRST_TRIAL_SECONDS
        if one.state is EncoderState.SUSPECT and one.failing:
            return []  # it answered look-ups all the while; only an embedding shows that it can encode
        if one.failing:
            return self._become(one, EncoderState.SUSPECT, f"{reason}, but its last parts failed")
        return self._become(one, EncoderState.UP, reason)

    @staticmethod
    def _answers(one: Encoder) -> None:
        one.silent_since, one.mute = math.inf, False

    def _become(self, one: Encoder, state: EncoderState, reason: str, *, loses: bool = False) -> list[StateChange]:
        one.reason = reason
        if one.state is state and not loses:
            return []
        old = one.state
        if state is not EncoderState.DOWN:  # one that is DOWN must answer to leave it
            self._answers(one)
        if old is not state:
            one.machine.transition_to(state)
        return [StateChange(one.url, old, state, reason, loses or state is EncoderState.DOWN)]
