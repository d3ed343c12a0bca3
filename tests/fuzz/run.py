"""One fuzz: a healthy encoder and language process, malicious peers at both, and what must hold all the while."""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import zmq

from sglang_mm_conn.control.authentication import DeploymentKey, generate
from sglang_mm_conn.core.states import Poll
from tests.connector.payload import ITEM_BYTES, Part
from tests.connector.processes import BLOCK_SIZE, HOST, WIDTH, Child, CommandFailed, Language, World, Zygote, wait_for
from tests.faults.baseline import Holdings
from tests.faults.processes import ENCODER_TABLES, LANGUAGE_TABLES
from tests.faults.traffic import Route
from tests.fuzz.frames import Frames
from tests.fuzz.malicious_peers import MaliciousEncoder, MaliciousLanguage, Strangers, keyless_frames

# A healthy room arrives within this, whatever malicious peers do; far longer than it takes.
DEADLINE = 20.0
# Rooms of malicious peers, which hold blocks until then.
MALICIOUS_SECONDS = 1.0
MALICIOUS_ROOMS = 12
# Several: one that made the language process close the connection is away for a moment.
MALICIOUS_ENCODERS = 5
BATCH = 50
LIMIT = 1 << 20
SETTINGS: dict[str, Any] = {
    "blocks": 512,
    "first_offer": 256,
    "peer_timeout": 4.0,
    "claim_timeout": 1.0,
    "checksum": True,
    "max_frame_bytes": LIMIT,
    "max_metadata_bytes": LIMIT,
    "max_embedding_bytes": 16 << 20,
}
# One ended room's tombstone with as much reason as is kept. There are at most 65,536 in a process.
TOMBSTONE_BYTES = 1200


@dataclass
class Outcome:
    """What a fuzz came to."""

    seed: str
    key: bool
    frames: int = 0
    requests: int = 0
    seconds: float = 0.0
    rooms: int = 0
    slowest: float = 0.0
    answers: int = 0
    held: dict[str, tuple[Holdings, Holdings]] = field(default_factory=dict)
    problem: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class WatchedWorld(World):
    """Remembers the rooms of healthy traffic: malicious peers name them."""

    def __init__(self, zygote: Zygote, path: str, directory: Path) -> None:
        super().__init__(zygote, path, directory)
        self.recent: deque[str] = deque(maxlen=20)

    def part(
        self, language: Language, tokens: int, width: int = WIDTH, *, dtype: str = "float32", metadata: bool = True
    ) -> Part:
        part = super().part(language, tokens, width, dtype=dtype, metadata=metadata)
        self.recent.append(part.room)
        return part


