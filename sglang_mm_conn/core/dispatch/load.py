"""Owns the estimate of an encoder's load: the work that it has, and how long it takes for some more. Pure.

Work is counted in units of about one megapixel. How many seconds a unit takes is learned per encoder, from how long
each part took in relation to the work that was ahead of it. So an encoder that is slow, or has other servers' work,
too, is seen to be slow.
"""

from __future__ import annotations

import math

IMAGE_WORK = 1.0  # of an image whose size is unknown
LEAST_WORK = 0.02
_VIDEO_BYTES, _AUDIO_BYTES = 250_000, 320_000  # about one unit: a second of compressed video, ten of sound

NEWEST = 0.2  # weight of the newest sample in an average
HALF_LIFE_SECONDS = 300.0  # of the record of who got how much
FORGET_SECONDS = 60.0  # an encoder that got no part for so long may have another speed by now


def work_of(modality: str, *, pixels: int = 0, nbytes: int = 0) -> float:
    """The work of one item in units.

    Args:
        modality: IMAGE, VIDEO or AUDIO.
        pixels: of an image; 0: unknown.
        nbytes: of its encoded data; 0: unknown.
    """
    if modality == "VIDEO":
        work = nbytes / _VIDEO_BYTES or 8 * IMAGE_WORK
    elif modality == "AUDIO":
        work = nbytes / _AUDIO_BYTES or IMAGE_WORK
    else:
        work = pixels / 1e6 or IMAGE_WORK
    return max(work, LEAST_WORK)


class EncoderLoad:
    """The work at one encoder.

    Attributes:
        parts: parts that this dispatcher has there.
        work: their work.
        share: work that this dispatcher ever sent there; old work counts less.
    """

    __slots__ = ("_others", "_rate", "_rate_at", "_share_at", "_work_per_part", "parts", "share", "work")

    def __init__(self) -> None:
        self.parts = 0
        self.work = 0.0
        self.share = 0.0
        self._share_at = 0.0
        self._others = 0.0  # parts of other language servers
        self._work_per_part = IMAGE_WORK
        self._rate: float | None = None  # seconds per unit
        self._rate_at = 0.0

    def reported(self, requests: int) -> None:
        """The encoder says that it holds so many requests."""
        self._others += NEWEST * (max(0, requests - self.parts) - self._others)

    def add(self, work: float, now: float) -> float:
        """A part is posted. Returns the work ahead of and including it."""
        self.decay(now)
        self.parts += 1
        self.work += work
        self.share += work
        self._work_per_part += NEWEST * (work - self._work_per_part)
        return self.backlog

    def remove(self, work: float) -> None:
        """A part is over."""
        self.parts -= 1
        self.work = self.work - work if self.parts else 0.0  # no rounding errors remain

    def took(self, seconds: float, ahead: float, now: float) -> None:
        """A part with ``ahead`` (see ``add``) was delivered after ``seconds``."""
        sample = seconds / ahead
        self._rate = sample if self._rate is None else self._rate + NEWEST * (sample - self._rate)
        self._rate_at = now

    @property
    def backlog(self) -> float:
        """Work at the encoder, of all servers."""
        return self.work + self._others * self._work_per_part

    def rate(self, usual: float, now: float) -> float:
        """Seconds per unit of work. ``usual``: that of the other encoders, to which an old record tends."""
        if self._rate is None:
            return usual
        return usual + (self._rate - usual) * math.exp(-max(0.0, now - self._rate_at) / FORGET_SECONDS)

    @property
    def known_rate(self) -> float | None:
        """Seconds per unit of work, as far as that was measured."""
        return self._rate

    def decay(self, now: float) -> None:
        """Let old work in ``share`` count less."""
        self.share *= 0.5 ** (max(0.0, now - self._share_at) / HALF_LIFE_SECONDS)
        self._share_at = now
