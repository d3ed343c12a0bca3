"""A short soak on every run of the tests; and what a soak finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sglang_mm_conn.memory.segment import sweep_stale_segments
from tests.connector.processes import Zygote
from tests.faults.baseline import RSS_MARGIN_KB, Holdings
from tests.soak.plan import ENCODERS, LANGUAGES, Plan
from tests.soak.run import TOMBSTONE_BYTES, Sample, Soak, growth

PLAN = Plan("seed", 4000, ("0" * 16, "1" * 16), 60.0)
HELD = Holdings(rss_kb=100_000, descriptors=50, sockets=20, threads=40, mapped=1)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    process = Zygote()
    yield process
    process.close()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    sweep_stale_segments()


@pytest.mark.parametrize(("path", "rooms"), [("shm", 1500), ("mooncake", 600)])
def test_every_room_is_served_and_nothing_is_left(zygote: Zygote, directory: Path, path: str, rooms: int) -> None:
    soak = Soak(zygote, path, directory, "short", rooms)
    try:
        outcome = soak.play(lambda ended: None)
    finally:
        soak.close()
    assert not outcome.problems
    ended = outcome.ended
    assert ended["ended"] == rooms
    assert ended["right bytes"] + ended["given up by the language"] + ended["given up by the encoder"] == rooms
    assert ended["given up by the language"] and ended["given up by the encoder"]
    assert ended["larger than the pool, served"] > 5 and outcome.resumes > rooms and outcome.short > 0.3


def test_wrong_bytes_are_found(zygote: Zygote, directory: Path) -> None:
    soak = Soak(zygote, "shm", directory, "short", 100)
    original = soak.encoders[0].call

    def call(do: str, /, **args: object) -> object:
        if do == "soak":  # what this encoder sends is not what is expected
            args["plan"] = {**dict(args["plan"]), "shift": 1}  # type: ignore[call-overload]
        return original(do, **args)

    soak.encoders[0].call = call  # type: ignore[method-assign]
    try:
        outcome = soak.play(lambda ended: None)
    finally:
        soak.close()
    assert any("WRONG BYTES" in problem for problem in outcome.problems)


def test_all_processes_make_the_same_plan_and_every_room_belongs_to_one_pair() -> None:
    rooms = [PLAN.room(number) for number in range(PLAN.rooms)]
    assert [PLAN.room(number) for number in range(PLAN.rooms)] == rooms
    of_encoders = [room for index in range(ENCODERS) for room in PLAN.of(encoder=index)]
    of_languages = [room for index in range(LANGUAGES) for room in PLAN.of(language=index)]
    for part in (of_encoders, of_languages):
        assert sorted(room.number for room in part) == list(range(PLAN.rooms))
    assert len({room.part.room for room in rooms}) == PLAN.rooms
    aborted = Counter(room.aborted for room in rooms)
    assert len(aborted) == 5 and 0.07 < 1 - aborted[""] / PLAN.rooms < 0.13
    assert all(count > PLAN.rooms // 50 for count in Counter(room.size for room in rooms).values())


@pytest.mark.parametrize(
    ("change", "stones", "found"),
    [
        ({}, 0, False),
        ({"rss_kb": HELD.rss_kb + RSS_MARGIN_KB + 1}, 0, True),
        ({"rss_kb": HELD.rss_kb + RSS_MARGIN_KB + 1}, 1 + 1024 // TOMBSTONE_BYTES * 2, False),
        ({"descriptors": HELD.descriptors + 1}, 1000, True),
        ({"threads": HELD.threads + 1}, 1000, True),
    ],
)
def test_growth_is_what_is_held_more_at_the_end(change: dict[str, int], stones: int, found: bool) -> None:
    samples = [Sample("encoder 0", 1000, HELD, 10), Sample("encoder 0", 9000, replace(HELD, **change), 10 + stones)]
    assert bool(growth(samples, mooncake=False)) is found
