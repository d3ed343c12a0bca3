"""Floods: one peer sends as fast as it can, and how much longer the rooms of others take meanwhile."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from sglang_mm_conn.control.batches import MOST_FRAMES
from sglang_mm_conn.control.limits import READ_AHEAD
from sglang_mm_conn.core.messages import (
    Abort,
    Announce,
    Drained,
    Heartbeat,
    Init,
    RefusalKind,
    Refused,
    Registered,
    encode,
)
from sglang_mm_conn.core.rooms import new_room_base
from tests.connector.processes import wait_for
from tests.faults.baseline import RSS_MARGIN_KB, Holdings
from tests.faults.traffic import one_room
from tests.fuzz.frames import BATCH_MARK
from tests.fuzz.malicious_peers import MaliciousEncoder, MaliciousLanguage, Stuck
from tests.fuzz.run import DEADLINE, LIMIT, TOMBSTONE_BYTES, Ground

# The median healthy room may take so many times as long beside a flood. Where it takes less than the floor without,
# the floor counts: on a small machine the flood costs a processor too.
MOST_RATIO = 20.0
FLOOR_SECONDS = 0.05
ROOMS = 30
# With and without in turn: other work on the machine comes and goes.
ROUNDS = 3
TOKENS = 300


@dataclass(frozen=True)
class Flood:
    """What is sent: ``frames`` makes an endless row of frames for the peer."""

    side: str  # "encoder" or "language": who is flooded
    name: str
    frames: Callable[[Any], Iterator[bytes]]
    reads: bool = True


def _init(peer: MaliciousLanguage) -> Iterator[bytes]:
    while True:
        yield encode(
            Init(
                room=new_room_base(peer.server),
                mooncake_session_id=peer.knowledge.session,
                epoch=0,
                dst_embedding_indices=[0],
                allocated_tokens=1,
                required_dst_info_num=1,
                deadline=1.0,
            )
        )


def _abort(peer: MaliciousLanguage) -> Iterator[bytes]:
    while True:
        room = new_room_base(peer.server)
        yield encode(Abort(room=room, mooncake_session_id=peer.knowledge.session, reason="r" * 4000))


def _register(peer: MaliciousLanguage) -> Iterator[bytes]:
    for number in itertools.count():
        yield encode(msgspec.structs.replace(peer.register, number=number))


def _register_more(peer: MaliciousLanguage) -> Iterator[bytes]:
    for number in itertools.count():
        session = f"10.9.8.7:{1 + number % 65_535}"
        memory = msgspec.structs.replace(peer.register.memory, writer_slot=number)
        yield encode(msgspec.structs.replace(peer.register, mooncake_session_id=session, memory=memory))


def _announce(peer: MaliciousEncoder) -> Iterator[bytes]:
    while True:
        yield encode(Announce(room=new_room_base("0" * 16), total_tokens=10, row_bytes=64, dtype="float32"))


def _same(message: Any) -> Callable[[Any], Iterator[bytes]]:
    return lambda peer: itertools.repeat(message if isinstance(message, bytes) else encode(message))


def _registered(peer: MaliciousEncoder) -> Iterator[bytes]:
    while True:
        yield encode(
            Registered(mooncake_session_id=peer.knowledge.session, epoch=0, incarnation=peer.knowledge.incarnation)
        )


def _batched(frames: Callable[[Any], Iterator[bytes]]) -> Callable[[Any], Iterator[bytes]]:
    def batches(peer: Any) -> Iterator[bytes]:
        single = frames(peer)
        while True:
            yield BATCH_MARK + msgspec.msgpack.encode(list(itertools.islice(single, MOST_FRAMES)))

    return batches


HEARTBEAT = Heartbeat(incarnation="flood")
FLOODS = (
    Flood("encoder", "heartbeats", _same(HEARTBEAT)),
    Flood("encoder", "offers of unknown rooms", _init),
    Flood("encoder", "offers of unknown rooms, answers not read", _init, reads=False),
    Flood("encoder", "batches of offers of unknown rooms", _batched(_init)),
    Flood("encoder", "batches of offers of unknown rooms, answers not read", _batched(_init), reads=False),
    Flood("encoder", "aborts with long reasons", _abort),
    Flood("encoder", "registrations", _register),
    Flood("encoder", "registrations of ever more sessions", _register_more),
    Flood("encoder", "nonsense", _same(b"nonsense")),
    Flood("encoder", "nonsense of 1 MiB", _same(bytes(1 << 20))),
    Flood("language", "heartbeats", _same(HEARTBEAT)),
    Flood("language", "announcements of unknown rooms", _announce),
    Flood("language", "batches of announcements of unknown rooms", _batched(_announce)),
    Flood("language", "grants of registrations", _registered),
    Flood("language", "refusals", _same(Refused(reason="no", kind=RefusalKind.REGISTER_FIRST))),
    Flood("language", "ends of unknown rooms", lambda peer: _drained()),
    Flood("language", "nonsense", _same(b"nonsense")),
    Flood("language", "nonsense of 2 MiB", _same(bytes(1 << 21))),
)


def _drained() -> Iterator[bytes]:
    while True:
        yield encode(Drained(room=new_room_base("0" * 16)))


@dataclass(frozen=True)
class Measured:
    """One flood: frames per second, median seconds of a healthy room without and with it, growth of the process."""

    side: str
    name: str
    rate: float
    before: float
    during: float
    growth_kb: int
    problem: str

    @property
    def ratio(self) -> float:
        return self.during / max(self.before, 1e-9)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


def room_times(ground: Ground, rooms: int) -> list[float]:
    """Seconds of ``rooms`` healthy rooms, one after another."""
    times = []
    for _ in range(rooms):
        began = time.monotonic()
        one_room(ground.world, ground.encoder, ground.language, TOKENS, DEADLINE)
        times.append(time.monotonic() - began)
    return times


@contextmanager
def flooding(ground: Ground, flood: Flood, peer: Any) -> Iterator[list[int]]:
    """The flood, on a thread of its own; yields how many frames it has sent."""
    sent, stop, failed = [0], threading.Event(), []

    def send() -> None:
        try:
            for frame in flood.frames(peer):
                if stop.is_set():
                    return
                arrived = peer.send([frame]) is not False
                sent[0] += arrived
                if not arrived or sent[0] % 50 == 0:
                    peer.read()
        except Stuck as error:
            failed.append(error)

    thread = threading.Thread(target=send, name="flood", daemon=True)
    thread.start()
    try:
        yield sent
    finally:
        stop.set()
        thread.join(60)
    assert not failed, str(failed[0])


def measure(ground: Ground, flood: Flood, rooms: int = ROOMS) -> Measured:
    """Play one flood. What is broken is in ``problem``."""
    wait_for(lambda: ground.encoder.stats()["sessions"] == 1, "the malicious peer before is forgotten")
    peer: Any = (
        ground.malicious_language(registers=True, reads=flood.reads)
        if flood.side == "encoder"
        else ground.malicious_encoder()
    )
    child = ground.children[flood.side]
    rate = before = during = 0.0
    growth = 0
    problem = ""
    try:
        if flood.side == "encoder":
            wait_for(lambda: child.stats()["sessions"] == 2, "the malicious peer is registered")
        quiet, beside, frames, seconds = room_times(ground, 1), [], 0, 0.0
        held, stones = Holdings.of(child), child.stats()["tombstones"]
        for _ in range(ROUNDS):
            quiet += room_times(ground, rooms // ROUNDS)
            with flooding(ground, flood, peer) as sent:
                began = time.monotonic()
                beside += room_times(ground, rooms // ROUNDS)
                time.sleep(max(0.0, began + 0.5 - time.monotonic()))
                frames, seconds = frames + sent[0], seconds + time.monotonic() - began
                growth = max(growth, Holdings.of(child).rss_kb - held.rss_kb)
                now = child.stats()
        before, during, rate = statistics.median(quiet), statistics.median(beside), frames / seconds
        spare = max(0, now["tombstones"] - stones + now.get("unclaimed", 0)) * TOMBSTONE_BYTES // 1024
        spare += READ_AHEAD * 2 * LIMIT // 1024  # the longest frames, read ahead
        if growth > RSS_MARGIN_KB + spare:
            problem = f"the {flood.side} process grew by {growth >> 10} MiB"
        if during > MOST_RATIO * max(before, FLOOR_SECONDS):
            problem = f"healthy rooms took {during:.3f} s, {before:.3f} s without"
        if "sessions" in now and now["sessions"] > 2:
            problem = f"one peer has {now['sessions'] - 1} sessions"
    except AssertionError as error:
        problem = str(error)
    finally:
        peer.close()
        ground.malicious_languages, ground.malicious_encoders = [], []
    return Measured(flood.side, flood.name, rate, before, during, growth, problem)
