"""A simulated tokenizer process: a real DispatchCore, with simulated HTTP to encoders and reports of the scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING

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
from sglang_mm_conn.core.dispatch.dispatcher import DispatchCore
from sglang_mm_conn.core.dispatch.encoders import EncoderStatus
from sglang_mm_conn.core.dispatch.reports import RoomFailed
from sglang_mm_conn.core.dispatch.verdicts import TryEnd, Verdict, of_failure
from sglang_mm_conn.core.rooms import new_room_base
from sglang_mm_conn.core.states import EncoderState
from tests.simulator.requests import Request, SchedulerRanks, Try
from tests.simulator.schedule import Server
from tests.simulator.scheduler import Process, Violation

if TYPE_CHECKING:
    from tests.simulator.dispatched import DispatchedSchedule

# So long after a deadline the dispatcher may still have the request: core.dispatch.dispatcher adds 5 s.
OVERDUE = 6.5
TIMEOUT = 2.0  # of probes, and of attempts to connect


class Tokenizer(Process):
    """One per language server, on the host of its rank 0."""

    def __init__(self, schedule: DispatchedSchedule, server: Server, *, tries: int, wait_seconds: float) -> None:
        super().__init__(f"tokenizer-{server.ranks[0].name}")
        kernel = schedule.kernel
        self.server = server
        self.tries = tries
        self.wait_seconds = wait_seconds
        self.core = DispatchCore(
            tries=tries, wait_seconds=wait_seconds, new_room_base=partial(new_room_base, server.name)
        )
        self.ranks = SchedulerRanks(schedule, server, self._report)
        self.posting: dict[str, Try] = {}  # by room
        self.signs: dict[str, float] = {}  # of life, by URL
        self.known: tuple[str, ...] = ()
        self.loses_reports = kernel.chance.random() < 0.2
        self._schedule = schedule
        self._kernel = kernel
        self._clock = kernel.now
        self._main = kernel.lane(self)
        self._loop = kernel.lane(self)  # carries actions out, in their order
        self._http = kernel.lane(self, width=100)  # answers and probes
        self._reports = kernel.lane(self)
        self._to_scheduler = kernel.lane(self)
        server.ranks[0].endpoint.watch_encoders(self._watch)

    def clock(self) -> float:
        """Never the same twice, as a real clock."""
        self._clock = max(self._kernel.now, self._clock + 1e-6)
        return self._clock

    def kill(self) -> None:
        self.dead = True

    # -- events --------------------------------------------------------------------------------------------------

    def know(self, urls: Sequence[str]) -> None:
        self.known = tuple(urls)
        self.perform(lambda now: self.core.know(urls, now))

    def dispatch_soon(self, request: Request) -> None:
        self._kernel.put(self._main, partial(self._dispatch, request))

    def _dispatch(self, request: Request) -> None:
        """The tokenizer dispatches a request, and sends it to the scheduler."""
        request.deadline = self._kernel.now + request.timeout
        request.placed, actions = self.core.dispatch(
            str(request.number), request.room_base, request.items, request.deadline, self.clock()
        )
        self._perform(actions)
        for url, part in request.placed:
            if part.number not in request.tries:
                self._schedule.new_try(self, request, part, url, f"{request.room_base}_local_part_{part.number}")
        if request.rejected:
            request.outcome = (400, "the prompt is rejected")
        else:
            self._kernel.put(self._to_scheduler, partial(self._send, request))

    def tick(self) -> None:
        self.perform(self.core.tick)
        for request in self.core.requests.values():
            if self._kernel.now > request.deadline + OVERDUE:
                raise Violation(f"request {request.rid} outlived its deadline at the dispatcher")

    def perform(self, event: Callable[[float], list[DispatchAction]]) -> None:
        self._perform(event(self.clock()))

    def _perform(self, actions: list[DispatchAction]) -> None:
        for action in actions:
            if isinstance(action, Post):
                self._schedule.on_post(self, action)
            elif isinstance(action, Redispatched):
                self._schedule.on_redispatched(self, action)
            elif isinstance(action, GiveUp):
                self._schedule.on_give_up(self, action)
        self._check()
        if actions:
            self._kernel.put(self._loop, partial(self._carry_out, actions))

    def _check(self) -> None:
        """Each part is at exactly one place."""
        under_way = 0
        for request in self.core.requests.values():
            for part in request.parts:
                what = f"part {part.number} of request {request.rid}"
                if part.delivered + (part.current is not None) + (part.waits_since is not None) != 1:
                    raise Violation(f"{what} is lost, or twice under way: {part}")
                if any(attempt.ended is None for attempt in part.tries[:-1]):
                    raise Violation(f"{what} has two tries under way")
                if part.delivered and not self._schedule.was_delivered(part.tries[-1].room):
                    raise Violation(f"{what} counts as delivered, but is not")
                if part.current is not None:
                    under_way += 1
                    one = self.core.fleet.encoders.get(part.current.url)
                    if one is not None and one.state is EncoderState.DOWN:
                        raise Violation(f"{what} is left at {one.url}, which is down")
        if under_way != len(self.core._open):
            raise Violation(f"{len(self.core._open)} tries are listed as under way, but {under_way} are")
        for one in self.core.fleet.encoders.values():
            if one.load.parts < 0:
                raise Violation(f"{one.url} has {one.load.parts} parts")

    # -- the dispatcher's thread ---------------------------------------------------------------------------------

    def _carry_out(self, actions: list[DispatchAction]) -> None:
        for action in actions:
            match action:
                case Post(room):
                    self.posting[room] = attempt = self._schedule.by_room[room]
                    self._kernel.put(self._http, partial(self._post, attempt))
                case CancelPost(room):
                    cancelled = self.posting.pop(room, None)
                    if cancelled is not None:
                        self._schedule.connection_closed(cancelled)
                case Probe(url):
                    self._kernel.put(self._http, partial(self._probe, url))
                case Redispatched() | GiveUp():
                    self._kernel.put(self._to_scheduler, partial(self._send, action))
                case LogLine(_, text):
                    self._kernel.note(f"{self.name}: {text}")
                case Forget():
                    pass

    def _send(self, message: Request | Redispatched | GiveUp) -> None:
        """To the scheduler. News of a request wait until that knows the request itself."""
        if isinstance(message, Request):
            message.sent = True
            self.ranks.inbox += [message, *message.unsent]
            return
        request = self._schedule.requests[message.room_base]
        if request.sent:
            self.ranks.inbox.append(message)
        elif not request.rejected:
            request.unsent.append(message)

    def _post(self, attempt: Try) -> None:
        assert attempt.request is not None
        if attempt.room not in self.posting:
            return  # cancelled before it began
        if attempt.request.room_base not in self.core.requests:
            del self.posting[attempt.room]
            return
        encoder = self._schedule.world.encoders[attempt.url]
        if encoder.dead:
            self.answer(attempt, TryEnd(Verdict.REFUSED, int(HTTPStatus.BAD_GATEWAY), "connection refused"))
        elif self._schedule.cut_off(self.server, encoder):
            self._schedule.later(TIMEOUT, partial(self._post_again, attempt))
        else:
            attempt.encoder = encoder
            self._kernel.put(encoder.http, partial(self._schedule.encode, attempt, encoder))

    def _post_again(self, attempt: Try) -> None:
        """The connection was not made in time: was the network's fault over at the last moment?"""
        encoder = self._schedule.world.encoders[attempt.url]
        if self._schedule.cut_off(self.server, encoder):
            self.answer(attempt, TryEnd(Verdict.CUT_OFF, int(HTTPStatus.BAD_GATEWAY), "it cannot be reached"))
        else:
            self._kernel.put(self._http, partial(self._post, attempt))

    def answer(self, attempt: Try, end: TryEnd) -> None:
        """The answer to a post arrives, or the post has failed."""
        if not attempt.answered:
            attempt.answered = True
            self._kernel.put(self._http, partial(self._answered, attempt, end))

    def _answered(self, attempt: Try, end: TryEnd) -> None:
        if self.posting.pop(attempt.room, None) is None and self._kernel.chance.random() < 0.7:
            return  # cancelled; sometimes the answer had been read already
        if end.verdict not in (Verdict.REFUSED, Verdict.CUT_OFF):
            self.signs[attempt.url] = self._clock
        if attempt.room in self.core._open:
            attempt.input_at_fault = end.code == HTTPStatus.BAD_REQUEST
            attempt.refused = end.verdict in (Verdict.REFUSED, Verdict.DRAINS)
            attempt.erred = end.verdict is Verdict.ERROR
        self._kernel.note(f"{self.name}: room {attempt.room} was answered: {end.verdict.value} {end.code} {end.reason}")
        self.perform(partial(self.core.answered, attempt.room, end))

    def _probe(self, url: str) -> None:
        encoder = self._schedule.world.encoders[url]
        if encoder.dead:
            self.perform(partial(self._probe_failed, url, "refused", False))
        elif not encoder.answers_look_ups and (encoder.frozen or self._schedule.cut_off(self.server, encoder)):
            silent = partial(self._probe_failed, url, "timed out", True)
            self._schedule.later(TIMEOUT, lambda: self._kernel.put(self._http, partial(self.perform, silent)))
        else:
            info = encoder.look_up_answer()
            found = partial(self._probed, url, info.draining, info.prefix_cache, self.clock())
            self._kernel.put(self._http, partial(self.perform, found))

    def _probe_failed(self, url: str, reason: str, silent: bool, now: float) -> list[DispatchAction]:
        return self.core.probe_failed(url, reason, silent=silent, now=now)

    def _probed(
        self, url: str, draining: bool, prefix_cache: bool, answered: float, now: float
    ) -> list[DispatchAction]:
        self.signs[url] = max(answered, self.signs.get(url, answered))
        return self.core.probed(url, draining=draining, prefix_cache=prefix_cache, now=now)

    # -- what the scheduler's side says --------------------------------------------------------------------------

    def _lost(self) -> bool:
        return self.loses_reports and self._kernel.chance.random() < 0.25

    def _watch(self, statuses: list[EncoderStatus]) -> None:
        if not self._lost():
            self._kernel.put(self._reports, partial(self.perform, partial(self.core.encoders_reported, statuses)))

    def _report(self, report: RoomFailed) -> None:
        if not self._lost():
            self._kernel.put(self._reports, partial(self._room_failed, report))

    def _room_failed(self, report: RoomFailed) -> None:
        self._kernel.note(f"{self.name}: room {report.room} is reported to have failed: {report.code} {report.reason}")
        attempt = self._schedule.by_room[report.room]
        if report.room in self.core._open and of_failure(report.code, "").verdict is Verdict.ERROR:
            attempt.erred = True
            self.signs[attempt.url] = self._clock
        self.perform(partial(self.core.room_failed, report.room, report.code, report.reason))
