"""Requests that go through a dispatcher: their tries, and the scheduler ranks that wait for their parts.

The ranks of one server go in step, as sglang's do: rank 0 hands what it has received to all, each looks at its rooms,
all agree on the worst status, and each acts on that. Between any two of these steps other things may happen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING

import torch

from sglang_mm_conn.core.dispatch.actions import GiveUp, Redispatched
from sglang_mm_conn.core.dispatch.choice import Item
from sglang_mm_conn.core.dispatch.reports import RoomFailed
from sglang_mm_conn.core.dispatch.requests import Part as CorePart
from sglang_mm_conn.core.dispatch.verdicts import may_be_tried_again
from sglang_mm_conn.core.dispatch.waiting import WaitingParts
from sglang_mm_conn.core.errors import ConnError, TransferFailed
from sglang_mm_conn.core.states import Poll
from tests.simulator.processes import EncoderProcess, LanguageProcess
from tests.simulator.schedule import Part, Server
from tests.simulator.scheduler import Violation

if TYPE_CHECKING:
    from tests.simulator.dispatched import DispatchedSchedule

Report = Callable[[RoomFailed], None]

PATIENCE = 10.0  # see sglang_plugin.scheduler
TIMED_OUT, FAILED, PENDING, ARRIVED = range(-2, 2)  # the worst is the least, as in sglang


@dataclass
class Request:
    """One request with images. ``items`` and ``rows`` belong together; ``outcome`` is an HTTP status and a reason."""

    number: int
    server: Server
    room_base: str
    items: list[Item]
    rows: list[int]
    timeout: float
    deadline: float = 0.0
    bad_input: bool = False
    rejected: bool = False
    touched: set[str] = field(default_factory=set)
    excuse: str = ""  # why the dispatcher was right to give it up
    outcome: tuple[int, str] | None = None
    placed: list[tuple[str, CorePart]] = field(default_factory=list)
    tries: dict[int, list[Try]] = field(default_factory=dict)  # by the number of the part
    given_up: set[str] = field(default_factory=set)  # why, by the dispatcher
    sent: bool = False  # to the scheduler
    unsent: list[Redispatched | GiveUp] = field(default_factory=list)

    @property
    def open(self) -> bool:
        return self.outcome is None

    def rows_of(self, part: CorePart) -> int:
        mine = [rows for item, rows in zip(self.items, self.rows, strict=True) if item.modality == part.modality]
        return sum(mine[part.first : part.first + part.count])


@dataclass
class Try(Part):
    """One try of a part: for the network and the encoder it is one part of a request, with bytes of its own."""

    request: Request | None = None
    part: CorePart | None = None
    posted: bool = False  # otherwise no encoder was up when the request came
    encoder: EncoderProcess | None = None  # that has got it
    answered: bool = False
    failed_at: float | None = None  # when rank 0 saw that its room has failed
    began: float = 0.0
    input_at_fault: bool = False  # the dispatcher was told so
    erred: bool = False  # the dispatcher was told that its encoder failed
    refused: bool = False  # the dispatcher was told that its encoder did not take it


class SimulatedRoom:
    """What EmbeddingReceiver is."""

    def __init__(self, attempt: Try, rank: LanguageProcess) -> None:
        self.attempt = attempt
        self.rank = rank
        self.room = attempt.room

    def poll(self) -> Poll:
        return self.rank.endpoint.poll(self.room)

    def failure_exception(self) -> None:
        if self.poll() is not Poll.Failed:
            return
        outcome = self.rank.endpoint.outcome(self.room)
        if not outcome.reason or not 400 <= outcome.code <= 599:
            raise Violation(f"room {self.room} failed without a reason: {outcome}")
        if self.rank.name not in self.attempt.outcome:
            self.attempt.outcome[self.rank.name] = outcome.reason
            if self.rank is self.attempt.server.ranks[0]:
                self.attempt.failed_at = self.rank.world.kernel.now
        raise TransferFailed(self.room, outcome.reason, outcome.code)

    def clear(self) -> None:
        self.attempt.outcome.setdefault(self.rank.name, "given up")
        self.rank.endpoint.abort(self.room, "aborted by the language server")
        self.rank.endpoint.forget(self.room)


class _Assembly:
    """The joining of a request's parts, on a copier."""

    def __init__(self) -> None:
        self.rows: list[tuple[Try, torch.Tensor]] | None = None
        self.error: ConnError | None = None


