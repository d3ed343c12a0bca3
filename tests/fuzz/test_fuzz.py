"""The fuzz and the floods hold in short on every run of the tests, and they find what they say they find."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_mm_conn.core.errors import ProtocolError
from sglang_mm_conn.core.messages import Heartbeat, decode_from_encoder, decode_from_language, encode
from sglang_mm_conn.memory.segment import sweep_stale_segments
from tests.connector.processes import Zygote
from tests.fuzz.flood import FLOODS, Flood, measure
from tests.fuzz.frames import Frames, Knowledge
from tests.fuzz.run import Ground, fuzz

FRAMES = 3000


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    process = Zygote()
    yield process
    process.close()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    sweep_stale_segments()


@pytest.mark.parametrize("with_key", [False, True])
def test_malicious_peers_hurt_nobody_and_leave_nothing(zygote: Zygote, directory: Path, with_key: bool) -> None:
    seed = str(time.time_ns())
    outcome = fuzz(zygote, directory, seed, FRAMES, with_key=with_key)
    assert not outcome.problem, f"seed {seed}: {outcome.problem}"
    assert outcome.frames >= FRAMES and outcome.rooms > 10 and outcome.answers > 100


@pytest.mark.parametrize(
    ("side", "harm", "found"),
    [
        ("encoder", "thread", "a thread of the encoder process ended: mm-conn-embedding"),
        ("language", "thread", "a thread of the language process ended: mm-conn-embedding"),
        ("encoder", "bytes", "WRONG BYTES"),
        ("language", "memory", "GROWTH of the language process: rss_kb"),
        ("encoder", "descriptors", "GROWTH of the encoder process: descriptors"),
    ],
)
def test_the_fuzz_notices(zygote: Zygote, directory: Path, side: str, harm: str, found: str) -> None:
    batches = itertools.count()

    def after_batch(ground: Ground) -> None:
        if next(batches) == 8:  # after the first tenth, which what is held is compared with
            ground.children[side].call("harm", kind=harm)
            time.sleep(0.5)
            ground.check()

    outcome = fuzz(zygote, directory, "harm", 1500, with_key=False, after_batch=after_batch)
    assert found in outcome.problem


@pytest.mark.parametrize(
    "name",
    [
        "offers of unknown rooms, answers not read", "registrations of ever more sessions",
        "announcements of unknown rooms", "nonsense of 2 MiB",
    ],
)  # fmt: skip
def test_a_flood_does_not_starve_others(zygote: Zygote, directory: Path, name: str) -> None:
    (flood,) = (flood for flood in FLOODS if flood.name == name)
    ground = Ground(zygote, directory, "flood", with_key=False)
    try:
        measured = measure(ground, flood, rooms=15)
    finally:
        ground.close()
    assert not measured.problem and measured.rate > 20


def test_growth_in_a_flood_is_found(zygote: Zygote, directory: Path) -> None:
    ground = Ground(zygote, directory, "flood", with_key=False)

    def frames(peer: object) -> Iterator[bytes]:
        ground.encoder.call("harm", kind="memory")
        yield from itertools.repeat(encode(Heartbeat(incarnation="flood")))

    try:
        measured = measure(ground, Flood("encoder", "with a leak", frames), rooms=5)
    finally:
        ground.close()
    assert "the encoder process grew by" in measured.problem


def test_a_seed_gives_the_same_frames_again_and_all_kinds_of_them() -> None:
    def frames(seed: int) -> list[list[bytes]]:
        made = Frames(random.Random(seed), Knowledge(), 100)
        return [parts for _ in range(2000) for parts in (made.to_encoder(), made.to_language())]

    first = frames(1)
    assert first == frames(1) != frames(2)
    kinds: dict[str, set[str]] = {"to encoder": set(), "to language": set()}
    refused = 0
    for number, parts in enumerate(first):
        decode, side = ((decode_from_language, "to encoder"), (decode_from_encoder, "to language"))[number % 2]
        for frame in parts:
            try:
                kinds[side].add(type(decode(frame, 1 << 20)).__name__)
            except ProtocolError:
                refused += 1
    assert len(kinds["to encoder"]) >= 5 and len(kinds["to language"]) == 8
    assert len(first) // 10 < refused < len(first)
    assert any(len(parts) > 1 for parts in first) and any(parts == [b""] for parts in first)
