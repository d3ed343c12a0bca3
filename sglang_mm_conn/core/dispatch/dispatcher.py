"""Owns the dispatch of requests: which part is at which encoder, and what happens to a part whose try failed.

Pure; time is an argument. Every event returns actions, to be carried out in order.

- A part has one try under way at most, or it waits for an encoder, or it has arrived. So none is lost or taken twice.
- Each try has a room of its own. The scheduler is told the new room and gives the old one up, so late messages, writes
  and failures of an earlier try find a room that is over (docs/protocol.md, P1, P2 and P4).
- At most ``tries`` encoders take one part, so a part that kills encoders ends after so many. Two parts that have one
  chance left do not share an encoder for a while, so that the one that kills, or fails its batch, does not take the
  other with it each time.
- A part is posted again only to an encoder that is up, and to the same one only if that has proved since that it is
  well.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus

from sglang_mm_conn.core.dispatch.actions import (
    INFO,
    WARNING,
    CancelPost,
    DispatchAction,
    Forget,
    GiveUp,
    LogLine,
    Post,
    Probe,
    Redispatched,
)
from sglang_mm_conn.core.dispatch.choice import Chooser, Item, Share
from sglang_mm_conn.core.dispatch.encoders import EncoderStatus, StateChange
from sglang_mm_conn.core.dispatch.fleet import Fleet
from sglang_mm_conn.core.dispatch.placement import Placement
from sglang_mm_conn.core.dispatch.requests import Part, Request, Try
from sglang_mm_conn.core.dispatch.verdicts import PROVES, TryEnd, Verdict, for_client, of_failure
from sglang_mm_conn.core.rooms import part_room
from sglang_mm_conn.core.states import EncoderState

NO_ENCODER = "no encoder is available for the images, video or audio of this request, try again later"
_FINISHED_ROOMS = 4096
# An encoder that is back may not be noticed yet. A request that finds none waits this long for a look at each.
LOOK_SECONDS = 0.5


class DispatchCore:
    """All requests of one dispatcher. Not thread-safe: the caller holds one lock around every call."""

    def __init__(
        self, *, tries: int, wait_seconds: float, new_room_base: Callable[[], str], peer_timeout: float = 10.0
    ) -> None:
        """``tries``: most tries of a part. ``wait_seconds``: how long a part may wait while no encoder is up.

        ``peer_timeout``: see ``Fleet``.
        """
        self.fleet = Fleet(peer_timeout)
        self.requests: dict[str, Request] = {}
        self.redispatched = 0
        self.given_up = 0
        self._chooser = Chooser()
        self._placement = Placement(self.fleet, tries)
        self._tries = tries
        self._wait_seconds = wait_seconds
        self._new_room_base = new_room_base
        self._open: dict[str, tuple[Request, Part]] = {}  # by the room of the try that is under way
        self._delivered: dict[str, tuple[Request, Part]] = {}  # by the room that it arrived in
        self._waiting: dict[tuple[str, int], tuple[Request, Part]] = {}  # by room base and number: wait for an encoder
        self._finished: OrderedDict[str, str] = OrderedDict()  # rooms of requests that are over -> their room base

    # -- requests ------------------------------------------------------------------------------------------------

    def dispatch(
        self, rid: str, room_base: str, items: Sequence[Item], deadline: float, now: float
    ) -> tuple[list[tuple[str, Part]], list[DispatchAction]]:
        """A request with ``items``, those of a modality together. Returns (URL, part) in order, and actions.

        Where no encoder can be used, there is one part a modality, at the URL of any encoder. It waits, or fails.
        """
        usable = self.fleet.usable(now)
        candidates = self._placement.candidates(usable, now)
        anywhere = next(iter(self.fleet.encoders), "")
        shares: list[tuple[str, Share, float]] = []
        for modality in dict.fromkeys(item.modality for item in items):
            chosen = [item for item in items if item.modality == modality]
            everything = [Share(anywhere, 0, len(chosen))]
            for share in self._chooser.share_out(chosen, candidates) if candidates else everything:
                work = sum(item.work for item in chosen[share.first : share.first + share.count])
                shares.append((modality, share, work))
        placed = [
            (share.url, Part(number, len(shares), modality, share.first, share.count, work))
            for number, (modality, share, work) in enumerate(shares)
        ]
        request = Request(rid, room_base, deadline, [part for _, part in placed])
        self.requests[room_base] = request
        actions: list[DispatchAction] = []
        for url, part in placed:
            if candidates:
                actions += self._post(request, part, url, part_room(room_base, part.number), now)
            else:
                self._wait(request, part, now)
        return placed, actions + self._settle([], now)

    def answered(self, room: str, end: TryEnd, now: float) -> list[DispatchAction]:
        """The encoder has answered the post of ``room``, or the post has failed."""
        found = self._open.get(room)
        if found is None:
            return []  # another room has taken its place, or the request is over
        return self._ended(*found, end, now)

    def room_failed(self, room: str, code: int, reason: str, now: float) -> list[DispatchAction]:
        """The scheduler's side says that ``room`` has failed, and waits for what this decides."""
        found = self._open.get(room) or self._delivered.get(room)
        if found is not None:
            end = of_failure(code, reason)
            if end.verdict is Verdict.ABORTED:  # not by the request, which waits: by another rank, or its post was cut
                end = TryEnd(Verdict.LOST, int(HTTPStatus.BAD_GATEWAY), reason)
            return self._ended(*found, end, now)
        base = self._finished.get(room)
        if base is None:
            return []
        log = LogLine(WARNING, f"Room {room} failed after its request was forgotten: {reason}")
        return [log, GiveUp(base, *for_client(of_failure(code, reason)))]

    # -- encoders ------------------------------------------------------------------------------------------------

    def know(self, urls: Sequence[str], now: float) -> list[DispatchAction]:
        """Exactly these encoders are known from now on. Parts that others have go on."""
        self.fleet.know(urls)
        return self._settle([], now)

    def clients_gone(self, room_bases: Iterable[str], now: float) -> list[DispatchAction]:
        """Nobody waits for these requests any more."""
        return self._forget([one for base in room_bases if (one := self.requests.get(base)) is not None], now)

    def probed(self, url: str, *, draining: bool, prefix_cache: bool, now: float) -> list[DispatchAction]:
        """The encoder has answered a Probe."""
        return self._settle(self.fleet.probed(url, draining=draining, prefix_cache=prefix_cache, now=now), now)

    def probe_failed(self, url: str, reason: str, *, silent: bool, now: float) -> list[DispatchAction]:
        """A Probe has failed; ``silent``: because no answer came in time."""
        return self._settle(self.fleet.probe_failed(url, reason, silent=silent, now=now), now)

    def encoders_reported(self, statuses: Sequence[EncoderStatus], now: float) -> list[DispatchAction]:
        """The scheduler's side reports what it knows of all encoders."""
        return self._settle(self.fleet.reported(statuses, now), now)

    def tick(self, now: float) -> list[DispatchAction]:
        """Send probes that are due, give up what waits too long, forget requests that nobody waits for."""
        over = [one for one in self.requests.values() if one.is_over(now)]
        return self._forget(over, now) or self._settle([], now)

    def report(self, now: float) -> dict[str, object]:
        """What operators see: the encoders, and how many requests are under way."""
        return {
            "requests": sum(one.delivered_at is None for one in self.requests.values()),
            "waiting_parts": len(self._waiting),
            "redispatched": self.redispatched,
            "given_up": self.given_up,
            "encoders": {one.url: one.report() for one in self.fleet.encoders.values()},
        }

    # -- helpers -------------------------------------------------------------------------------------------------

    def _ended(self, request: Request, part: Part, end: TryEnd, now: float) -> list[DispatchAction]:
        """The try of ``part`` that is under way has ended."""
        if end.verdict is Verdict.ABORTED:
            assert part.current is not None
            part.current.aborted_at = now
            return []
        attempt = self._close(part, now)
        if end.verdict is Verdict.DELIVERED:
            changes = self.fleet.delivered(attempt.url, now)
            one = self.fleet.encoders.get(attempt.url)
            if one is not None:
                one.load.took(now - attempt.began, attempt.ahead, now)
            part.delivered = True
            self._delivered[attempt.room] = (request, part)
            if all(other.delivered for other in request.parts):
                request.delivered_at = now
            return self._settle(changes, now)
        cancel = CancelPost(attempt.room)  # it may have ended otherwise than by an answer
        if end.verdict is Verdict.INPUT:
            return [cancel, *self._give_up(request, *for_client(end)), *self._settle([], now)]
        part.last = end
        request.delivered_at = None
        if end.verdict in (Verdict.REFUSED, Verdict.DRAINS) and self._tries > 1:
            part.refused.add(attempt.url)
        self._wait(request, part, now)
        if end.verdict is Verdict.ERROR:
            part.excluded.add(attempt.url)
            changes = self.fleet.erred(attempt.url, end.reason, began=attempt.began, now=now)
        else:
            changes = self.fleet.lost(attempt.url, PROVES[end.verdict], end.reason, began=attempt.began, now=now)
        return [cancel, *self._settle(changes, now)]

    def _forget(self, requests: Sequence[Request], now: float) -> list[DispatchAction]:
        """Nobody waits for ``requests`` any more. Returns nothing if there are none."""
        actions: list[DispatchAction] = []
        changes: list[StateChange] = []
        for request in requests:
            for attempt in request.unanswered:
                changes += self.fleet.held(attempt.url, began=attempt.began, now=now)
            actions += self._finish(request)
        return actions + self._settle(changes, now) if requests else []

    def _close(self, part: Part, now: float) -> Try:
        attempt = part.tries[-1]
        attempt.ended = now
        if part.delivered:  # after all it was not
            part.delivered = False
            del self._delivered[attempt.room]
            return attempt
        del self._open[attempt.room]
        one = self.fleet.encoders.get(attempt.url)
        if one is not None:
            one.load.remove(part.work)
            self.fleet.forget(attempt.url)
        return attempt

    def _wait(self, request: Request, part: Part, now: float) -> None:
        part.waits_since = now
        self._waiting[request.room_base, part.number] = (request, part)

    def _post(self, request: Request, part: Part, url: str, room: str, now: float) -> list[DispatchAction]:
        one = self.fleet.encoders[url]
        part.tries.append(
            Try(room, url, now, one.load.add(part.work, now), last_chance=self._placement.is_last_chance(part))
        )
        part.waits_since = None
        self._waiting.pop((request.room_base, part.number), None)
        self._open[room] = (request, part)
        self.fleet.posted(url, now)
        return [Post(room, url, request.room_base, part.number)]

    def _settle(self, changes: list[StateChange], now: float) -> list[DispatchAction]:
        """What follows from ``changes``: lost tries, parts that can be posted or are hopeless, probes."""
        actions: list[DispatchAction] = []
        for change in changes:
            level = INFO if change.new is EncoderState.UP else WARNING
            text = f"Encoder {change.url}: {change.old.value} -> {change.new.value}: {change.reason}"
            actions.append(LogLine(level, text))
            if change.loses:
                actions += self._lose_all(change.url, change.reason, now)
        requests = -1
        while requests != len(self.requests):  # a request that is given up may be what another part waits for
            requests = len(self.requests)
            for request, part in list(self._waiting.values()):
                if part.waits_since is not None:  # its request may have failed with another part
                    actions += self._serve(request, part, now)
        return [*actions, *(Probe(url) for url in self.fleet.due_probes(now))]

    def _lose_all(self, url: str, reason: str, now: float) -> list[DispatchAction]:
        """``url`` is down, so its tries are lost. Nothing that an older try does can harm: its room is given up."""
        actions: list[DispatchAction] = []
        for request, part in list(self._open.values()):
            attempt = part.current
            if attempt is None or attempt.url != url:
                continue
            self._close(part, now)
            part.last = TryEnd(Verdict.LOST, int(HTTPStatus.BAD_GATEWAY), reason)
            self._wait(request, part, now)
            actions.append(CancelPost(attempt.room))
        return actions

    def _serve(self, request: Request, part: Part, now: float) -> list[DispatchAction]:
        """Post a part that waits; give its request up if that is hopeless."""
        if now > request.deadline:
            return []  # nobody waits for it any more
        if part.taken >= self._tries:
            return self._out_of_tries(request, part)
        able = self._placement.able(part, now)
        if able:
            one = self._placement.choose(part, able, (other for _, other in self._open.values()), now)
            if one is None:
                return []  # it waits for its turn
            room = part_room(self._new_room_base(), part.number)
            actions: list[DispatchAction] = [Redispatched(request.room_base, part.number, one.url, room)]
            if part.tries:  # otherwise no encoder was up when the request came
                self.redispatched += 1
                before, reason = part.tries[-1], "" if part.last is None else part.last.reason
                text = f"Part {part.number} of {request.rid} goes from {before.url} (room {before.room}) to {one.url} "
                actions.append(LogLine(WARNING, f"{text}(room {room}): {reason}"))
            return actions + self._post(request, part, one.url, room, now)
        if self.fleet.undecided:
            return []
        if part.last is not None and part.last.verdict is Verdict.ERROR:
            return self._give_up(request, *for_client(part.last))
        assert part.waits_since is not None
        if now < part.waits_since + self._wait_seconds:
            return []
        if now < part.waits_since + LOOK_SECONDS and self.fleet.look_again(part.waits_since):
            return []
        return self._give_up(request, int(HTTPStatus.SERVICE_UNAVAILABLE), NO_ENCODER)

    def _out_of_tries(self, request: Request, part: Part) -> list[DispatchAction]:
        last, attempt = part.last, part.tries[-1]
        assert last is not None
        text = f"Part {part.number} of {request.rid} has failed at {attempt.url} (room {attempt.room}), "
        line, (code, reason) = (
            LogLine(WARNING, f"{text}the last of {part.taken} tries: {last.reason}"),
            for_client(last),
        )
        if part.taken > 1:
            found = f": {reason}" if last.verdict is Verdict.ERROR else ""
            encoders = len({attempt.url for attempt in part.tries})
            what = f"{encoders} encoders" if encoders == part.taken else f"{part.taken} tries at {encoders} encoders"
            reason = f"{what} failed on the same part of this request{found}"
        return [line, *self._give_up(request, code, reason)]

    def _give_up(self, request: Request, code: int, reason: str) -> list[DispatchAction]:
        self.given_up += 1
        return [GiveUp(request.room_base, code, reason), *self._finish(request, told=True)]

    def _finish(self, request: Request, *, told: bool = False) -> list[DispatchAction]:
        """The request is over for the dispatcher. ``told``: the scheduler knows that it has failed."""
        del self.requests[request.room_base]
        actions: list[DispatchAction] = []
        for part in request.parts:
            attempt = part.current
            if attempt is not None:
                self._close(part, attempt.began)
                actions.append(CancelPost(attempt.room))
            part.waits_since = None
            self._waiting.pop((request.room_base, part.number), None)
            if part.tries:  # a failure of an earlier try may still be on its way, and means nothing
                self._delivered.pop(part.tries[-1].room, None)
                if not told:
                    self._finished[part.tries[-1].room] = request.room_base
        while len(self._finished) > _FINISHED_ROOMS:
            self._finished.popitem(last=False)
        return [*actions, Forget(request.room_base)]