class Ground:
    """The processes, and the malicious peers when there are any. Everything random comes from the seed."""

    def __init__(self, zygote: Zygote, directory: Path, seed: str, *, with_key: bool) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.dice = random.Random(f"{seed} {with_key}")
        self.world = WatchedWorld(zygote, "shm", directory)
        self.key: DeploymentKey | None = None
        settings = dict(SETTINGS)
        if with_key:
            generate(str(directory / "key"))
            settings["key_file"] = str(directory / "key")
            self.key = DeploymentKey.load(settings["key_file"])
        self._context: zmq.Context[Any] = zmq.Context()
        self.malicious_languages: list[MaliciousLanguage] = []
        self.malicious_encoders: list[MaliciousEncoder] = []
        self._expected: dict[MaliciousEncoder, deque[str]] = {}
        self._announced: dict[MaliciousLanguage, deque[Part]] = {}
        self._to_forget: deque[str] = deque()
        self.answers = 0
        try:
            # Healthy embeddings are small: with a key workers and copiers move them, without one the control threads.
            self.encoder = self.world.encoder(send_timeout=DEADLINE, inline=not with_key, **settings)
            self.language = self.world.language(self.encoder, inline=not with_key, **settings)
        except BaseException:
            self.world.close()
            raise
        self.address = f"tcp://{HOST}:{self.encoder.hello['control_port']}"
        self.common = {
            "block_size": BLOCK_SIZE, "block_bytes": BLOCK_SIZE * WIDTH * ITEM_BYTES["float32"],
            "row_bytes": WIDTH * ITEM_BYTES["float32"], "dtype": "float32", "checksum": True,
            "max_frame_bytes": LIMIT, "max_metadata_bytes": LIMIT,
        }  # fmt: skip
        self.strangers = Strangers(self.dice, int(self.encoder.hello["control_port"]), self.encoder.port)
        self.threads: dict[Child, Counter[str]] = {}
        self.route: Route | None = None

    @property
    def children(self) -> dict[str, Child]:
        return {"encoder": self.encoder, "language": self.language}

    # -- malicious peers --------------------------------------------------------------------------------------------

    def let_malicious_peers_in(self) -> None:
        for registers, reads in ((False, True), (True, True), (True, True), (True, False)):
            peer = self.malicious_language(registers=registers, reads=reads)
            self._announced[peer] = deque()
        for _ in range(MALICIOUS_ENCODERS):
            self._expected[self.malicious_encoder()] = deque()

    def malicious_language(self, *, registers: bool, reads: bool) -> MaliciousLanguage:
        peer = MaliciousLanguage(self._context, self.address, self.key, self.common, registers=registers, reads=reads)
        self.malicious_languages.append(peer)
        return peer

    def malicious_encoder(self) -> MaliciousEncoder:
        peer = MaliciousEncoder(self._context, self.key)
        self.malicious_encoders.append(peer)
        self.language.call("use_encoder", url=peer.url)
        peer.wait_connected()
        return peer

    def reject_malicious_peers(self) -> None:
        """Their connections close; their rooms end by themselves."""
        peers: list[MaliciousLanguage | MaliciousEncoder] = [*self.malicious_languages, *self.malicious_encoders]
        for peer in peers:
            peer.close()
        for expected in self._expected.values():
            self._to_forget += expected
        self.malicious_languages, self.malicious_encoders = [], []
        self._expected, self._announced = {}, {}

    def batch_at_encoder(self) -> None:
        """BATCH frames of one malicious language rank, about rooms that the encoder announces to it."""
        peer = self.dice.choice(self.malicious_languages)
        announced = self._announced[peer]
        if peer.knowledge.register is not None:
            part = Part(f"{peer.server}-{self.dice.getrandbits(64):016x}", self.dice.choice((1, 60, 150)), WIDTH, 1)
            self.encoder.offer(part)
            announced.append(part)
            while len(announced) > MALICIOUS_ROOMS:
                old = announced.popleft()
                self.encoder.call("fail", room=old.room, reason="the fuzz has had enough of it", code=500)
                self.encoder.call("forget", room=old.room)
        known = peer.knowledge
        known.rooms = [part.room for part in announced]
        known.other_rooms = list(self.world.recent)
        known.sessions = [other.knowledge.session for other in self.malicious_languages] + self._healthy_sessions()
        frames = Frames(self.dice, known, LIMIT)
        for _ in range(BATCH):
            peer.send(frames.to_encoder())
        self.answers += peer.read()
        if self.dice.random() < 0.02:
            peer.reconnect()

    def batch_at_language(self) -> int:
        """BATCH frames of one malicious encoder, about rooms that are expected from it. Returns how many were sent."""
        peer = self.dice.choice(self.malicious_encoders)
        expected = self._expected[peer]
        room = f"{self.language.config['server']}-{self.dice.getrandbits(64):016x}"
        if self.dice.random() < 0.8:
            self.language.call("expect", room=room, url=peer.url, timeout=MALICIOUS_SECONDS)
        expected.append(room)
        while len(expected) > MALICIOUS_ROOMS:
            self._to_forget.append(expected.popleft())
        self.forget_ended()
        known = peer.knowledge
        known.rooms = list(expected)
        known.other_rooms = list(self.world.recent)[:-3]  # whoever knew the name of one to come could answer for it
        frames = Frames(self.dice, known, 2 * LIMIT)
        self.answers += len(peer.read())
        peer.beat()
        return sum(peer.send(frames.to_language()) for _ in range(BATCH))

    def batch_of_strangers(self) -> None:
        self.strangers.garbage()
        for _ in range(3):
            self.strangers.request()
        if self.key is not None:
            keyless_frames(
                Frames(self.dice, self.malicious_languages[1].knowledge, LIMIT), self.address, self._context, 10
            )

    def _healthy_sessions(self) -> list[str]:
        return [peer.knowledge.session for peer in self.malicious_encoders if peer.knowledge.session]

    def forget_ended(self) -> None:
        """The language process forgets rooms of malicious peers that have ended, as a request that ended does."""
        for _ in range(len(self._to_forget)):
            room = self._to_forget.popleft()
            try:
                state = self.language.call("poll", room=room)
            except CommandFailed:
                continue  # never expected, or expected twice
            if state in (Poll.Success, Poll.Failed):
                self.language.call("forget", room=room)
            else:
                self._to_forget.append(room)

    def _all_forgotten(self) -> bool:
        self.forget_ended()
        return not self._to_forget

    # -- what must hold ------------------------------------------------------------------------------------------------

    def start_traffic(self) -> None:
        self.route = Route(self.world, self.encoder, self.language, DEADLINE)
        self.route.one_more()
        for child in self.children.values():
            self.threads[child] = self._threads(child)

    @staticmethod
    def _threads(child: Child) -> Counter[str]:
        return Counter(child.call("threads"))

    def check(self) -> None:
        """Processes and threads live, blocks are accounted for, healthy rooms arrive. Raises AssertionError."""
        for name, child in self.children.items():
            assert child.alive, f"the {name} process is gone: {child.log.read_text()[-2000:]}"
            dead = self.threads[child] - self._threads(child)
            assert not dead, f"a thread of the {name} process ended: {', '.join(dead)}"
        self.language.call("check_integrity")
        assert self.route is not None
        assert not self.route.problem, self.route.problem

    def settle(self) -> dict[str, tuple[Holdings, int]]:
        """Asserts that nothing of malicious peers is left. Returns what each process holds, and its tombstones."""
        self.reject_malicious_peers()
        assert self.route is not None
        self.route.one_more()
        with self.route.paused():
            wait_for(self._all_forgotten, "rooms of malicious peers have ended")
            for name, tables, baseline in (
                ("encoder", ENCODER_TABLES, {"sessions": 1, "links": 1, "peers": 1}),
                ("language", LANGUAGE_TABLES, {"processes": 1}),
            ):
                child = self.children[name]
                expected = {**dict.fromkeys(tables, 0), **baseline}

                def left(child: Child = child, expected: dict[str, int] = expected) -> dict[str, int]:
                    stats = child.stats()
                    return {table: stats[table] for table, count in expected.items() if stats[table] != count}

                try:
                    wait_for(lambda left=left: not left(), "tables are as before")  # type: ignore[misc]
                except AssertionError:
                    raise AssertionError(f"LEAK: left behind in the {name} process: {left()}") from None
            self.language.wait_all_free()
            time.sleep(0.5)  # connections that were closed at this end
            return {name: (Holdings.of(child), child.stats()["tombstones"]) for name, child in self.children.items()}

    def close(self) -> None:
        if self.route is not None:
            self.route.halt()
        self.reject_malicious_peers()
        self.world.close()
        self._context.destroy(linger=0)


