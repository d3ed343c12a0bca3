"""What runs inside the processes of a soak: a loop that keeps rooms under way, without a command for each.

Both sides walk through the same rooms in the same order and keep a number of them under way; neither waits for the
other, so announcements come before their request and after it.
"""

from __future__ import annotations

import heapq
import itertools
import select
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from sglang_mm_conn.connector.encoder.endpoint import EncoderEndpoint
from sglang_mm_conn.connector.language.endpoint import LanguageEndpoint
from sglang_mm_conn.connector.metadata import decode_metadata, encode_metadata
from sglang_mm_conn.core.actions import Ended
from sglang_mm_conn.core.states import Poll
from tests.connector.payload import plain
from tests.soak.plan import ENCODERS, LANGUAGES, UNDER_WAY, Plan, Room

MOST_PROBLEMS = 10
# How late what is due may be done.
_LATE_SECONDS = 0.002


class Driver:
    """The thread, what is to be done later, and what there is to report."""

    def __init__(self) -> None:
        self.ended: Counter[str] = Counter()
        self.problems: list[str] = []
        self.finished = False
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def start(self) -> None:
        threading.Thread(target=self._guarded, name="soak", daemon=True).start()

    def _guarded(self) -> None:
        try:
            self._run()
        except Exception as error:
            self.problem(f"the driver ended: {type(error).__name__}: {error}")
        self.finished = True

    def _run(self) -> None:
        raise NotImplementedError

    def problem(self, text: str) -> None:
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(text)

    def later(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._later, (time.monotonic() + delay, next(self._order), action))

    def do_what_is_due(self) -> None:
        while self._later and self._later[0][0] <= time.monotonic():
            heapq.heappop(self._later)[2]()

    def report(self) -> dict[str, Any]:
        return {"ended": dict(self.ended), "problems": self.problems, "finished": self.finished}


class EncoderDriver(Driver):
    """Announces, hands over and gives up the rooms of one encoder."""

    def __init__(self, endpoint: EncoderEndpoint, plan: Plan, index: int) -> None:
        super().__init__()
        self._endpoint = endpoint
        self._limit = endpoint.settings.max_metadata_bytes
        self._plan = plan
        self._index = index
        self._under_way = [0] * LANGUAGES
        self._lock = threading.Lock()
        self._space = threading.Event()

    def _run(self) -> None:
        waiting: dict[int, Iterator[Room]] = {
            language: self._plan.of(encoder=self._index, language=language) for language in range(LANGUAGES)
        }
        while waiting or any(self._under_way):
            self._space.clear()
            for language, rooms in list(waiting.items()):
                while self._under_way[language] < UNDER_WAY:
                    room = next(rooms, None)
                    if room is None:
                        del waiting[language]
                        break
                    self._begin(room)
            self.do_what_is_due()
            self._space.wait(_LATE_SECONDS)

    def _begin(self, room: Room) -> None:
        with self._lock:
            self._under_way[room.language] += 1
        part = room.part
        if room.aborted == "encoder before announcing":
            self._endpoint.fail(part.room, "given up before it was announced", 500)
        self._endpoint.announce(part.room, part.tokens, part.row_bytes, part.dtype, lambda end: self._end(room, end))
        if room.aborted == "encoder before sending":
            self.later(room.delay, lambda: self._endpoint.fail(part.room, "given up before it was sent", 500))
            return
        if room.aborted == "encoder later":
            self.later(room.delay, lambda: self._endpoint.fail(part.room, "given up later", 500))
        tensor = torch.from_numpy(part.payload()).view(torch.float32).reshape(part.tokens, part.width)
        values = {
            key: torch.from_numpy(value) if hasattr(value, "shape") else value for key, value in part.values().items()
        }
        self._endpoint.add_transfer_request(part.room, tensor, encode_metadata(values, self._limit))

    def _end(self, room: Room, end: Ended) -> None:
        """On any thread of the endpoint."""
        with self._lock:
            self._under_way[room.language] -= 1
            self.ended["sent" if end.success else "given up"] += 1
            if not end.success and not room.aborted:
                self.problem(f"room {room.number} ({room.part.tokens} rows) failed at the encoder: {end.reason}")
        self._space.set()


class LanguageDriver(Driver):
    """Expects, compares and gives up the rooms of one language server."""

    def __init__(self, endpoint: LanguageEndpoint, plan: Plan, index: int, urls: list[str]) -> None:
        super().__init__()
        self._endpoint = endpoint
        self._limit = endpoint.settings.max_metadata_bytes
        self._plan = plan
        self._index = index
        self._urls = urls
        self._rooms: dict[str, tuple[Room, float]] = {}
        self._under_way = [0] * ENCODERS
        self._longest: dict[str, float] = {}
        self._looks = self._short = self._resumes = 0

    def _run(self) -> None:
        waiting: dict[int, Iterator[Room]] = {
            encoder: self._plan.of(encoder=encoder, language=self._index) for encoder in range(ENCODERS)
        }
        while waiting or self._rooms:
            for encoder, rooms in list(waiting.items()):
                while self._under_way[encoder] < UNDER_WAY:
                    room = next(rooms, None)
                    if room is None:
                        del waiting[encoder]
                        break
                    self._begin(room)
            self.do_what_is_due()
            select.select([self._endpoint.completions], [], [], 0.005)
            self._endpoint.completions.clear()
            self._looks += 1
            self._short += not self._endpoint.core.allocator.free_count
            for name, (room, began) in list(self._rooms.items()):
                state = self._endpoint.poll(name)
                if state in (Poll.Success, Poll.Failed):
                    self._finish(room, state, time.monotonic() - began)

    def _begin(self, room: Room) -> None:
        self._under_way[room.encoder] += 1
        name = room.part.room
        self._rooms[name] = (room, time.monotonic())
        self._endpoint.expect(name, self._urls[room.encoder], self._plan.timeout, "soak")
        if room.aborted == "language":
            self.later(room.delay, lambda: self._endpoint.abort(name, "the client is gone"))

    def _finish(self, room: Room, state: Poll, seconds: float) -> None:
        name, part = room.part.room, room.part
        if state is Poll.Success:
            rows, raw = self._endpoint.take(name)
            metadata = {key: plain(value) for key, value in decode_metadata(raw, self._limit).items()}
            if not np.array_equal(rows.reshape(-1).view(torch.uint8).numpy(), part.payload()):
                self.problem(f"WRONG BYTES in room {room.number} ({part.tokens} rows)")
            elif metadata != {key: plain(value) for key, value in part.values().items()}:
                self.problem(f"WRONG METADATA in room {room.number}: {metadata}")
            else:
                self.ended["right bytes"] += 1
            self.ended[f"{room.size}, served"] += 1
            self._longest[room.size] = max(self._longest.get(room.size, 0.0), seconds)
            self._resumes += self._endpoint.core.rooms[name].resumes
        elif room.aborted:
            self.ended[f"given up by the {room.aborted.split()[0]}"] += 1
        else:
            outcome = self._endpoint.outcome(name)
            self.problem(f"room {room.number} ({part.tokens} rows) failed: {outcome.code} {outcome.reason}")
        self.ended["ended"] += 1
        self._endpoint.forget(name)
        del self._rooms[name]
        self._under_way[room.encoder] -= 1

    def report(self) -> dict[str, Any]:
        return {
            **super().report(),
            "longest": dict(self._longest),
            "looks": self._looks,
            "short": self._short,
            "resumes": self._resumes,
        }