class RankRequest:
    """A request that waits on one rank: what sglang_plugin.scheduler.WaitingEmbeddingRequest is."""

    def __init__(
        self, schedule: DispatchedSchedule, request: Request, rank: LanguageProcess, report: Report | None
    ) -> None:
        self.request = request
        self.status = PENDING
        self.error: tuple[int, str] = (0, "")
        self.rows: list[tuple[Try, torch.Tensor]] = []
        self._schedule = schedule
        self._rank = rank
        self._asks_nobody = report is None
        self._started = schedule.kernel.now
        self._parts: WaitingParts[SimulatedRoom] = WaitingParts(
            self._expect, report, schedule.tokenizers[request.server.name].wait_seconds + PATIENCE
        )
        self._assembly: _Assembly | None = None
        for url, part in request.placed:
            self._parts.expect(url, request.tries[part.number][0].room)

    def _expect(self, url: str, room: str) -> SimulatedRoom:
        attempt = self._schedule.by_room[room]
        attempt.expected.add(self._rank.name)
        left = self._started + self.request.timeout - self._schedule.kernel.now
        self._rank.endpoint.expect(room, url, max(0.0, left), str(self.request.number))
        return SimulatedRoom(attempt, self._rank)

    def redispatch(self, news: Redispatched) -> None:
        try:
            if not self._parts.redispatch(news):
                return
        except ConnError as error:
            self.fail(int(HTTPStatus.INTERNAL_SERVER_ERROR), str(error))
            return
        self._assembly, self.rows = None, []
        self.status = PENDING

    def look(self, now: float) -> None:
        if self.status == PENDING:
            try:
                self._look(now)
            except TransferFailed as error:
                if self._asks_nobody and may_be_tried_again(error.code):
                    self.request.excuse = "a rank that cannot ask the dispatcher lost a part"
                    self._schedule.seen["lost where nobody can be asked"] += 1
                self.fail(error.code, error.reason)
            except ConnError as error:
                self.fail(int(HTTPStatus.INTERNAL_SERVER_ERROR), str(error))
        if now - self._started > self.request.timeout:
            self.status = TIMED_OUT
            self.error = (int(HTTPStatus.REQUEST_TIMEOUT), "timeout waiting for image embedding")
            self._drop()

    def _look(self, now: float) -> None:
        if self._assembly is None:
            if not self._parts.arrived(now):
                return
            assembly = self._assembly = _Assembly()
            copiers = self._schedule.copiers[self._rank.name]
            self._schedule.kernel.put(copiers, partial(self._join, list(self._parts.rooms), assembly))
        if self._assembly.error is not None:
            raise self._assembly.error
        if self._assembly.rows is not None:
            self.rows = self._assembly.rows
            self.status = ARRIVED

    def _join(self, rooms: list[SimulatedRoom], assembly: _Assembly) -> None:
        joined = []
        try:
            for number, room in enumerate(rooms):
                flat, metadata = self._rank.endpoint.take(room.room)
                attempt = room.attempt
                where = f"part {number} of request {self.request.number} on {self._rank.name}"
                if not torch.equal(flat.reshape(-1).view(torch.uint8), attempt.payload):
                    raise Violation(f"{where} arrived with the wrong bytes")
                if metadata != attempt.metadata:
                    raise Violation(f"{where} arrived with the metadata {metadata!r}, not {attempt.metadata!r}")
                _, part, of, *_ = metadata.decode().split()
                if int(part) != number or int(of) != len(rooms):
                    raise Violation(f"{where} says that it is part {part} of {of}")
                joined.append((attempt, flat))
                core = self._rank.endpoint.core
                self._schedule.seen["resumes"] += core.rooms[room.room].resumes
                self._schedule.seen["views"] += room.room in core.views
        except ConnError as error:
            assembly.error = error.with_traceback(None)  # whose frames would keep the rows
        else:
            assembly.rows = joined

    def fail(self, code: int, reason: str) -> None:
        self.error = (code, reason)
        self.status = FAILED
        self._drop()

    def close(self) -> list[tuple[Try, torch.Tensor]]:
        """The request is over: every rank has agreed. Returns what has arrived."""
        rows = self.rows
        for attempt, _ in rows:
            attempt.outcome.setdefault(self._rank.name, "")
        self._drop()
        return rows

    def _drop(self) -> None:
        self._parts.clear()
        self._assembly = None
        self.rows = []


