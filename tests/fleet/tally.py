"""Owns the count of what clients noticed: failed and wrong answers, the slowest, how many a second. Pure."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sglang_mm_conn.bench.measurement import quantile

NO_ANSWER = 0  # in place of an HTTP status: the connection broke, or nothing came in time
# What differs between two errors of one kind: names of rooms, addresses, process ids, durations.
_VARIES = re.compile(r"\b(?:[0-9a-f]{8,}|\d+(?:\.\d+)?)(?:[-_#][0-9a-z_]+)*")


@dataclass(frozen=True)
class Reply:
    """How one question went.

    Attributes:
        question: its name.
        images: how many it had.
        began: time.monotonic() when it was asked.
        seconds: until the answer, or until the client gave up.
        status: of HTTP, or NO_ANSWER.
        right: whether the answer is that of a colocated server.
        error: what the server, or the client's library, said.
    """

    question: str
    images: int
    began: float
    seconds: float
    status: int
    right: bool
    error: str = ""

    @property
    def failed(self) -> bool:
        return self.status != 200

    @property
    def wrong(self) -> bool:
        return not self.failed and not self.right

    @property
    def ended(self) -> float:
        return self.began + self.seconds


@dataclass(frozen=True)
class Event:
    """Something that the harness did to a server, or saw of it."""

    at: float  # time.monotonic()
    text: str


@dataclass(frozen=True)
class Tally:
    """Some replies, counted. Those that fit no filter are left out."""

    replies: tuple[Reply, ...]

    @classmethod
    def of(
        cls,
        replies: Iterable[Reply],
        *,
        since: float = 0.0,
        until: float = float("inf"),
        images: bool | None = None,
    ) -> Tally:
        """Those asked from ``since`` on and before ``until``; ``images``: only those with, or only those without."""
        return cls(
            tuple(
                reply
                for reply in replies
                if since <= reply.began < until and (images is None or bool(reply.images) is images)
            )
        )

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.replies + other.replies)

    @property
    def requests(self) -> int:
        return len(self.replies)

    @property
    def failed(self) -> tuple[Reply, ...]:
        return tuple(reply for reply in self.replies if reply.failed)

    @property
    def wrong(self) -> tuple[Reply, ...]:
        return tuple(reply for reply in self.replies if reply.wrong)

    @property
    def statuses(self) -> Counter[int]:
        """Of those that failed."""
        return Counter(reply.status for reply in self.failed)

    @property
    def slowest(self) -> float:
        return max((reply.seconds for reply in self.replies), default=0.0)

    @property
    def median(self) -> float:
        return statistics.median(reply.seconds for reply in self.replies) if self.replies else 0.0

    @property
    def p99(self) -> float:
        return quantile([reply.seconds for reply in self.replies], 0.99) if self.replies else 0.0

    @property
    def rate(self) -> float:
        """Requests a second, from the first question to the last answer."""
        if not self.replies:
            return 0.0
        took = max(reply.ended for reply in self.replies) - min(reply.began for reply in self.replies)
        return self.requests / max(took, 1e-9)

    def __str__(self) -> str:
        return (
            f"{self.requests} requests: {self.failed_text()} failed, {len(self.wrong)} wrong, "
            f"slowest {self.slowest:.1f} s, median {self.median:.2f} s"
        )

    def failed_text(self) -> str:
        """The number of those that failed, with their statuses."""
        if not self.failed:
            return "0"
        kinds = ", ".join(
            f"{count} {'without an answer' if status == NO_ANSWER else f'HTTP {status}'}"
            for status, count in self.statuses.most_common()
        )
        return f"{len(self.failed)} ({kinds})"


def kind_of(error: str) -> str:
    """The message of an error without what differs from one request to the next, in one line."""
    try:
        body = json.loads(error)
        text = str(body.get("message") or body.get("error") or error) if isinstance(body, dict) else error
    except ValueError:
        text = error
    return " ".join(_VARIES.sub("_", text).split())


def troubles(replies: Iterable[Reply], events: Sequence[Event], most: int = 12) -> list[str]:
    """A line for each kind of failed or wrong answer after each event: how many, what it said, when it began and for
    how long it went on. The most frequent first."""
    kinds: dict[tuple[str, str, Event | None], list[Reply]] = {}
    for reply in replies:
        if reply.failed or reply.wrong:
            status = "wrong answer" if reply.wrong else f"HTTP {reply.status}" if reply.status else "no answer"
            kinds.setdefault((status, kind_of(reply.error)[:200], last_event(reply.ended, events)), []).append(reply)
    lines = []
    for (status, text, event), some in sorted(kinds.items(), key=lambda kind: -len(kind[1])):
        first, last = min(reply.ended for reply in some), max(reply.ended for reply in some)
        after = f", first {first - event.at:.1f} s after {event.text!r}" if event else ""
        span = f"over {last - first:.1f} s" if last - first >= 0.1 else "at once"
        slowest = max(reply.seconds for reply in some)
        said = f": {text}" if text else ""
        lines.append(f"{len(some)} x {status}{after}, {span}, the slowest took {slowest:.1f} s{said}")
    left_out = len(lines) - most
    return [*lines[:most], f"and {left_out} other kinds"] if left_out > 0 else lines


def last_event(moment: float, events: Sequence[Event]) -> Event | None:
    """None before the first one. Events are in the order of their moments."""
    return next((event for event in reversed(events) if event.at <= moment), None)