def _without_growth(name: str, child: Child, allowed: Holdings) -> Holdings:
    """What ``child`` holds when that is no more than ``allowed``: a look-up has a socket for a moment. Raises
    AssertionError where it never is."""
    until = time.monotonic() + 10
    while True:
        held = Holdings.of(child)
        growth = held.growth(allowed, vanished=0, mooncake=False)
        if not growth:
            return held
        assert time.monotonic() < until, f"GROWTH of the {name} process: {'; '.join(growth)}"
        time.sleep(0.05)


def fuzz(
    zygote: Zygote, directory: Path, seed: str, frames: int, *, with_key: bool,
    progress: Callable[[int], None] = lambda sent: None, after_batch: Callable[[Ground], None] = lambda ground: None,
) -> Outcome:  # fmt: skip
    """Send ``frames`` frames, half of them to each side. ``after_batch`` may do harm of its own, to see it found."""
    outcome = Outcome(seed, with_key)
    began = time.monotonic()
    ground = Ground(zygote, directory, seed, with_key=with_key)
    try:
        ground.start_traffic()
        before: dict[str, tuple[Holdings, int]] | None = None
        ground.let_malicious_peers_in()
        next_check = 0.0
        while outcome.frames < frames:
            ground.batch_at_encoder()
            outcome.frames += BATCH + ground.batch_at_language()
            if ground.dice.random() < 0.03:
                ground.batch_of_strangers()
                outcome.requests += 4
            after_batch(ground)
            if time.monotonic() >= next_check:
                ground.check()
                progress(outcome.frames)
                next_check = time.monotonic() + 0.5
            if before is None and outcome.frames >= frames // 10:
                before = ground.settle()
                ground.let_malicious_peers_in()
        ground.check()
        after = ground.settle()
        ground.check()
        assert ground.route is not None and before is not None
        ground.route.stop()
        for name, child in ground.children.items():
            first, first_stones = before[name]
            allowed_kb = first.rss_kb + max(0, after[name][1] - first_stones) * TOMBSTONE_BYTES // 1024
            outcome.held[name] = (first, _without_growth(name, child, replace(first, rss_kb=allowed_kb)))
    except (AssertionError, CommandFailed, OSError) as error:
        outcome.problem = f"{error or type(error).__name__} (after {outcome.frames} frames; logs: {directory})"
    finally:
        if ground.route is not None:
            outcome.rooms, outcome.slowest = ground.route.rooms, ground.route.slowest
        outcome.answers = ground.answers
        ground.close()
        outcome.seconds = time.monotonic() - began
    return outcome
