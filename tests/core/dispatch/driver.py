"""A dispatcher's core with a clock, and what became of its actions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from sglang_mm_conn.core.dispatch.actions import (
    CancelPost,
    DispatchAction,
    Forget,
    GiveUp,
    LogLine,
    Post,
    Probe,
    Redispatched,
)
from sglang_mm_conn.core.dispatch.choice import Item
from sglang_mm_conn.core.dispatch.dispatcher import DispatchCore
from sglang_mm_conn.core.dispatch.encoders import EncoderStatus
from sglang_mm_conn.core.dispatch.requests import Part
from sglang_mm_conn.core.dispatch.verdicts import DELIVERED, TryEnd, Verdict
from sglang_mm_conn.core.states import EncoderState

A, B, C, D = "http://a:1", "http://b:1", "http://c:1", "http://d:1"
CODES = {
    Verdict.INPUT: 400,
    Verdict.ABORTED: 499,
    Verdict.ERROR: 500,
    Verdict.DRAINS: 503,
}


def end_of(verdict: Verdict, reason: str = "why", code: int = 0) -> TryEnd:
    return DELIVERED if verdict is Verdict.DELIVERED else TryEnd(verdict, code or CODES.get(verdict, 502), reason)


class Driver:
    """Carries actions out as far as notes of them go. Tests answer posts and probes themselves."""

    def __init__(
        self, *urls: str, tries: int = 3, wait: float = 0.0, up: bool = True, peer_timeout: float = 10.0
    ) -> None:
        self.now = 100.0
        self._bases = itertools.count()
        self.core = DispatchCore(tries=tries, wait_seconds=wait, new_room_base=self.new_base, peer_timeout=peer_timeout)
        self.posts: list[Post] = []  # all of them
        self.open: dict[str, Post] = {}  # those that are neither answered nor cancelled
        self.cancelled: list[str] = []
        self.probes: list[str] = []  # that are under way
        self.news: list[Redispatched | GiveUp] = []
        self.forgotten: list[str] = []
        self.log: list[str] = []
        self.statuses: dict[str, EncoderStatus] = {}
        self.placed: list[tuple[str, Part]] = []  # of the newest request
        self.carry_out(self.core.know(urls, self.now))
        if up:
            for url in urls:
                self.well(url)

    def new_base(self) -> str:
        return f"base-{next(self._bases)}"

    def carry_out(self, actions: Sequence[DispatchAction]) -> Sequence[DispatchAction]:
        for action in actions:
            match action:
                case Post(room):
                    self.posts.append(action)
                    self.open[room] = action
                case CancelPost(room):
                    self.cancelled.append(room)
                    self.open.pop(room, None)
                case Probe(url):
                    self.probes.append(url)
                case Redispatched() | GiveUp():
                    self.news.append(action)
                case Forget(room_base):
                    self.forgotten.append(room_base)
                case LogLine(_, text):
                    self.log.append(text)
        return actions

    # -- events ----------------------------------------------------------------------------------------------------

    def dispatch(self, *works: float, seconds: float = 60.0, modality: str = "IMAGE", rid: str = "r") -> str:
        """A request with one item for each of ``works`` (default: one). Returns its room base."""
        items = [Item(modality, work) for work in works or (1.0,)]
        return self.dispatch_items(items, seconds, rid)

    def dispatch_items(self, items: Sequence[Item], seconds: float = 60.0, rid: str = "r") -> str:
        base = self.new_base()
        self.placed, actions = self.core.dispatch(rid, base, items, self.now + seconds, self.now)
        self.carry_out(actions)
        return base

    def answer(self, room: str, verdict: Verdict, reason: str = "why", code: int = 0) -> Sequence[DispatchAction]:
        self.open.pop(room, None)
        return self.carry_out(self.core.answered(room, end_of(verdict, reason, code), self.now))

    def room_failed(self, room: str, code: int = 502, reason: str = "why") -> Sequence[DispatchAction]:
        return self.carry_out(self.core.room_failed(room, code, reason, self.now))

    def well(self, url: str, *, draining: bool = False, prefix_cache: bool = False) -> Sequence[DispatchAction]:
        self.now += 1e-3  # a sign of life is later than what was before it
        if url in self.probes:
            self.probes.remove(url)
        return self.carry_out(
            self.core.probed(url, draining=draining, prefix_cache=prefix_cache, now=self.now)
        )  # fmt: skip

    def absent(self, url: str, *, silent: bool = False) -> Sequence[DispatchAction]:
        if url in self.probes:
            self.probes.remove(url)
        return self.carry_out(self.core.probe_failed(url, "refused", silent=silent, now=self.now))

    def status(self, url: str, *, connected: bool = True, silences: int = 0) -> Sequence[DispatchAction]:
        return self.reported(EncoderStatus(url, connected, silences))

    def reported(self, status: EncoderStatus) -> Sequence[DispatchAction]:
        """The scheduler's side reports all that it knows; ``status`` is what is new."""
        self.statuses[status.url] = status
        return self.carry_out(self.core.encoders_reported([*self.statuses.values()], self.now))

    def know(self, *urls: str) -> Sequence[DispatchAction]:
        return self.carry_out(self.core.know(urls, self.now))

    def tick(self, seconds: float = 0.0) -> Sequence[DispatchAction]:
        self.now += seconds
        return self.carry_out(self.core.tick(self.now))

    # -- what is where ---------------------------------------------------------------------------------------------

    def state(self, url: str) -> EncoderState:
        return self.core.fleet.encoders[url].state

    def at(self, base: str, part: int = 0) -> Post:
        """The post of the part that is under way."""
        (post,) = [one for one in self.open.values() if (one.room_base, one.part) == (base, part)]
        return post

    def news_of(self, base: str) -> list[Redispatched | GiveUp]:
        return [one for one in self.news if one.room_base == base]

    def loads(self) -> dict[str, tuple[int, float]]:
        return {url: (one.load.parts, round(one.load.work, 9)) for url, one in self.core.fleet.encoders.items()}
