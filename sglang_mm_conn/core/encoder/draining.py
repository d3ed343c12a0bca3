"""Owns the draining of an encoder server: whether it takes new work, how much it holds, and when it may end. Pure."""

from __future__ import annotations

import math

from sglang_mm_conn.core.errors import ConnError
from sglang_mm_conn.core.states import DRAIN_TRANSITIONS, DrainState, StateMachine


class Draining:
    """The record of one server. One thread changes it; any thread may read ``held`` and ``refuses``.

    Attributes:
        held: Requests to /encode that the server has taken and not answered yet.
    """

    def __init__(self) -> None:
        self.held = 0
        self._machine = StateMachine(DRAIN_TRANSITIONS, DrainState.SERVING)
        self._deadline = math.inf

    @property
    def state(self) -> DrainState:
        return self._machine.state

    @property
    def refuses(self) -> bool:
        """Whether new work is refused."""
        return self._machine.state is not DrainState.SERVING

    def order(self, *, drain: bool) -> bool:
        """Begin to drain, or take new work again. Returns whether this changed anything.

        Raises ConnError if the server is about to end and is told to take new work.
        """
        if self.state in (DrainState.ENDING, DrainState.OVER):
            if not drain:
                raise ConnError("the encoder is ending (it got SIGTERM), and takes no new work any more")
            return False
        target = DrainState.DRAINING if drain else DrainState.SERVING
        if self.state is target:
            return False
        self._machine.transition_to(target)
        return True

    def end(self, now: float, seconds: float) -> bool:
        """Drain for at most ``seconds``, then end. A second call ends at once. Returns whether new work was taken until
        now."""
        if self.state in (DrainState.ENDING, DrainState.OVER):
            self._deadline = min(self._deadline, now)
            return False
        began = not self.refuses
        self._machine.transition_to(DrainState.ENDING)
        self._deadline = now + seconds
        return began

    def is_over(self, now: float) -> bool:
        """Whether a server that is ending may end now: it holds nothing, or its time is up."""
        if self.state is DrainState.ENDING and (self.held == 0 or now >= self._deadline):
            self._machine.transition_to(DrainState.OVER)
        return self.state is DrainState.OVER
