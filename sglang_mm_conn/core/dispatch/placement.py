"""Owns which encoder a part that waits goes to. Pure.

A part goes to an encoder that can be used, has not failed to encode it, and, if it had the part before, has proved
since that it is well. One of several parts that lost their encoder may have killed it, or failed the batch that they
were: so they do not share the next one if that can be helped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from sglang_mm_conn.core.dispatch.choice import Candidate
from sglang_mm_conn.core.dispatch.encoders import Encoder
from sglang_mm_conn.core.dispatch.fleet import Fleet
from sglang_mm_conn.core.dispatch.requests import Part

_USUAL_RATE = 0.1  # seconds per unit of work, until one was measured
# A part that kills encoders does so within this time. Many parts that have lost encoders do not wait longer.
TURN_SECONDS = 2.0


class Placement:
    """Reads the fleet, and changes nothing but how old its records of load are."""

    def __init__(self, fleet: Fleet, tries: int) -> None:
        """``tries``: most tries of a part."""
        self._fleet = fleet
        self._tries = tries

    def able(self, part: Part, now: float) -> list[Encoder]:
        """The encoders that may get a part that waits."""
        lost_at = {attempt.url: attempt.ended for attempt in part.tries}

        def fits(one: Encoder) -> bool:
            ended = lost_at.get(one.url)
            return one.url not in part.excluded and (ended is None or one.heard_at >= ended)

        able = [one for one in self._fleet.usable(now) if fits(one)]
        if not able and not self._fleet.undecided:
            able = [one for one in self._fleet.failing if fits(one)]
        # Those that had it come last.
        return [one for one in able if one.url not in lost_at] or able

    def choose(self, part: Part, able: list[Encoder], under_way: Iterable[Part], now: float) -> Encoder | None:
        """One of ``able`` for a part that waits; None: it must wait for its turn. ``under_way``: all posted parts."""
        others = [attempt for other in under_way if other.taken > 1 and (attempt := other.current) is not None]
        assert part.waits_since is not None
        if part.taken and self.is_last_chance(part) and now < part.waits_since + TURN_SECONDS:
            last = {attempt.url for attempt in others if attempt.last_chance}
            able = [one for one in able if one.url not in last]
        again = {attempt.url for attempt in others}
        able = [one for one in able if part.taken and one.url not in again] or able
        finish = {one.url: one for one in self.candidates(able, now)}
        return min(able, key=lambda one: finish[one.url].finish(part.work), default=None)

    def is_last_chance(self, part: Part) -> bool:
        """Whether no encoder is left for ``part`` if the next one fails."""
        if part.taken >= self._tries - 1:
            return True
        left = sum(one.url not in part.excluded for one in self._fleet.encoders.values() if one.listed)
        return bool(part.excluded) and left <= 1

    def candidates(self, encoders: Sequence[Encoder], now: float) -> list[Candidate]:
        """``encoders`` as the choice sees them."""
        rates = [one.load.known_rate for one in encoders]
        usual = fmean([rate for rate in rates if rate is not None] or [_USUAL_RATE])
        candidates = []
        for one in encoders:
            one.load.decay(now)
            candidates.append(
                Candidate(one.url, one.load.backlog, one.load.rate(usual, now), one.load.share, one.prefix_cache)
            )
        return candidates
