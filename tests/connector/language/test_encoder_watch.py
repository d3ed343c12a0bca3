"""The watch over encoders: whom it tells, and when."""

from __future__ import annotations

from functools import partial

from sglang_mm_conn.connector.language.encoder_watch import EncoderWatch
from sglang_mm_conn.core.dispatch.fleet import EncoderStanding

Standings = list[EncoderStanding]


def standing(load: int = 0) -> Standings:
    return [EncoderStanding("http://a:1", True, load=load)]


def test_without_a_watcher_nothing_is_looked_at() -> None:
    def standings() -> Standings:
        raise AssertionError

    EncoderWatch().look(standings, 1.0)


def test_a_watcher_is_told_at_each_change_and_once_a_second() -> None:
    watch = EncoderWatch()
    told: list[tuple[float, Standings]] = []
    now = 100.0
    watch.watcher = lambda encoders: told.append((round(now - 100.0, 2), encoders))
    for tick in range(250):
        now = 100.0 + tick / 100
        current = standing(7 if 30 <= tick < 150 else 0)
        watch.look(partial(list, current), now)
    assert told == [
        (0.0, standing()),
        (0.3, standing(7)),
        (1.3, standing(7)),
        (1.5, standing()),
    ]


def test_a_watcher_that_comes_late_is_told_at_once() -> None:
    watch = EncoderWatch()
    watch.look(standing, 5.0)
    told: list[Standings] = []
    watch.watcher = told.append
    watch.look(standing, 5.1)
    watch.look(lambda: [], 5.2)
    assert told == [standing(), []]
