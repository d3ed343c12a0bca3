"""Owns the choice of encoders: which items of a request go where. Pure.

Without caches each item goes where it is expected to be finished first, and the items of a request are split only where
that is faster. With encoders that keep the embeddings of earlier items (``--enable-prefix-mm-cache``), an item goes
where it went before; at first to its home, which rendezvous hashing (Thaler and Ravishankar, 1998) makes the same on
every language server. Both are bounded by the load, after Mirrokni et al., "Consistent Hashing with Bounded Loads".
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean

import msgspec

# What a further part costs a request: one more HTTP request and one more room.
PART_SECONDS = 0.01
# An encoder that has got this much more than its share is no home for a new item. That many items more do not matter:
# at first shares differ by chance, and servers that see other items choose other homes.
SHARE_BOUND, SHARE_SLACK = 1.15, 2
# An encoder that has this many times more work than the others on average, the item included, is too busy to get it. If
# the others are idle, that is one with more than two items. An item that the encoder may have kept waits longer for it:
# encoding it again elsewhere costs, too.
BUSY_BOUND, BUSY_BOUND_OF_KEPT = 3.0, 6.0
_REMEMBERED_ITEMS = 1 << 16


class Item(msgspec.Struct, frozen=True):
    """One image, video or sound of a request.

    Attributes:
        modality: IMAGE, VIDEO or AUDIO.
        work: see core.dispatch.load.
        key: the same for the same content on every server; empty: unknown.
    """

    modality: str
    work: float
    key: str = ""


@dataclass(slots=True)
class Candidate:
    """An encoder that may get items.

    Attributes:
        url: of the encoder.
        backlog: work that it has.
        rate: seconds per unit of work.
        share: work that it has got lately.
        caches: whether it keeps embeddings of earlier items.
    """

    url: str
    backlog: float
    rate: float
    share: float
    caches: bool = False

    def finish(self, work: float) -> float:
        """Seconds until ``work`` would be done."""
        return (self.backlog + work) * self.rate


@dataclass(frozen=True, slots=True)
class Share:
    """A run of items for one encoder: ``count`` items from the ``first`` on."""

    url: str
    first: int
    count: int


class Chooser:
    """Chooses encoders, and remembers where items went."""

    def __init__(self) -> None:
        self._went: OrderedDict[str, str] = OrderedDict()

    def share_out(self, items: Sequence[Item], candidates: Sequence[Candidate]) -> list[Share]:
        """Who gets which of ``items`` (of one modality), in their order. ``candidates``: at least one, is changed."""
        if any(one.caches for one in candidates) and all(item.key for item in items):
            return _runs([self._by_content(item, candidates) for item in items])
        return _runs(_by_speed(items, candidates))

    def _by_content(self, item: Item, candidates: Sequence[Candidate]) -> str:
        by_url = {one.url: one for one in candidates if one.caches}
        total = sum(one.backlog + item.work for one in candidates)

        # Measured speeds do not count here: what an encoder has kept takes no time, so the one with the most items
        # would look fastest and get the next ones, too. A slow one is found to be busy.
        def busy(one: Candidate, bound: float = BUSY_BOUND) -> bool:
            mine = one.backlog + item.work
            return len(candidates) > 1 and mine > bound * (total - mine) / (len(candidates) - 1)

        chosen = by_url.get(self._went.get(item.key, ""))
        if chosen is None:
            chosen = self._home(item, list(by_url.values()), busy)
        elif busy(chosen, BUSY_BOUND_OF_KEPT):
            chosen = min(candidates, key=lambda one: (one.backlog, one.share))  # this once
            _assign(chosen, item.work)
            return chosen.url
        self._went[item.key] = chosen.url
        self._went.move_to_end(item.key)
        if len(self._went) > _REMEMBERED_ITEMS:
            self._went.popitem(last=False)
        _assign(chosen, item.work)
        return chosen.url

    @staticmethod
    def _home(item: Item, candidates: Sequence[Candidate], busy: Callable[[Candidate], bool]) -> Candidate:
        """The first in the item's own order of encoders that is not busy and has not got more than its share."""
        order = sorted(candidates, key=lambda one: _score(item.key, one.url), reverse=True)
        able = [one for one in order if not busy(one)] or order
        most = SHARE_BOUND * fmean(one.share + item.work for one in candidates) + SHARE_SLACK * item.work
        return next((one for one in able if one.share <= most), able[0])


def _score(key: str, url: str) -> bytes:
    return hashlib.blake2b(f"{key} {url}".encode("utf-8", "replace"), digest_size=8).digest()


def _by_speed(items: Sequence[Item], candidates: Sequence[Candidate]) -> list[str]:
    """The URL for each item. Each encoder gets one run, so that it makes one part."""
    planned: dict[str, float] = {}  # work
    for item in items:
        best = min(
            candidates,
            key=lambda one: (
                one.finish(item.work) + (PART_SECONDS if planned and one.url not in planned else 0.0), one.share
            ),
        )  # fmt: skip
        _assign(best, item.work)
        planned[best.url] = planned.get(best.url, 0.0) + item.work
    # The runs: an item goes to the encoder within whose planned work its middle lies.
    urls, ends = list(planned), list(accumulate(planned.values()))
    done, chosen = 0.0, []
    for item in items:
        chosen.append(urls[min(bisect_right(ends, done + item.work / 2), len(urls) - 1)])
        done += item.work
    return chosen


def _assign(candidate: Candidate, work: float) -> None:
    candidate.backlog += work
    candidate.share += work


def _runs(urls: Sequence[str]) -> list[Share]:
    shares: list[Share] = []
    for index, url in enumerate(urls):
        if shares and shares[-1].url == url:
            shares[-1] = Share(url, shares[-1].first, shares[-1].count + 1)
        else:
            shares.append(Share(url, index, 1))
    return shares
