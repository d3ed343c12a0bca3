"""Owns the records of dispatch: a request, its parts, and each try to have a part encoded. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang_mm_conn.core.dispatch.verdicts import TryEnd

OVERDUE_SECONDS = 5.0  # the scheduler has given a request up for so long: nobody waits for it
# The language side has given a room up. If its request still waits, its scheduler says so within this time.
ABORTED_SECONDS = 2.0
# An encoder may be lost after it has said that a part has arrived, and before the language side knows.
DELIVERED_SECONDS = 2.0


@dataclass(slots=True)
class Try:
    """One try to have a part encoded: one post to one encoder, with a room of its own.

    Attributes:
        room: its name.
        url: the encoder.
        began: time of the post.
        ahead: work ahead of it and its own.
        ended: time of its end; None: it is under way.
        aborted_at: when its encoder said that the language side has given it up.
        last_chance: whether no other encoder can take the part if this one fails.
    """

    room: str
    url: str
    began: float
    ahead: float
    ended: float | None = None
    aborted_at: float | None = None
    last_chance: bool = False


@dataclass(slots=True)
class Part:
    """The items of a request that one encoder gets.

    Attributes:
        number, of: of the part within its request, and how many there are. Both stay, whoever encodes the part.
        modality: of its items.
        first, count: its items, among those of its modality.
        work: of its items.
        tries: all of them, the newest last.
        last: how the newest ended, if it failed.
        waits_since: since when it waits for an encoder; None: it does not wait.
        delivered: whether its encoder says that it has arrived.
        excluded: encoders that failed to encode it. They would fail again.
        refused: encoders that did not take it, at least once.
    """

    number: int
    of: int
    modality: str
    first: int
    count: int
    work: float
    tries: list[Try] = field(default_factory=list)
    last: TryEnd | None = None
    waits_since: float | None = None
    delivered: bool = False
    excluded: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)

    @property
    def taken(self) -> int:
        """Number of tries at which an encoder may have got the part. The first refusal of each encoder is none.

        So no part fails because several encoders end or drain at the same time, and none is tried without end.
        """
        return len(self.tries) - len(self.refused)

    @property
    def current(self) -> Try | None:
        """The try that is under way."""
        return self.tries[-1] if self.tries and self.tries[-1].ended is None else None


@dataclass(slots=True)
class Request:
    """One request that its scheduler may still wait for.

    Attributes:
        rid: its id, for logs; a later request may have the same.
        room_base: its name among all requests.
        deadline: time at which the scheduler gives it up.
        parts: by their numbers.
        delivered_at: when the last part was delivered; None: not all are.
    """

    rid: str
    room_base: str
    deadline: float
    parts: list[Part]
    delivered_at: float | None = None

    @property
    def unanswered(self) -> list[Try]:
        """The tries that are under way and of which their encoders have said nothing."""
        return [one for part in self.parts if (one := part.current) is not None and one.aborted_at is None]

    def is_over(self, now: float) -> bool:
        """Whether nobody waits for it any more."""
        if now > self.deadline + OVERDUE_SECONDS:
            return True
        if self.delivered_at is not None:
            return now > self.delivered_at + DELIVERED_SECONDS
        tries = [part.current for part in self.parts]
        return any(one is not None and one.aborted_at and now > one.aborted_at + ABORTED_SECONDS for one in tries)
