"""Tombstones: bounded, and dropped when they expire."""

from __future__ import annotations

from sglang_mm_conn.core.outcomes import Outcome
from sglang_mm_conn.core.tombstones import Tombstones


def test_an_outcome_is_kept_until_its_time_and_not_longer() -> None:
    stones = Tombstones()
    stones.put("a", Outcome("why", 502), until=10.0)
    stones.sweep(9.9)
    assert "a" in stones and stones.get("a") == Outcome("why", 502)
    stones.sweep(10.0)
    assert "a" not in stones and stones.get("a") is None


def test_they_are_bounded_and_the_oldest_go_first() -> None:
    stones = Tombstones(limit=3)
    for number in range(10):
        stones.put(str(number), Outcome("", 200), until=100.0)
        assert len(stones) <= 3
    assert [str(number) in stones for number in range(10)] == [False] * 7 + [True] * 3


def test_a_second_outcome_replaces_the_first_and_counts_as_the_youngest() -> None:
    stones = Tombstones(limit=2)
    stones.put("a", Outcome("first", 500), until=5.0)
    stones.put("b", Outcome("", 200), until=6.0)
    stones.put("a", Outcome("second", 499), until=7.0)
    assert len(stones) == 2
    stones.put("c", Outcome("", 200), until=8.0)
    assert "b" not in stones and stones.get("a") == Outcome("second", 499)


def test_the_default_limit_holds() -> None:
    stones = Tombstones()
    for number in range(70_000):
        stones.put(str(number), Outcome("", 200), until=1.0)
    assert len(stones) == 65536


def test_a_reason_as_long_as_a_message_allows_is_kept_in_short() -> None:
    stones = Tombstones()
    stones.put("a", Outcome("r" * 4096, 499), until=1.0)
    kept = stones.get("a")
    assert kept is not None and len(kept.reason) == 200 and kept.code == 499
