"""Nothing grows: what rooms and connections take comes back when they end."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

from sglang_mm_conn.connector.language.endpoint import LanguageEndpoint
from sglang_mm_conn.connector.language.follower import FollowerEndpoint
from sglang_mm_conn.core.rooms import new_id
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.core.states import Poll
from sglang_mm_conn.memory.segment import DIRECTORY
from tests.connector.processes import BLOCK_SIZE, BLOCKS, Encoder, Language, World, wait_for
from tests.connector.worker_process import process_stats

ENCODER_TABLES = ("rooms", "sources", "listeners", "queued")
LANGUAGE_TABLES = ("rooms", "results", "labels", "unclaimed", "quarantine", "held", "quarantined")


def run_rooms(world: World, encoder: Encoder, language: Language, rooms: int, seed: int) -> int:
    """``rooms`` rooms, 10 % of them aborted somewhere on their way. Returns how many were aborted."""
    dice = random.Random(seed)
    aborted = 0
    for _ in range(rooms // 10):
        parts = [world.part(language, dice.choice([1, 50, BLOCKS * BLOCK_SIZE, 700])) for _ in range(10)]
        victim = dice.choice(parts)
        for part in parts:
            language.expect(part, encoder)
        for part in parts:
            encoder.announce(part)
            if part is not victim or dice.random() < 0.5:
                encoder.send(part)
            if part is victim:
                language.abort(part)
        for part in parts:
            if part is not victim or language.wait_end(part) is Poll.Success:
                language.succeeds(part)
            else:
                aborted += 1
                language.forget(part)
            encoder.wait_ended(part)
            encoder.call("forget", room=part.room)
    return aborted


def settled(child: Encoder | Language, tables: tuple[str, ...]) -> dict[str, Any]:
    """The process's numbers when all ``tables`` are empty."""
    wait_for(lambda: not any(child.stats()[table] for table in tables), f"{', '.join(tables)} are empty")
    return child.stats()


def test_300_rooms_with_aborts_leave_nothing_behind(world: World) -> None:
    encoder = world.encoder()
    language = world.language(encoder)
    run_rooms(world, encoder, language, 50, seed=1)  # threads, buffers and caches that come with the first use
    before = settled(encoder, ENCODER_TABLES), settled(language, LANGUAGE_TABLES)
    aborted = run_rooms(world, encoder, language, 300, seed=2)
    assert aborted >= 10
    language.wait_all_free()
    after = settled(encoder, ENCODER_TABLES), settled(language, LANGUAGE_TABLES)
    for was, now in zip(before, after, strict=True):
        # Neither per room nor per abort; a connection more or less in Mooncake's pool is none of these.
        assert now["threads"] <= was["threads"] and now["fds"] <= was["fds"] + 3
        assert now["tombstones"] - was["tombstones"] <= 300
        assert now["rss_kb"] - was["rss_kb"] < 64 << 10
    assert (after[0]["sessions"], after[0]["links"], after[0]["peers"]) == (1, 1, 1)
    assert after[1]["processes"] == 1


def test_language_processes_that_come_and_go_leave_nothing_behind_in_the_encoder(world: World) -> None:
    encoder = world.encoder()
    steady = world.language(encoder)

    def come_and_go() -> dict[str, Any]:
        for ending in ("kill", "close"):
            language = world.language(encoder)
            world.transfer(encoder, language)
            if ending == "close":
                language.call("close")
            language.kill()
        world.transfer(encoder, steady)
        wait_for(lambda: encoder.stats()["peers"] == 1, "the dead are dropped")
        return settled(encoder, ENCODER_TABLES)

    before = come_and_go()
    for _ in range(3):
        after = come_and_go()
    assert (after["sessions"], after["links"]) == (1, 1)
    # Mooncake keeps one descriptor per peer that vanished (measured: see the notes on the engine).
    spare = 0 if world.path == "shm" else 2 * 3 * 2
    assert after["fds"] <= before["fds"] + spare, (before, after)
    assert after["threads"] <= before["threads"]


def test_encoders_that_come_and_go_leave_nothing_behind_in_the_language_process(world: World) -> None:
    steady = world.encoder()
    language = world.language(steady)

    def come_and_go() -> dict[str, Any]:
        encoder = world.encoder()
        world.transfer(encoder, language)
        encoder.kill()
        wait_for(lambda: language.stats()["processes"] == 1, "the dead is dropped")
        world.transfer(steady, language)
        return settled(language, LANGUAGE_TABLES)

    before = come_and_go()
    for _ in range(8):
        after = come_and_go()
    spare = 0 if world.path == "shm" else 2 * 8
    assert after["fds"] <= before["fds"] + spare, (before, after)
    # Two pools start their threads when they are first needed: four that look encoders up, two copiers.
    assert after["threads"] <= before["threads"] + 4


def test_a_closed_language_process_leaves_no_segment_and_no_thread(shm_world: World) -> None:
    encoder = shm_world.encoder()
    language = shm_world.language(encoder)
    shm_world.transfer(encoder, language)
    segment = Path(DIRECTORY, language.hello["segment"])
    assert segment.exists()
    for child in (language, encoder):
        child.call("close")
        # Threads that look up encoders are told to end and not waited for: one may be in the middle of a look-up.
        wait_for(lambda child=child: child.call("threads") == [], "no thread is left")  # type: ignore[misc]
    assert not segment.exists()


def test_a_closed_language_endpoint_leaves_no_descriptor() -> None:
    def descriptors_after_one() -> int:
        endpoint = LanguageEndpoint(
            Settings(block_size=4, blocks=8, data_path="shm"), server=new_id(), host="127.0.0.1", dtype="float32",
            widest_row_bytes=32,
        )  # fmt: skip
        endpoint.close()
        endpoint.completions.notify()  # a room that ends late hurts nobody
        del endpoint
        gc.collect()  # the segment's mapping has one of its own
        return process_stats()["fds"]

    before = descriptors_after_one()
    assert [descriptors_after_one() for _ in range(3)] == [before] * 3


def test_a_closed_follower_leaves_no_descriptor() -> None:
    before = process_stats()["fds"]
    for _ in range(3):
        follower = FollowerEndpoint(Settings())
        follower.close()
        follower.completions.notify()  # work that ends late hurts nobody
    assert process_stats()["fds"] == before
