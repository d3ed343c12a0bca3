"""A schedule whose requests go through the dispatcher of a language server, and whose encoders fail, drain and lie.

What must hold, beside everything that holds for a room: a request arrives, unless something other than its encoders was
at fault, its tries were used up by faults, or no encoder that fits was well for ``WELL`` seconds. A part is moved, and
a request is given up, only where a fault explains it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any

import torch

from sglang_mm_conn.core.actions import Ended
from sglang_mm_conn.core.dispatch.actions import GiveUp, Post, Redispatched
from sglang_mm_conn.core.dispatch.choice import Item
from sglang_mm_conn.core.dispatch.requests import Part as CorePart
from sglang_mm_conn.core.dispatch.verdicts import DRAINING, TryEnd, Verdict, of_answer
from sglang_mm_conn.core.messages import Heartbeat, Message
from sglang_mm_conn.core.outcomes import Outcome
from sglang_mm_conn.core.rooms import new_room_base
from sglang_mm_conn.core.states import EncoderState
from tests.simulator.network import Pair
from tests.simulator.processes import DTYPE, ROW_BYTES, EncoderProcess, LanguageProcess
from tests.simulator.requests import Request, Try
from tests.simulator.schedule import LONG_DEADLINE, PEER_TIMEOUT, RECOVERY, TWISTED, Schedule, Server
from tests.simulator.scheduler import Lane, Process, Violation
from tests.simulator.tokenizer import Tokenizer

# An encoder that was well for so long must be known to be well; so much earlier at the start of a server.
WELL, WELL_AT_START = 10.0, 3.0
# A server that stood still for so long may find rooms that nobody claimed in time.
LONG_STANDSTILL = 12.0
# A process that was silent for longer than the peer timeout is known to be silent after so many seconds more.
NOTICED_WITHIN = 8.0
# So long after a room has failed the dispatcher must have decided.
DECIDED_WITHIN = 25.0


class DispatchedSchedule(Schedule):
    """See the module."""

    def __init__(self, seed: str, trace: Callable[[str], None] | None = None) -> None:
        super().__init__(seed, trace)
        self.requests: dict[str, Request] = {}  # by room base
        self.by_room: dict[str, Try] = {}
        self.tokenizers: dict[str, Tokenizer] = {}  # by server
        self.copiers: dict[str, Lane] = {}  # by rank
        self._failing: set[str] = set()  # encoders whose every encode fails
        self._refusing: set[str] = set()  # encoders that refuse work as if they drained
        self._caching = self.chance.random() < 0.2
        self._trouble: dict[tuple[str, str], float] = {}  # (server, URL) -> when there was one last
        self._unwell: dict[tuple[str, str], float] = {}  # (server, URL) -> when it could not serve the server last
        self._silent_since: dict[tuple[str, str], float] = {}
        self._still_since: dict[str, float] = {}  # by server
        self._still_last: dict[str, float] = {}
        self._kills_after_answer = 0  # that wait for an encoder to say that a part has arrived

    # -- the world -----------------------------------------------------------------------------------------------

    def _build(self) -> None:
        for index in range(self.chance.choice([1, 2, 2, 3, 3])):
            self.start_encoder(f"http://encoder:{30000 + index}", self._host())
        for _ in range(self.chance.choice([1, 1, 1, 2])):
            two = self.chance.random() < 0.35
            blocks = 64 if two else self.chance.choice([1, 2, 4, 8, 8])
            self.start_server(size=2 if two else 1, blocks=blocks, host=self._host())
        if self.chance.random() < 0.03:
            self.start_server(size=1, blocks=4, host=self._host(), dtype="float16")

    def start_encoder(self, url: str, host: int) -> EncoderProcess:
        encoder = super().start_encoder(url, host)
        encoder.prefix_cache = self._caching
        actions = encoder.endpoint._actions
        send = actions.send

        def with_state(peer: str, message: Message) -> None:
            if isinstance(message, Heartbeat):
                load = len(encoder.endpoint.core.rooms)
                message = Heartbeat(incarnation=message.incarnation, load=load, draining=encoder.draining)
            send(peer, message)

        actions.send = with_state  # type: ignore[method-assign]
        return encoder

    def start_server(self, *, size: int, blocks: int, host: int, dtype: str = DTYPE) -> Server:
        server = super().start_server(size=size, blocks=blocks, host=host, dtype=dtype)
        for rank in server.ranks:
            self.copiers[rank.name] = self.kernel.lane(rank, 2)
            for url in self.world.encoders:
                rank.endpoint.use_encoder(url)
        tokenizer = Tokenizer(
            self, server, tries=self.chance.choice([1, 2, 3, 3]), wait_seconds=self.chance.choice([0.0, 0.0, 5.0, 40.0])
        )
        self.tokenizers[server.name] = tokenizer
        self.world.others.append(tokenizer)
        for url in self.world.encoders:
            self._unwell[server.name, url] = self.kernel.now - WELL + WELL_AT_START
        tokenizer.know(list(self.world.encoders))
        return server

    def cut_off(self, server: Server, encoder: EncoderProcess) -> bool:
        """Whether no new connection of the server's HTTP comes about."""
        return (server.ranks[0].name, encoder.name) in self.network.obstructed and not encoder.answers_look_ups

    # -- requests ------------------------------------------------------------------------------------------------

    def dispatch(self) -> None:
        living = [server for server in self.servers if not server.dead]
        if not living:
            return
        server = self.chance.choice(living)
        base = new_room_base(server.name)
        kinds = ["IMAGE"] * self.chance.choice([1, 1, 2, 3, 4]) + ["VIDEO"] * (self.chance.random() < 0.25)
        number = len(self.requests) + 1
        items = [
            Item(kind, self.chance.choice([0.1, 1.0, 2.0]), f"{number}.{at}" if self._caching else "")
            for at, kind in enumerate(kinds)
        ]
        request = Request(number, server, base, items, [self.chance.randint(1, 5) for _ in items], LONG_DEADLINE)
        dice = self.chance.random()
        if dice < 0.05:
            request.timeout = self.chance.uniform(1, 15)
            request.touched.add("a short deadline")
        elif dice < 0.08:
            request.rejected = True
            request.touched.add("its prompt is rejected")
            self.seen["prompt rejected"] += 1
        elif dice < 0.12:
            request.bad_input = True
            request.touched.add("its input is bad")
        if not server.ranks[0].fits:
            request.touched.add("the two do not fit")
        self.requests[base] = request
        self.seen["requests"] += 1
        self.kernel.note(f"request {number}: {len(items)} items to {server.ranks[0].name}, room base {base}")
        self.tokenizers[server.name].dispatch_soon(request)

    def new_try(self, tokenizer: Tokenizer, request: Request, part: CorePart, url: str, room: str) -> Try:
        rows = request.rows_of(part)
        number = len(self.parts) + 1
        metadata = f"{request.number} {part.number} {part.of} {part.modality} {part.first} {part.count} {number}"
        attempt = Try(
            number, request.server, url, room, rows, request.timeout, metadata.encode(), request=request, part=part,
            began=self.kernel.now,
        )  # fmt: skip
        self.parts.append(attempt)
        self.by_room[room] = attempt
        request.tries.setdefault(part.number, []).append(attempt)
        if request.touched:
            attempt.touched.add("its request was touched")
        if not request.open or request.rejected:
            attempt.touched.add("its request is over")
        if request.rejected:
            for rank in request.server.ranks:
                attempt.outcome[rank.name] = "never asked for"
        if self._in_trouble(request.server, url):
            attempt.touched.add("its encoder is or was in trouble")
        self._touch_apart(self.kernel.now)
        self.seen["parts"] += 1
        self.kernel.note(f"part {part.number} of request {request.number}: {rows} rows, {url}, room {room}")
        return attempt

    def on_post(self, tokenizer: Tokenizer, action: Post) -> None:
        """The dispatcher has decided to post a part."""
        request = self.requests[action.room_base]
        part = next(part for _, part in request.placed if part.number == action.part)
        earlier = [attempt for attempt in request.tries.get(action.part, []) if attempt.posted]
        what = f"part {action.part} of request {request.number}"
        if action.room in self.by_room:
            raise Violation(f"{what} gets a room that was used before: {action.room}")
        if self._taken(tokenizer, earlier) >= tokenizer.tries:
            raise Violation(f"{what} is posted more than {tokenizer.tries} times")
        if any(attempt.input_at_fault for attempt in earlier):
            raise Violation(f"{what} is posted again, though its input is at fault")
        if any(attempt.erred and attempt.url == action.url for attempt in earlier):
            raise Violation(f"{what} is posted again to {action.url}, which failed to encode it")
        one = tokenizer.core.fleet.encoders[action.url]
        if one.state is not EncoderState.UP and not (one.state is EncoderState.SUSPECT and one.failing):
            raise Violation(f"{what} is posted to {action.url}, which is {one.state.value}")
        ended = max((old.ended or math.inf for old in part.tries[:-1] if old.url == action.url), default=-math.inf)
        if ended > self._heard(tokenizer, action.url):
            raise Violation(f"{what} is posted again to {action.url}, of which nothing was heard since {ended}")
        self.new_try(tokenizer, request, part, action.url, action.room).posted = True

    @staticmethod
    def _taken(tokenizer: Tokenizer, posted: list[Try]) -> int:
        """How many of the tries count: the first refusal of each encoder does not, unless there is one try only."""
        return len(posted) - (len({one.url for one in posted if one.refused}) if tokenizer.tries > 1 else 0)

    def _heard(self, tokenizer: Tokenizer, url: str) -> float:
        """When an encoder last gave a sign of life that its language server could notice."""
        known = tokenizer.server.ranks[0].endpoint._encoders.registrations.encoders.get(url)
        frames = [process.last_seen for process in known.processes.values()] if known is not None else []
        return max([tokenizer.signs.get(url, -math.inf), *(last + 0.01 for last in frames)])

    def on_redispatched(self, tokenizer: Tokenizer, news: Redispatched) -> None:
        """The dispatcher has decided to move a part."""
        request = self.requests[news.room_base]
        earlier = request.tries[news.part][-1]
        if not earlier.posted:
            earlier.touched.add("no encoder was up")
            return
        self.seen["redispatched"] += 1
        stood_still = self.kernel.now - self._still_last.get(request.server.name, -math.inf) < RECOVERY
        if not earlier.touched and not stood_still and not self._in_trouble(request.server, earlier.url):
            raise Violation(f"part {news.part} of request {request.number} is moved from {earlier.url} without a cause")
        earlier.touched.add("moved")

    def on_give_up(self, tokenizer: Tokenizer, news: GiveUp) -> None:
        """The dispatcher has decided to give a request up."""
        request = self.requests[news.room_base]
        self.kernel.note(f"request {request.number} is given up: {news.code} {news.reason}")
        self.seen["given up"] += 1
        request.given_up.add(news.reason)
        if len(request.given_up) > len(request.placed):  # again only for other parts of a request that was forgotten
            raise Violation(f"request {request.number} is given up again: {news}")
        if not news.reason or not 400 <= news.code <= 599:
            raise Violation(f"request {request.number} is given up without a reason: {news}")
        if "http:" in news.reason or "process" in news.reason:
            raise Violation(f"a client is told of servers: {news}")
        for tries in request.tries.values():
            for attempt in tries:
                attempt.touched.add("its request was given up")
        if not request.touched and not request.excuse:
            request.excuse = self._excuse(tokenizer, request)

    def _excuse(self, tokenizer: Tokenizer, request: Request) -> str:
        """Why the dispatcher may give the request up; empty: it may not."""
        now = self.kernel.now
        if request.room_base not in tokenizer.core.requests and all(part.delivered for _, part in request.placed):
            return "it was lost long after its delivery"
        if request.room_base not in tokenizer.core.requests and tokenizer.loses_reports:
            return "that it still waited was said too late"
        if any(TWISTED in attempt.touched for tries in request.tries.values() for attempt in tries):
            return "a falsified message has failed a part of it"
        well = {url for url in tokenizer.known if now - self._unwell[request.server.name, url] > WELL}
        for _, part in request.placed:
            if part.delivered or part.current is not None:
                continue
            posted = [attempt for attempt in request.tries.get(part.number, []) if attempt.posted]
            if self._taken(tokenizer, posted) >= tokenizer.tries:
                return "its tries are used up"
            if not well - part.excluded:
                return "no encoder was well"
        return ""

    def was_delivered(self, room: str) -> bool:
        outcome = self.by_room[room].sender_outcome
        return outcome is not None and outcome.success

    def over_on(
        self, request: Request, rank: LanguageProcess, outcome: tuple[int, str], rows: list[tuple[Try, torch.Tensor]]
    ) -> None:
        """The scheduler of ``rank`` is done with the request, which has ended for all ranks."""
        code, reason = outcome
        if request.open:
            self.kernel.note(f"request {request.number} is over: {code} {reason}")
            request.outcome = outcome
            self.seen["arrived" if code == HTTPStatus.OK else "failed"] += 1
            if code != HTTPStatus.OK and (not reason or not 400 <= code <= 599):
                raise Violation(f"request {request.number} failed without a reason: {outcome}")
        arrived = {attempt.room for attempt, _ in rows} if code == HTTPStatus.OK else set()
        for tries in request.tries.values():
            for attempt in tries:
                if attempt.room not in arrived:
                    attempt.touched.add("its request is over")
        if code != HTTPStatus.OK:
            return
        self._all_items(request, [attempt for attempt, _ in rows])
        for attempt, flat in rows:
            self._generate(attempt, flat)

    def _all_items(self, request: Request, attempts: list[Try]) -> None:
        """Each item is in exactly one part, in its place."""
        for modality in {item.modality for item in request.items}:
            expected = 0
            for attempt in attempts:
                part = attempt.part
                assert part is not None
                if part.modality == modality:
                    if part.first != expected:
                        raise Violation(f"request {request.number}: item {expected} of {modality} is lost or repeated")
                    expected += part.count
            if expected != sum(item.modality == modality for item in request.items):
                raise Violation(f"request {request.number} has {expected} items of {modality}")

    # -- the encoder's side of /encode ---------------------------------------------------------------------------

    def encode(self, attempt: Try, encoder: EncoderProcess) -> None:
        """An encoder handles a post."""
        assert attempt.request is not None
        if encoder.draining or encoder.name in self._refusing:
            attempt.touched.add("its encoder drains")
            self.seen["refused while draining"] += 1
            self._answer(attempt, 503, b"{}", DRAINING)
            return

        def ended(action: Ended) -> None:
            if attempt.sender_outcome is not None:
                raise Violation(f"room {attempt.room} ended twice on the encoder")
            attempt.sender_outcome = action
            if action.success:
                self._answer(attempt, 200, b"null")
                if self._kills_after_answer and not encoder.dead:
                    self._kills_after_answer -= 1
                    self.kernel.put(encoder.http, lambda: None if encoder.dead else self._kill(encoder))
            else:
                self._answer_error(attempt, action.outcome.code, action.outcome.reason)

        def fails(reason: str, code: int) -> None:
            if self.chance.random() < 0.5:
                attempt.announced = True
                encoder.endpoint.announce(attempt.room, attempt.tokens, ROW_BYTES, DTYPE, ended)
                self.kernel.put(encoder.http, lambda: encoder.endpoint.fail(attempt.room, reason, code))
            else:
                encoder.endpoint.fail(attempt.room, reason, code)
                self._answer_error(attempt, code, reason)

        if attempt.request.bad_input:
            fails("this is no image", 400)
            return
        if encoder.name in self._failing or self.chance.random() < 0.04:
            attempt.touched.add("its encode fails")
            self.seen["encode fails"] += 1
            fails("out of memory", 500)
            return
        attempt.announced = True
        encoder.endpoint.announce(attempt.room, attempt.tokens, ROW_BYTES, DTYPE, ended)

        def computed() -> None:
            embedding = attempt.payload.view(torch.float32).reshape(attempt.tokens, -1)
            encoder.hand_over(attempt.room, embedding, attempt.metadata)

        slow = self.chance.choice([0.0, 0.0, 0.0, 4.0])
        if slow:
            self.later(slow, lambda: self.kernel.put(encoder.http, computed))
        else:
            self.kernel.put(encoder.http, computed)

    def _answer_error(self, attempt: Try, code: int, reason: str) -> None:
        self._answer(attempt, code, json.dumps({"req_id": attempt.room, "message": reason}).encode())

    def _answer(self, attempt: Try, status: int, body: bytes, state: str = "") -> None:
        encoder, end = attempt.encoder, of_answer(attempt.room, status, body, state)
        assert encoder is not None

        def arrive() -> None:
            if (attempt.server.ranks[0].name, encoder.name) in self.network.obstructed:
                self.later(1.0, arrive)
            else:
                self._tokenizer(attempt).answer(attempt, end)

        late = [1.0, 1.0, 1.0, 1.0] if state else [1.0, 1.0, 10.0, 60.0]
        self.later(self.chance.choice([0.0] * 16 + late), arrive)

    def _tokenizer(self, attempt: Try) -> Tokenizer:
        return self.tokenizers[attempt.server.name]

    def connection_closed(self, attempt: Try) -> None:
        """The dispatcher does not wait for the answer any more. An encoder may notice that, and cancel the encode."""
        encoder = attempt.encoder
        attempt.touched.add("cancelled")
        if encoder is None or self.chance.random() < 0.5:
            return

        def cancel() -> None:
            if attempt.sender_outcome is None:
                encoder.endpoint.fail(attempt.room, "the encode was cancelled", 499)

        self.later(self.chance.choice([0.0, 0.5]), lambda: self.kernel.put(encoder.http, cancel))

    # -- time ----------------------------------------------------------------------------------------------------

    def _look(self, rank: LanguageProcess) -> None:
        server = next(server for server in self.servers if rank in server.ranks)
        if rank is server.ranks[0]:
            self.tokenizers[server.name].ranks.tick()

    def pass_time(self, seconds: float) -> None:
        super().pass_time(seconds)
        for tokenizer in self.tokenizers.values():
            if not tokenizer.dead:
                self._touch_standstill(tokenizer)
                self._check_decisions(tokenizer)
                for url in self.world.encoders:
                    self._watch(tokenizer, url)

    def _touch_standstill(self, tokenizer: Tokenizer) -> None:
        server = tokenizer.server
        if not tokenizer.frozen and not any(rank.frozen for rank in server.ranks):
            self._still_since.pop(server.name, None)
            return
        since = self._still_since.setdefault(server.name, self.kernel.now)
        self._still_last[server.name] = self.kernel.now
        if self.kernel.now - since >= LONG_STANDSTILL:
            for request in self.requests.values():
                if request.open and request.server is server:
                    request.touched.add("its server stood still")
                    self._touch_request(request, "its server stood still")

    def _watch(self, tokenizer: Tokenizer, url: str) -> None:
        """Note how an encoder looks to a server."""
        encoder, server, now = self.world.encoders[url], tokenizer.server, self.kernel.now
        at = (server.name, url)
        stands_still = tokenizer.frozen or any(rank.frozen for rank in server.ranks)
        obstructed = any((rank.name, encoder.name) in self.network.obstructed for rank in server.ranks)
        faulty = (
            not encoder.runs or obstructed or encoder.draining or encoder.answers_look_ups
            or encoder.name in self._failing or encoder.name in self._refusing
        )  # fmt: skip
        if faulty or (stands_still and self._in_trouble(server, url)):
            self._trouble[at] = now
        if faulty or stands_still or url not in tokenizer.known:
            self._unwell[at] = now
        silent = not encoder.runs or (server.ranks[0].name, encoder.name) in self.network.obstructed
        self._check_silence(tokenizer, encoder, silent=silent, stands_still=stands_still)

    def _check_silence(
        self, tokenizer: Tokenizer, encoder: EncoderProcess, *, silent: bool, stands_still: bool
    ) -> None:
        """No part stays at an encoder whose control connection has been silent for too long."""
        at, now = (tokenizer.server.name, encoder.url), self.kernel.now
        if not silent or stands_still or encoder.dead:
            self._silent_since.pop(at, None)
            return
        known = tokenizer.server.ranks[0].endpoint._encoders.registrations.encoders.get(encoder.url)
        heard = [one.last_seen for one in known.processes.values() if one.registered_once] if known is not None else []
        # A message that was on its way may come long after the cut.
        since = max(self._silent_since.get(at, now if heard else math.inf), *heard, -math.inf)
        self._silent_since[at] = since
        if now - since < PEER_TIMEOUT + NOTICED_WITHIN or tokenizer.loses_reports:
            return
        for request in tokenizer.core.requests.values():
            for part in request.parts:
                attempt = part.current
                if attempt is not None and attempt.url == encoder.url and attempt.began < since:
                    what = f"part {part.number} of request {request.rid}"
                    raise Violation(f"{what} stays at {encoder.url}, which is silent since {since}")

    def _check_decisions(self, tokenizer: Tokenizer) -> None:
        """No request waits for a room that has failed."""
        since = max(self._still_last.get(tokenizer.server.name, -math.inf), self.kernel.now - DECIDED_WITHIN)
        for request in tokenizer.core.requests.values():
            for part in request.parts:
                if not part.tries or part.waits_since is not None or not self.requests[request.room_base].open:
                    continue
                failed_at = self.by_room[part.tries[-1].room].failed_at
                if failed_at is not None and failed_at < since and self.kernel.now - since >= DECIDED_WITHIN:
                    raise Violation(f"nobody decides about part {part.number} of request {request.rid}, which failed")

    def _in_trouble(self, server: Server, url: str) -> bool:
        return self.kernel.now - self._trouble.get((server.name, url), -math.inf) < RECOVERY

    def _note_trouble(self, encoder: EncoderProcess) -> None:
        for server in self.servers:
            self._trouble[server.name, encoder.url] = self._unwell[server.name, encoder.url] = self.kernel.now

    # -- faults --------------------------------------------------------------------------------------------------

    def _kinds_of_fault(self) -> list[tuple[int, Callable[[], bool]]]:
        return [
            (3, self._abort_some),
            (6, self._freeze_some),
            (4, self._obstruct_some),
            (4, self._cut_some),
            (6, self._kill_encoder),
            (3, self._kill_after_answer),
            (1, self._kill_server),
            (4, self._fail_write),
            (3, self._duplicate_some),
            (2, self._twist_some),
            (5, self._drain_some),
            (3, self._fail_encodes),
            (3, self._refuse_some),
            (4, self._lie_some),
            (3, self._break_post),
            (2, self._forget_some),
        ]

    def _abort_some(self) -> bool:
        requests = [request for request in self.requests.values() if request.open and request.sent]
        if not requests:
            return False
        request = self.chance.choice(requests)
        self.kernel.note(f"request {request.number} is aborted")
        request.touched.add("aborted")
        self._touch_request(request, "its request is aborted")
        self.tokenizers[request.server.name].ranks.inbox.append(request.room_base)
        return True

    def _touch_request(self, request: Request, why: str) -> None:
        for tries in request.tries.values():
            for attempt in tries:
                attempt.touched.add(why)

    def _froze(self, process: Process, seconds: float) -> None:
        if isinstance(process, EncoderProcess):
            self._note_trouble(process)

    def _kill_after_answer(self) -> bool:
        """Its last message to the ranks may be lost."""
        self._kills_after_answer += 1
        return True

    def _pair(self) -> Pair | None:
        """Often a rank that cannot ask the dispatcher, and an encoder that has work of it."""
        pairs = [
            (attempt.server.ranks[1].name, attempt.encoder.name)
            for tokenizer in self.tokenizers.values()
            if not tokenizer.dead and len(tokenizer.server.ranks) > 1
            for attempt in tokenizer.posting.values()
            if attempt.encoder is not None and not attempt.encoder.dead
        ]
        return self.chance.choice(pairs) if pairs and self.chance.random() < 0.5 else super()._pair()

    def _obstruct_some(self) -> bool:
        done = super()._obstruct_some()
        for encoder in self.world.encoders.values():
            if any(encoder.name == name for _, name in self.network.obstructed):
                self._note_trouble(encoder)
        return done

    def _kill_encoder(self) -> bool:
        living = [encoder for encoder in self.world.encoders.values() if not encoder.dead]
        if not living:
            return False
        self._kill(self.chance.choice(living))
        return True

    def _kill(self, encoder: EncoderProcess) -> None:
        self.kernel.note(f"{encoder.name} is killed")
        encoder.kill()
        self._note_trouble(encoder)
        self._touch(lambda part: part.url == encoder.url, "its encoder was killed")
        for attempt in self.by_room.values():
            if attempt.encoder is not encoder:
                continue
            if attempt.sender_outcome is None:
                attempt.sender_outcome = Ended(attempt.room, Outcome("killed", 502))
            self._break(attempt)

        def restart() -> None:
            self.kernel.note(f"an encoder starts at {encoder.url}")
            self.start_encoder(encoder.url, encoder.host)

        self.later(self.chance.choice([0.0, 0.0, 2.0, 20.0]), restart)

    def _break(self, attempt: Try) -> None:
        """The connection of a post breaks."""
        end = TryEnd(Verdict.CUT_OFF, int(HTTPStatus.BAD_GATEWAY), "the connection broke")
        self.later(self.chance.choice([0.0, 0.0, 1.0]), lambda: self._tokenizer(attempt).answer(attempt, end))

    def _kill_server(self) -> bool:
        done = super()._kill_server()
        for tokenizer in self.tokenizers.values():
            if tokenizer.server.dead:
                tokenizer.kill()
        for request in self.requests.values():
            if request.server.dead and request.open:
                request.touched.add("its server was killed")
                request.outcome = (502, "killed")
        return done

    def _drain_some(self) -> bool:
        running = [encoder for encoder in self.world.encoders.values() if encoder.runs and not encoder.draining]
        if not running:
            return False
        encoder = self.chance.choice(running)
        self.kernel.note(f"{encoder.name} drains")
        encoder.draining = True
        self._note_trouble(encoder)
        dice = self.chance.random()
        self.later(self.chance.choice([3.0, 10.0]), lambda: self._end_drain(encoder, undo=dice < 0.3))
        return True

    def _end_drain(self, encoder: EncoderProcess, *, undo: bool) -> None:
        if encoder.dead:
            return
        if undo:
            self.kernel.note(f"{encoder.name} drains no longer")
            encoder.draining = False
            return
        self.kernel.note(f"{encoder.name} fails what it has left")
        for attempt in self.by_room.values():
            if attempt.encoder is encoder and attempt.announced and attempt.sender_outcome is None:
                attempt.touched.add("its encoder ends")
                self.kernel.put(encoder.http, partial(encoder.endpoint.fail, attempt.room, "the encoder ends", 503))
        self.later(self.chance.choice([0.5, 2.0]), lambda: None if encoder.dead else self._kill(encoder))

    def _for_a_while(self, encoders: set[str], what: str) -> bool:
        running = [one for one in self.world.encoders.values() if one.runs and one.name not in encoders]
        if not running:
            return False
        encoder = self.chance.choice(running)
        self.kernel.note(f"{encoder.name} {what}")
        self._note_trouble(encoder)
        encoders.add(encoder.name)
        self.later(self._duration(), lambda: encoders.discard(encoder.name))
        return True

    def _fail_encodes(self) -> bool:
        return self._for_a_while(self._failing, "fails every encode")

    def _refuse_some(self) -> bool:
        return self._for_a_while(self._refusing, "refuses work and says nothing of that")

    def _lie_some(self) -> bool:
        """Look-ups are answered, though the process is frozen, or its control connection is dead."""
        running = [encoder for encoder in self.world.encoders.values() if encoder.runs]
        if not running:
            return False
        encoder = self.chance.choice(running)
        seconds = self.chance.choice([3.0, 30.0, 30.0])
        pairs = [(rank.name, encoder.name) for rank in self.world.languages if not rank.dead]
        frozen = self.chance.random() < 0.5
        self.kernel.note(f"{encoder.name} answers look-ups, but is {'frozen' if frozen else 'cut off'} for {seconds} s")
        self._note_trouble(encoder)
        encoder.answers_look_ups = True
        if frozen:
            encoder.frozen = True
        for pair in [] if frozen else pairs:
            self.network.obstruct(pair)

        def over() -> None:
            encoder.answers_look_ups = False
            if frozen:
                encoder.frozen = False
            for pair in [] if frozen else pairs:
                self.network.clear(pair)

        self.later(seconds, over)
        return True

    def _break_post(self) -> bool:
        posts = [
            attempt
            for tokenizer in self.tokenizers.values()
            for attempt in tokenizer.posting.values()
            if attempt.encoder is not None and not attempt.answered
        ]
        if not posts:
            return False
        attempt = self.chance.choice(posts)
        self.kernel.note(f"the post of room {attempt.room} breaks")
        attempt.touched.add("its post broke")
        self._break(attempt)
        return True

    def _forget_some(self) -> bool:
        """sglang drops an encoder, which registers again."""
        living = [tokenizer for tokenizer in self.tokenizers.values() if not tokenizer.dead]
        if not living or len(self.world.encoders) < 2:
            return False
        tokenizer = self.chance.choice(living)
        every = list(self.world.encoders)
        gone = self.chance.choice(every)
        self.kernel.note(f"{tokenizer.name} does not know {gone} any more")
        tokenizer.know([url for url in every if url != gone])
        self.later(self.chance.choice([0.5, 5.0]), lambda: None if tokenizer.dead else tokenizer.know(every))
        return True

    # -- the end -------------------------------------------------------------------------------------------------

    def _unrest(self) -> str:
        for request in self.requests.values():
            if request.open:
                return f"request {request.number} has not ended"
        for tokenizer in self.tokenizers.values():
            if tokenizer.dead:
                continue
            core = tokenizer.core
            left: dict[str, Any] = {
                "requests": len(core.requests),
                "tries": len(core._open),
                "waiting parts": len(core._waiting),
                "delivered parts": len(core._delivered),
                "parts at encoders": sum(one.load.parts for one in core.fleet.encoders.values()),
                "work at encoders": sum(one.load.work for one in core.fleet.encoders.values()),
                "posts": len(tokenizer.posting),
                "messages": len(tokenizer.ranks.inbox),
                "waiting requests": sum(map(len, tokenizer.ranks.waiting)),
            }
            if any(left.values()):
                return f"{tokenizer.name}: " + ", ".join(f"{value} {name}" for name, value in left.items() if value)
        return super()._unrest()

    def _judge(self) -> None:
        super()._judge()
        for request in self.requests.values():
            if request.outcome is None or request.outcome[0] == HTTPStatus.OK:
                continue
            if not request.touched and not request.excuse:
                raise Violation(f"request {request.number} failed without a cause: {request.outcome}")