class SchedulerRanks:
    """The scheduler processes of one server, in step."""

    def __init__(self, schedule: DispatchedSchedule, server: Server, report: Report) -> None:
        self.inbox: list[Request | Redispatched | GiveUp | str] = []  # str: the room base of an aborted request
        self.waiting: list[dict[str, RankRequest]] = [{} for _ in server.ranks]  # by room base, of each rank
        self._schedule = schedule
        self._server = server
        self._report = report
        self._under_way = 0  # ranks that have not finished their step

    def tick(self) -> None:
        if self._under_way or self._server.dead or not (self.inbox or self.waiting[0]):
            return
        messages, self.inbox = self.inbox, []
        self._each(partial(self._receive, messages))

    def _each(self, step: Callable[[int], None]) -> None:
        """Every rank takes ``step``, in any order."""
        self._under_way = len(self._server.ranks)
        for index, rank in enumerate(self._server.ranks):
            self._schedule.kernel.put(rank.scheduler, partial(step, index))

    def _receive(self, messages: list[Request | Redispatched | GiveUp | str], index: int) -> None:
        waiting, now = self.waiting[index], self._schedule.kernel.now
        for message in messages:
            if isinstance(message, Request):
                report = self._report if index == 0 else None  # the others may be on another host
                rank = self._server.ranks[index]
                waiting[message.room_base] = RankRequest(self._schedule, message, rank, report)
            elif isinstance(message, GiveUp) and message.room_base in waiting:
                waiting[message.room_base].fail(message.code, message.reason)
            elif isinstance(message, str) and message in waiting:
                waiting[message].fail(400, "aborted by user")
        for one in waiting.values():
            one.look(now)
        self._under_way -= 1
        if not self._under_way:
            self._each(partial(self._act, messages, self._agree()))

    def _agree(self) -> dict[str, tuple[int, tuple[int, str]]]:
        """The worst status of each request, with its error, by room base."""
        for rank in self.waiting[1:]:
            if rank.keys() != self.waiting[0].keys():
                raise Violation("the ranks of a server wait for different requests")
        return {base: min((rank[base].status, rank[base].error) for rank in self.waiting) for base in self.waiting[0]}

    def _act(
        self,
        messages: list[Request | Redispatched | GiveUp | str],
        agreed: dict[str, tuple[int, tuple[int, str]]],
        index: int,
    ) -> None:
        waiting, rank = self.waiting[index], self._server.ranks[index]
        for base, (status, error) in agreed.items():
            if status != PENDING:
                request = waiting.pop(base)
                rows = request.close()
                self._schedule.over_on(request.request, rank, (200, "") if status == ARRIVED else error, rows)
        for message in messages:
            if isinstance(message, Redispatched):
                if message.room_base in waiting:
                    waiting[message.room_base].redispatch(message)
                else:
                    self._schedule.by_room[message.room].outcome.setdefault(rank.name, "never asked for")
        self._under_way -= 1
