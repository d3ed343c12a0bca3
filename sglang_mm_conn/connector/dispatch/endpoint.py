"""Owns a dispatcher: the thread with the event loop that posts parts, probes encoders and reads the scheduler's news.

``core.dispatch`` decides; this module carries its actions out. Requests come from the tokenizer's event loop, all else
happens on the dispatcher's thread. One lock guards the core; it is never held during IO.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from typing import Any

from sglang_mm_conn.connector.dispatch.posts import Posts, json_body
from sglang_mm_conn.control.authentication import DeploymentKey
from sglang_mm_conn.control.bootstrap import EncoderAbsent
from sglang_mm_conn.control.reports import ReportReceiver
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
from sglang_mm_conn.core.dispatch.reports import EncoderStatuses, RoomFailed
from sglang_mm_conn.core.dispatch.requests import Part
from sglang_mm_conn.core.dispatch.verdicts import TryEnd, Verdict
from sglang_mm_conn.core.errors import ConnError, ProtocolError
from sglang_mm_conn.core.rooms import new_room_base
from sglang_mm_conn.core.settings import Settings

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.1
_UNSENT_SECONDS = 300.0  # the longest wait for a request to reach the scheduler before news about it are dropped
_FIRST_PAUSE_SECONDS, _MOST_PAUSE_SECONDS = 0.005, 0.1  # between two looks whether it has
_REMEMBERED_REQUESTS = 1024  # that are over; the scheduler may still ask about a room of theirs


@dataclass(frozen=True)
class Dispatched:
    """What the caller of ``dispatch`` has to know and to do.

    Attributes:
        content: (part, room) -> the JSON content of the post; None once the items were freed.
        tell: sends news of the request to its scheduler.
        reached: set as soon as the request itself has been sent to its scheduler, which ignores earlier news.
        slow: whether ``content`` takes long, and so is called on a thread of its own.
    """

    content: Callable[[Part, str], dict[str, Any]] | None
    tell: Callable[[Redispatched | GiveUp], None]
    reached: threading.Event
    slow: bool = False


class DispatcherEndpoint:
    """One per tokenizer process of a language server."""

    def __init__(
        self,
        settings: Settings,
        *,
        server: str,
        report_address: str | None,
        urls: Callable[[], Sequence[str]] = tuple,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            settings: those of the dispatch, and of the security.
            server: incarnation of the language server.
            report_address: of its scheduler's ReportSender.
            urls: the encoders that there are now; any thread may call it.
            clock: seconds, monotonic.

        Raises SettingError if the deployment's key cannot be read.
        """
        self.core = DispatchCore(
            tries=settings.dispatch_tries,
            wait_seconds=settings.dispatch_wait,
            new_room_base=partial(new_room_base, server),
            peer_timeout=settings.peer_timeout,
        )
        self._key = None if settings.key_file is None else DeploymentKey.load(settings.key_file)
        self._insecure = settings.insecure
        self._report_address = report_address
        self._clock = clock
        self._lock = threading.Lock()
        self._list_urls = urls
        self._urls: tuple[str, ...] = ()
        self._dispatched: dict[str, Dispatched] = {}  # by room base
        self._over: OrderedDict[str, Dispatched] = OrderedDict()
        self._news: dict[str, asyncio.Queue[Redispatched | GiveUp]] = {}  # of requests that wait to be told
        self._posting: dict[str, asyncio.Task[None]] = {}  # by room
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._serve, name="mm-conn-dispatch", daemon=True)
        self._thread.start()

    # -- any thread ----------------------------------------------------------------------------------------------

    def look_at_list(self) -> None:
        """Encoders may have come or gone."""
        self._perform_later(self._look_at_list)

    def _look_at_list(self, now: float) -> list[DispatchAction]:
        known = tuple(self._list_urls())
        if known == self._urls:
            return []
        self._urls = known
        return self.core.know(known, now)

    def dispatch(
        self, rid: str, room_base: str, items: Sequence[Item], seconds: float, dispatched: Dispatched
    ) -> list[tuple[str, Part]]:
        """Dispatch ``items`` (those of one modality together) within ``seconds``. Returns (URL, part) in order."""
        now = self._clock()
        with self._lock:
            known = self._look_at_list(now)
            placed, actions = self.core.dispatch(rid, room_base, items, now + seconds, now)
            self._dispatched[room_base] = dispatched
            self._hand_over(known + actions)
        return placed

    def clients_gone(self, room_bases: Collection[str]) -> None:
        """Nobody waits for these requests any more."""
        self._perform_later(partial(self.core.clients_gone, room_bases))

    @property
    def caches_items(self) -> bool:
        """Whether an encoder keeps the embeddings of earlier items, so that the keys of items are needed."""
        return any(one.prefix_cache for one in list(self.core.fleet.encoders.values()))

    def report(self) -> dict[str, object]:
        """For operators: the encoders with their states, and counters."""
        with self._lock:
            return self.core.report(self._clock())

    def close(self) -> None:
        """Stop the thread. For tests and an orderly shutdown."""
        with contextlib.suppress(RuntimeError):  # it is closed
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _perform_later(self, event: Callable[[float], list[DispatchAction]]) -> None:
        try:
            with self._lock:
                self._hand_over(event(self._clock()))
        except Exception:  # costs this event, not the task that reads reports, ticks or posts
            logger.exception("The dispatcher could not handle an event")

    def _hand_over(self, actions: list[DispatchAction]) -> None:
        """Under the lock, so that actions are carried out in the order of the decisions."""
        if actions:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._carry_out, actions)

    # -- the dispatcher's thread ---------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            self._loop.run_until_complete(self._run())
        finally:
            self._loop.close()

    async def _run(self) -> None:
        self._posts = Posts(self._key, insecure=self._insecure)
        self._start(self._tick())
        if self._report_address is not None:
            self._start(self._read_reports(self._report_address))
        await self._stop.wait()
        while self._tasks:  # what was handed over before the end may start some more
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
        await self._posts.close()

    def _start(self, work: Any) -> asyncio.Task[Any]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _tick(self) -> None:
        while True:
            self.look_at_list()
            self._perform_later(self.core.tick)
            await asyncio.sleep(_TICK_SECONDS)

    async def _read_reports(self, address: str) -> None:
        reports = ReportReceiver(address)
        try:
            while True:
                try:
                    report = await reports.receive()
                except ProtocolError as error:
                    logger.warning("A report of the scheduler was dropped: %s", error)
                    continue
                if isinstance(report, EncoderStatuses):
                    self._perform_later(partial(self.core.encoders_reported, report.encoders))
                else:
                    self._perform_later(partial(self._room_failed, report))
        finally:
            reports.close()

    def _room_failed(self, report: RoomFailed, now: float) -> list[DispatchAction]:
        return self.core.room_failed(report.room, report.code, report.reason, now)

    def _carry_out(self, actions: list[DispatchAction]) -> None:
        if self._stop.is_set():
            return
        for action in actions:
            match action:
                case Post(room):
                    task = self._posting[room] = self._start(self._post(action))
                    task.add_done_callback(partial(self._posted, room))
                case CancelPost(room):
                    task_of_room = self._posting.get(room)
                    if task_of_room is not None:
                        task_of_room.cancel()
                case Probe(url):
                    self._start(self._probe(url))
                case Redispatched(room_base) | GiveUp(room_base):
                    self._tell(room_base, action)
                case Forget(room_base):
                    self._forget(room_base)
                case LogLine(level, text):
                    logger.log(level, "%s", text)

    def _posted(self, room: str, _: object) -> None:
        self._posting.pop(room, None)

    async def _post(self, post: Post) -> None:
        try:
            with self._lock:
                request = self.core.requests.get(post.room_base)
            dispatched = self._dispatched.get(post.room_base)
            if request is None or dispatched is None or dispatched.content is None:
                return  # over
            make = partial(dispatched.content, request.parts[post.part], post.room)
            body = json_body(await asyncio.to_thread(make) if dispatched.slow else make())
            end = await self._posts.post(post.url, post.room, body)
        except Exception as error:
            logger.exception("Part %d of room base %s cannot be posted", post.part, post.room_base)
            end = TryEnd(Verdict.INPUT, int(HTTPStatus.BAD_GATEWAY), f"{type(error).__name__}: {error}")
        self._perform_later(partial(self.core.answered, post.room, end))

    def _forget(self, room_base: str) -> None:
        """Free the items of the request, and remember for a while how to tell its scheduler."""
        dispatched = self._dispatched.pop(room_base, None)
        if dispatched is not None:
            self._over[room_base] = replace(dispatched, content=None)
            if len(self._over) > _REMEMBERED_REQUESTS:
                self._over.popitem(last=False)

    async def _probe(self, url: str) -> None:
        try:
            info = await self._posts.probe(url)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            silent = isinstance(error, EncoderAbsent) and error.silent
            reason = str(error) if isinstance(error, ConnError) else f"{type(error).__name__}: {error}"
            self._perform_later(partial(self._probe_failed, url, reason, silent))
        else:
            self._perform_later(
                lambda now: self.core.probed(url, draining=info.draining, prefix_cache=info.prefix_cache, now=now)
            )

    def _probe_failed(self, url: str, reason: str, silent: bool, now: float) -> list[DispatchAction]:
        return self.core.probe_failed(url, reason, silent=silent, now=now)

    def _tell(self, room_base: str, news: Redispatched | GiveUp) -> None:
        dispatched = self._dispatched.get(room_base) or self._over.get(room_base)
        if dispatched is None:
            return
        waiting = self._news.get(room_base)
        if waiting is None:
            waiting = self._news[room_base] = asyncio.Queue()
            self._start(self._tell_in_order(room_base, replace(dispatched, content=None), waiting))
        waiting.put_nowait(news)

    async def _tell_in_order(
        self, room_base: str, dispatched: Dispatched, news: asyncio.Queue[Redispatched | GiveUp]
    ) -> None:
        """Tell the scheduler of the request, once that knows the request."""
        try:
            until, pause = self._loop.time() + _UNSENT_SECONDS, _FIRST_PAUSE_SECONDS
            while not dispatched.reached.is_set() and self._loop.time() < until:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _MOST_PAUSE_SECONDS)
            while dispatched.reached.is_set() and not news.empty():
                self._tell_one(dispatched, news.get_nowait())
        finally:
            del self._news[room_base]

    @staticmethod
    def _tell_one(dispatched: Dispatched, news: Redispatched | GiveUp) -> None:
        try:
            dispatched.tell(news)
        except Exception:  # the scheduler fails the request at its deadline
            logger.exception("News of room base %s cannot be told", news.room_base)
