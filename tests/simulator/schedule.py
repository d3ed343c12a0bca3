"""One schedule: a world drawn from a seed, requests, faults, and what must hold during it and at its end.

A part counts as *touched* where a fault is allowed to end it: its encoder or language process was killed, its client
went away, the two did not hear each other for about the peer timeout, its own write failed, and so on. A part that is
not touched must arrive. Whatever is said about time is generous towards the code, never towards the data.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from sglang_mm_conn.core import rooms
from sglang_mm_conn.core.actions import Ended
from sglang_mm_conn.core.messages import (
    Init,
    Message,
    Progress,
    Resume,
    decode_from_encoder,
    decode_from_language,
    encode,
)
from sglang_mm_conn.core.outcomes import Outcome
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.core.states import Poll
from tests.simulator.memory import Write, content
from tests.simulator.network import Connection, Pair
from tests.simulator.processes import DTYPE, ROW_BYTES, EncoderProcess, LanguageProcess, World, new_server
from tests.simulator.scheduler import Kernel, Process, Violation, attribute

FRAME_LIMIT = 1 << 24
TWISTED = "a message about it was twisted"
HEARTBEAT, PEER_TIMEOUT, CLAIM_TIMEOUT, DOUBT_PATIENCE = 3.0, 12.0, 25.0, 3.0
# Two processes that were kept apart for so long in all may have given each other up.
APART_TOO_LONG = 5.0
# So long after that their rooms may still feel it.
RECOVERY = 20.0
LONG_DEADLINE = 400.0
# Whatever can happen happens within this many simulated seconds, unless a fault is in its way.
NATURAL_DELAY = 1.0
RESTS_WITHIN_TICKS = 400


@contextmanager
def _without_logs() -> Iterator[None]:
    """Endpoints log every room and every fault; of a million rooms nobody reads that."""
    logger = logging.getLogger("sglang_mm_conn")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


@dataclass
class Server:
    """One life of a language server: its ranks."""

    name: str
    ranks: list[LanguageProcess]

    @property
    def dead(self) -> bool:
        return any(rank.dead for rank in self.ranks)


@dataclass
class Part:
    """One embedding part of one request."""

    number: int
    server: Server
    url: str
    room: str
    tokens: int
    timeout: float
    metadata: bytes
    touched: set[str] = field(default_factory=set)
    announced: bool = False
    expected: set[str] = field(default_factory=set)  # names of the ranks that wait for it
    outcome: dict[str, str] = field(default_factory=dict)  # by rank: empty for Success, else why it failed
    sender_outcome: Ended | None = None

    @property
    def payload(self) -> torch.Tensor:
        return content(self.number, self.tokens * ROW_BYTES)

    @property
    def over(self) -> bool:
        return len(self.outcome) == len(self.server.ranks) and self.sender_outcome is not None


class Schedule:
    """``run`` plays it; raises Violation (or whatever the code under test raises) where a promise is broken."""

    def __init__(self, seed: str, trace: Callable[[str], None] | None = None) -> None:
        self.kernel = Kernel(seed)
        self.kernel.trace = trace
        self.chance = self.kernel.chance
        self.world = World(self.kernel)
        self.network = self.world.network
        self.network.carry = self._carry
        self.parts: list[Part] = []
        self.servers: list[Server] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.seen: Counter[str] = Counter()  # what happened, for the report
        self._duplicates = 0
        self._twists = 0
        self._faults_in_mid_write = 0  # that wait for a data call to be under way
        self._apart: defaultdict[Pair, float] = defaultdict(float)
        self._apart_last: dict[Pair, float] = {}
        self._hosts = self.chance.choice([1, 2])
        self._encoder_settings = self._settings(blocks=1)

    # -- the world -----------------------------------------------------------------------------------------------

    def _settings(self, blocks: int) -> Settings:
        return Settings(
            blocks=blocks, block_size=2, queues=3, workers=6, regions=self.chance.choice([1, 2]),
            first_offer=self.chance.choice([None, None, 1, 3]), heartbeat=HEARTBEAT, peer_timeout=PEER_TIMEOUT,
            claim_timeout=CLAIM_TIMEOUT, doubt_patience=DOUBT_PATIENCE,
        )  # fmt: skip

    def _host(self) -> int:
        return self.chance.randrange(self._hosts)

    def start_encoder(self, url: str, host: int) -> EncoderProcess:
        return EncoderProcess(self.world, f"encoder-{next(self.world.numbers)}", url, host, self._encoder_settings)

    def start_server(self, *, size: int, blocks: int, host: int, dtype: str = DTYPE) -> Server:
        name = new_server()
        settings = self._settings(blocks)
        ranks = [
            LanguageProcess(
                self.world, f"language-{next(self.world.numbers)}.{rank}", host, settings, server=name, rank=rank,
                size=size, dtype=dtype,
            )
            for rank in range(size)
        ]  # fmt: skip
        server = Server(name, ranks)
        self.servers.append(server)
        return server

    def _build(self) -> None:
        for index in range(self.chance.choice([1, 1, 2, 3])):
            self.start_encoder(f"http://encoder:{30000 + index}", self._host())
        for _ in range(self.chance.choice([1, 1, 2])):
            # Ranks that wait for each other's blocks can block each other: two ranks get pools that hold everything.
            two = self.chance.random() < 0.2
            blocks = 64 if two else self.chance.choice([1, 2, 3, 4, 8])
            self.start_server(size=2 if two else 1, blocks=blocks, host=self._host())
        if self.chance.random() < 0.04:
            self.start_server(size=1, blocks=4, host=self._host(), dtype="float16")

    # -- requests ------------------------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """A request's part: the tokenizer posts /encode, the scheduler's ranks wait for the room."""
        living = [server for server in self.servers if not server.dead]
        if not living:
            return
        server = self.chance.choice(living)
        url = self.chance.choice(list(self.world.encoders))
        number = len(self.parts) + 1
        room = f"{rooms.new_room_base(server.name)}_local_part_0"
        timeout = LONG_DEADLINE
        part = Part(number, server, url, room, self.chance.randint(1, 14), timeout, f"of {number}".encode())
        if self.chance.random() < 0.05:
            part.timeout = self.chance.uniform(1, 15)
            part.touched.add("a short deadline")
        if not server.ranks[0].fits:
            part.touched.add("the two do not fit")
        encoder = self.world.encoders[url]
        if encoder.dead:
            part.touched.add("its encoder is down")
        self.parts.append(part)
        self._touch_apart(self.kernel.now)
        self.seen["parts"] += 1
        self.kernel.note(f"part {number}: {part.tokens} rows, {url} to {server.ranks[0].name}, room {room}")
        self.kernel.put(encoder.http, lambda: self._encode(part, encoder))
        if self.chance.random() < 0.05:
            part.touched.add("its prompt is rejected")
            self.seen["prompt rejected"] += 1
            for rank in server.ranks:
                part.outcome[rank.name] = "never asked for"
            return
        for rank in server.ranks:
            self.kernel.put(rank.scheduler, lambda rank=rank: self._expect(part, rank))  # type: ignore[misc]

    def _expect(self, part: Part, rank: LanguageProcess) -> None:
        part.expected.add(rank.name)
        rank.endpoint.expect(part.room, part.url, part.timeout, str(part.number))

    def _encode(self, part: Part, encoder: EncoderProcess) -> None:
        def ended(action: Ended) -> None:
            if part.sender_outcome is not None:
                raise Violation(f"room {part.room} ended twice on the encoder")
            part.sender_outcome = action

        part.announced = True
        encoder.endpoint.announce(part.room, part.tokens, ROW_BYTES, DTYPE, ended)
        if self.chance.random() < 0.04:
            part.touched.add("its encode fails")
            self.seen["encode fails"] += 1
            self.kernel.put(encoder.http, lambda: encoder.endpoint.fail(part.room, "out of memory", 500))
            return

        def computed() -> None:
            embedding = part.payload.view(torch.float32).reshape(part.tokens, -1)
            encoder.hand_over(part.room, embedding, part.metadata)

        slow = self.chance.choice([0.0, 0.0, 0.0, 4.0])
        if slow:
            self.later(slow, lambda: self.kernel.put(encoder.http, computed))
        else:
            self.kernel.put(encoder.http, computed)

    def _look(self, rank: LanguageProcess) -> None:
        """The scheduler's tick: read states, take results."""
        for part in self.parts:
            if rank.name not in part.expected or rank.name in part.outcome:
                continue
            poll = rank.endpoint.poll(part.room)
            if poll is Poll.Success:
                flat, metadata = rank.endpoint.take(part.room)
                if not torch.equal(flat.reshape(-1).view(torch.uint8), part.payload) or metadata != part.metadata:
                    raise Violation(f"part {part.number} arrived on {rank.name} with the wrong bytes")
                part.outcome[rank.name] = ""
                self.seen["arrived"] += 1
                self.seen["views"] += part.room in rank.endpoint.core.views
                self._generate(part, flat)
                self.seen["resumes"] += rank.endpoint.core.rooms[part.room].resumes
            elif poll is Poll.Failed:
                outcome = rank.endpoint.outcome(part.room)
                if not outcome.reason or not 400 <= outcome.code <= 599:
                    raise Violation(f"part {part.number} failed without a reason: {outcome}")
                part.outcome[rank.name] = outcome.reason
                self.seen["failed"] += 1
                self.kernel.note(f"part {part.number} failed on {rank.name}: {outcome.code} {outcome.reason}")
                for other in part.server.ranks:
                    if other.name not in part.outcome:
                        self._abort(part, other)
            else:
                continue
            rank.endpoint.forget(part.room)

    def _generate(self, part: Part, rows: torch.Tensor) -> None:
        """The request keeps its rows for a while; nobody may change them meanwhile."""

        def over() -> None:
            if not torch.equal(kept.pop().reshape(-1).view(torch.uint8), part.payload):
                raise Violation(f"the rows of part {part.number} changed after they had arrived")

        kept = [rows]
        self.later(self.chance.choice([0.0, 1.0, 20.0]), over)

    def _abort(self, part: Part, rank: LanguageProcess, code: int = 499) -> None:
        def work() -> None:
            if rank.name in part.expected and rank.name not in part.outcome:
                rank.endpoint.abort(part.room, "given up", code)

        self.kernel.put(rank.scheduler, work)

    # -- time and chance -----------------------------------------------------------------------------------------

    def later(self, seconds: float, work: Callable[[], None]) -> None:
        self.timers.append((self.kernel.now + seconds, work))

    def event(self) -> bool:
        """One thing happens, chosen by chance. Returns False where nothing can."""
        dice = self.chance.random()
        if dice < 0.25 and self._write_event():
            return True
        return self.kernel.step() or self._write_event()

    def _write_event(self) -> bool:
        """A worker takes a chunk, a piece lands, or a data call returns."""
        world = self.world
        choices: list[Callable[[], object]] = []
        for encoder in world.encoders.values():
            if encoder.runs:
                choices += [lambda e=encoder, i=index: e.take_chunk(i) for index in encoder.idle_queues()]  # type: ignore[misc]
        choices += [lambda w=write: self._advance(w) for write in world.writes if self._can_go_on(write)]  # type: ignore[misc]
        if not choices:
            return False
        self.chance.choice(choices)()
        return True

    def _can_go_on(self, write: Write) -> bool:
        if not write.encoder.runs:
            return False
        if write.link.synchronous:
            return True
        target = write.link.target
        pair = (target.name, write.encoder.name)
        return target.dead or not write.link.leads_in or (target.runs and pair not in self.network.obstructed)

    def _advance(self, write: Write) -> None:
        if not write.link.synchronous and not write.link.leads_in:
            self.seen["write through a revoked epoch"] += 1
            self._touch_room(write.room, "its epoch was revoked")
            write.encoder.write_returns(write, "the other end is gone", True)
        elif write.pieces:
            write.land()
        else:
            write.encoder.write_returns(write)

    def pass_time(self, seconds: float) -> None:
        """Time passes; what has waited for long without a fault in its way happens first."""
        before = self.kernel.now + seconds - NATURAL_DELAY
        for _ in range(20_000):
            if not self.kernel.step_overdue(before) and not self._write_event():
                break
        else:
            raise Violation("the processes keep each other busy without end")
        self.kernel.now += seconds
        due = [timer for timer in self.timers if timer[0] <= self.kernel.now]
        self.timers = [timer for timer in self.timers if timer[0] > self.kernel.now]
        for _, work in due:
            work()
        self._touch_apart(self.kernel.now, seconds)
        self.network.try_again()
        for process in self.world.processes():
            if process.runs:
                process.tick()
        for rank in self.world.languages:
            if rank.runs:
                self._look(rank)
        self.kernel.bury()

    def _touch_apart(self, now: float, seconds: float = 0.0) -> None:
        """Parts of two processes that do not hear each other for too long may be lost."""
        for rank in self.world.languages:
            for encoder in self.world.encoders.values():
                pair = (rank.name, encoder.name)
                if pair in self.network.obstructed or rank.frozen or encoder.frozen:
                    self._apart[pair] += seconds
                    self._apart_last[pair] = now
                if self._apart[pair] > APART_TOO_LONG and now - self._apart_last[pair] < RECOVERY:
                    self._touch(lambda part, r=rank, e=encoder: part.url == e.url and r in part.server.ranks, "apart")  # type: ignore[misc]

    def _touch(self, which: Callable[[Part], bool], why: str) -> None:
        for part in self.parts:
            if not part.over and which(part):
                part.touched.add(why)

    def _touch_room(self, room: str, why: str) -> None:
        self._touch(lambda part: part.room == room, why)

    # -- faults --------------------------------------------------------------------------------------------------

    def _kinds_of_fault(self) -> list[tuple[int, Callable[[], bool]]]:
        return [
            (6, self._abort_some),
            (5, self._freeze_some),
            (5, self._obstruct_some),
            (6, self._cut_some),
            (4, self._kill_encoder),
            (3, self._kill_server),
            (8, self._fail_write),
            (4, self._duplicate_some),
            (3, self._twist_some),
        ]

    def fault(self) -> None:
        kinds = self._kinds_of_fault()
        weights = [weight for weight, _ in kinds]
        for _ in range(4):
            (kind,) = self.chance.choices([kind for _, kind in kinds], weights)
            if kind():
                self.seen[kind.__name__.strip("_").replace("_", " ")] += 1
                return

    def _abort_some(self) -> bool:
        open_parts = [part for part in self.parts if not part.over]
        if not open_parts:
            return False
        part = self.chance.choice(open_parts)
        self.kernel.note(f"part {part.number} is aborted")
        part.touched.add("aborted")
        for rank in part.server.ranks:
            if not rank.dead:
                self._abort(part, rank)
        return True

    def _duration(self) -> float:
        return self.chance.choice([0.5, 1.0, 2.0, 3.0, 14.0, 30.0])

    def _freeze_some(self) -> bool:
        awake = [process for process in self.world.processes() if process.runs]
        if not awake:
            return False
        process = self.chance.choice(awake)
        seconds = self._duration()
        self.kernel.note(f"{process.name} is frozen for {seconds} s")
        process.frozen = True
        self._froze(process, seconds)

        def thaw() -> None:
            self.kernel.note(f"{process.name} goes on")
            process.frozen = False

        self.later(seconds, thaw)
        return True

    def _froze(self, process: Process, seconds: float) -> None:
        """``process`` stands still for ``seconds`` from now on."""

    def _pair(self) -> Pair | None:
        pairs = [
            (rank.name, encoder.name)
            for rank in self.world.languages
            for encoder in self.world.encoders.values()
            if not rank.dead and not encoder.dead
        ]
        return self.chance.choice(pairs) if pairs else None

    def _obstruct_some(self) -> bool:
        pair = self._pair()
        if pair is None or pair in self.network.obstructed:
            return False
        seconds = self._duration()
        self.kernel.note(f"nothing gets through between {pair} for {seconds} s")
        self.network.obstruct(pair)
        self.later(seconds, lambda: self.network.clear(pair))
        return True

    def _cut_some(self) -> bool:
        pair = self._pair()
        if pair is None:
            return False
        self.kernel.note(f"the connection of {pair} breaks")
        self.network.cut(pair)
        return True

    def _kill_encoder(self) -> bool:
        living = [encoder for encoder in self.world.encoders.values() if not encoder.dead]
        if not living:
            return False
        encoder = self.chance.choice(living)
        self.kernel.note(f"{encoder.name} is killed")
        encoder.kill()
        self._touch(lambda part: part.url == encoder.url, "its encoder was killed")
        for part in self.parts:
            if part.url == encoder.url and part.sender_outcome is None:
                # Its client is told by the tokenizer, whose /encode broke.
                part.sender_outcome = Ended(part.room, Outcome("killed", 502))
                for rank in part.server.ranks:
                    if not rank.dead and self.chance.random() < 0.5:
                        self._abort(part, rank, 502)

        def restart() -> None:
            self.kernel.note(f"an encoder starts at {encoder.url}")
            self.start_encoder(encoder.url, encoder.host)

        self.later(self.chance.choice([0.0, 0.0, 2.0, 20.0]), restart)
        return True

    def _kill_server(self) -> bool:
        living = [server for server in self.servers if not server.dead]
        if not living:
            return False
        server = self.chance.choice(living)
        self.kernel.note(f"server {server.name} is killed")
        for rank in server.ranks:
            rank.kill()
        for part in self.parts:
            if part.server is server:
                part.touched.add("its language server was killed")
                for rank in server.ranks:
                    part.outcome.setdefault(rank.name, "killed")
        self.later(
            self.chance.choice([0.0, 2.0]),
            lambda: void(self.start_server(size=1, blocks=self.chance.choice([1, 2, 4]), host=server.ranks[0].host)),
        )
        return True

    def _fail_write(self) -> bool:
        if not self.world.writes:
            return False
        write = self.chance.choice(self.world.writes)
        if not write.encoder.runs:
            return False
        self.kernel.note(f"a write of {write.room} fails in window {write.window} over {write.link.name}")
        self._touch_room(write.room, "its write failed")
        write.encoder.write_returns(write, "the data call failed", not write.link.synchronous)
        return True

    def _duplicate_some(self) -> bool:
        self._duplicates += 3
        return True

    def _twist_some(self) -> bool:
        self._twists += 1
        return True

    # -- frames on their way -------------------------------------------------------------------------------------

    def _carry(self, connection: Connection, frame: bytes, to_server: bool) -> None:
        twisted = self._twist(frame, to_server) if self._twists and self.chance.random() < 0.5 else None
        if twisted is not None and self.chance.random() < 0.5:
            self._deliver_twisted(connection, twisted, to_server)
            twisted = None
        self.network.deliver(connection, frame, to_server)
        if twisted is not None:
            self._deliver_twisted(connection, twisted, to_server)
        if self._duplicates and self.chance.random() < 0.2:
            self._duplicates -= 1
            self.later(self.chance.choice([0.0, 0.0, 1.0, 5.0]), lambda: self._again(connection, frame, to_server))

    def _again(self, connection: Connection, frame: bytes, to_server: bool) -> None:
        if connection.up:
            self.network.deliver(connection, frame, to_server)

    def _twist(self, frame: bytes, to_server: bool) -> Message | None:
        """A message that contradicts what the two have agreed upon; None where ``frame`` is not of a kind for that."""
        message: Any
        changes: list[dict[str, Any]]
        message = decode_from_language(frame, FRAME_LIMIT) if to_server else decode_from_encoder(frame, FRAME_LIMIT)
        if not isinstance(message, Init | Resume | Progress):
            return None
        fields = {name: getattr(message, name) for name in message.__struct_fields__}
        if isinstance(message, Resume):
            changes = [
                {"window": message.window + 1},
                {"sent_tokens": message.sent_tokens + self.chance.choice([1, 2])},
                {"sent_tokens": max(0, message.sent_tokens - 1)},
                {"allocated_tokens": message.allocated_tokens + 1000},
                {"dst_embedding_indices": [*message.dst_embedding_indices, 1 << 20]},
                {"dst_embedding_indices": message.dst_embedding_indices * 2},
                {"epoch": message.epoch + 7},
            ]
            if message.window > 1:
                changes.append({"window": message.window - 1})
        elif isinstance(message, Init):
            changes = [
                {"allocated_tokens": message.allocated_tokens + 1000},
                {"dst_embedding_indices": [*message.dst_embedding_indices, 1 << 20]},
                {"dst_embedding_indices": message.dst_embedding_indices * 2},
                {"epoch": message.epoch + 7},
                {"required_dst_info_num": message.required_dst_info_num + 1},
            ]
        else:
            changes = [
                {"window": message.window + 1},
                {"window": message.window - 1},
                {"sent_tokens": message.sent_tokens + 1},
                {"sent_tokens": max(0, message.sent_tokens - 1)},
            ]
        twisted = type(message)(**{**fields, **self.chance.choice(changes)})
        if twisted == message:
            return None
        self._twists -= 1
        self._touch_room(message.room, TWISTED)
        self.kernel.note(f"twisted: {twisted}")
        return twisted

    def _deliver_twisted(self, connection: Connection, message: Message, to_server: bool) -> None:
        frame = encode(message)
        if not to_server:
            self.network.deliver(connection, frame, to_server)
            return
        assert isinstance(message, Init | Resume)
        server = connection.server

        def deliver() -> None:
            assert isinstance(server.process, EncoderProcess)
            core = server.process.endpoint.core

            def progress() -> object:
                entry = core.rooms.get(message.room)
                info = None if entry is None else entry.transfer_infos.get(message.mooncake_session_id)
                if info is None:
                    return None
                return info.state, info.window, info.sent_tokens, info.allocated_tokens, info.dst_embedding_indices

            before = progress()
            server.callbacks.on_frame(connection.peer, frame)
            if progress() != before:
                raise Violation(f"a contradictory message was taken: {message}")

        self.kernel.put(connection.to_server, deliver)

    # -- the whole -----------------------------------------------------------------------------------------------

    def run(self) -> Counter[str]:
        """Returns what happened, counted."""
        try:
            with _without_logs(), attribute(rooms, "secrets", _Names(self.chance)):
                self._play()
        except BaseException:
            self.world.over = True
            raise
        return self.seen

    def _play(self) -> None:
        self._build()
        faults = self.chance.choice([0, 1, 1, 2, 2, 3])
        parts = self.chance.randint(2, 6)
        for _ in range(self.chance.choice([0, 30, 60])):
            self.event()
        steps = 40 + 25 * parts
        plan = sorted(self.chance.sample(range(steps), faults + parts))
        what = ["fault"] * faults + ["part"] * parts
        self.chance.shuffle(what)
        acts = dict(zip(plan, what, strict=True))
        for step in range(steps):
            act = acts.get(step)
            if act == "fault" and self.chance.random() < 0.5:
                self.fault()
            elif act == "fault":
                self._faults_in_mid_write += 1
            elif act == "part":
                self.dispatch()
            if self._faults_in_mid_write and self.world.writes and self.chance.random() < 0.3:
                self._faults_in_mid_write -= 1
                self.fault()
            dice = self.chance.random()
            if dice < 0.06:
                self.pass_time(self.chance.choice([0.1, 0.5, 1.0]))
            elif dice < 0.09 and self.world.late:
                self._land_late()
            else:
                self.event()
        self._come_to_rest()
        self._judge()

    def _land_late(self) -> None:
        write = self.chance.choice(self.world.late)
        if write.pieces:
            self.seen["late pieces"] += 1
            write.land()
        else:
            self.world.late.remove(write)

    def _come_to_rest(self) -> None:
        """Faults end by themselves; every room ends, every block is proven free, nothing is left."""
        self._duplicates = self._twists = 0
        what = ""
        for tick in range(RESTS_WITHIN_TICKS):
            for _ in range(20_000):
                if not self.event():
                    break
            else:
                raise Violation("the processes keep each other busy without end")
            if self.world.late and self.chance.random() < 0.3:
                self._land_late()
            self.pass_time(1.0 if tick < 10 else 2.0)
            what = "faults are still to end" if self.timers else self._unrest()
            if not what:
                break
        else:
            raise Violation(f"does not come to rest: {what}")
        for write in self.world.late:
            while write.pieces:
                write.land()

    def _unrest(self) -> str:
        """What is left; empty where everything is as before the first part."""
        ranks = [rank for rank in self.world.languages if not rank.dead]
        for part in self.parts:
            for rank in part.server.ranks:
                if rank.name not in part.outcome:
                    return f"part {part.number} has not ended on {rank.name}"
            if part.announced and part.sender_outcome is None:
                return f"part {part.number} has not ended on its encoder"
        for rank in ranks:
            endpoint, core = rank.endpoint, rank.endpoint.core
            known = endpoint._encoders.registrations
            left = {
                "rooms": len(core.rooms),
                "quarantined": core.allocator.quarantined_count,
                "held": core.allocator.held_count,
                "unclaimed": len(core.unclaimed),
                "results": len(endpoint._results),
                "labels": len(endpoint._labels),
                "revocations under way": rank.revocation.stage.value != "idle",
                "engines too many": max(0, len(rank.engines) - 1),
                "slots too many": len(known.slots.keys() - known.processes.keys()),
            }
            if any(left.values()):
                return f"{rank.name}: " + ", ".join(f"{value} {name}" for name, value in left.items() if value)
        for encoder in self.world.encoders.values():
            here = encoder.endpoint
            left = {
                "rooms": len(here.core.rooms),
                "sources": len(here._sources),
                "listeners": len(here._actions.listeners),
                "writes": len(here.core.write_slots.writes) + sum(encoder.busy.values()),
                "deferred": len(here.core.write_slots.deferred),
                "sessions too many": max(0, len(here.core.sessions) - len(ranks)),
                "links too many": max(0, len(here._links) - len(here.core.sessions)),
                "peers too many": max(0, len(here._peers) - len(ranks)),
                "registrations": len(here._registrar.registering),
            }
            if any(left.values()):
                return f"{encoder.name}: " + ", ".join(f"{value} {name}" for name, value in left.items() if value)
        return ""

    def _judge(self) -> None:
        for part in self.parts:
            failures = [reason for reason in part.outcome.values() if reason]
            sent = part.sender_outcome is not None and part.sender_outcome.success
            if not part.touched and (failures or not sent):
                why = failures or part.sender_outcome
                raise Violation(f"part {part.number} was touched by no fault and failed: {why}")
            if not part.server.ranks[0].fits and part.expected and not part.server.dead and not failures:
                raise Violation(f"part {part.number} arrived though the two sides do not fit")
        for rank in self.world.languages:
            self.seen["revocations"] += rank.revocation.count
        self.seen["written inline"] += self.world.written_inline
        self.seen["left to the control thread"] += self.world.network.left_to_servers


class _Names:
    """Stands in for ``secrets``: names are part of the seed."""

    def __init__(self, chance: Any) -> None:
        self._chance = chance

    def token_hex(self, nbytes: int) -> str:
        return f"{self._chance.getrandbits(8 * nbytes):0{2 * nbytes}x}"


def void(_: object) -> None:
    """Drop a result."""
