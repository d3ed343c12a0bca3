"""The watch over encoders: whom it tells, and when."""

from __future__ import annotations

from functools import partial

from sglang_mm_conn.connector.language.encoder_watch import EncoderWatch
from sglang_mm_conn.core.dispatch.encoders import EncoderStatus

Statuses = list[EncoderStatus]


def status(load: int = 0) -> Statuses:
    return [EncoderStatus("http://a:1", True, load=load)]


def test_without_a_watcher_nothing_is_looked_at() -> None:
    def statuses() -> Statuses:
        raise AssertionError

    EncoderWatch().look(statuses, 1.0)


def test_a_watcher_is_told_at_each_change_and_once_a_second() -> None:
    watch = EncoderWatch()
    told: list[tuple[float, Statuses]] = []
    now = 100.0
    watch.watcher = lambda encoders: told.append((round(now - 100.0, 2), encoders))
    for tick in range(250):
        now = 100.0 + tick / 100
        current = status(7 if 30 <= tick < 150 else 0)
        watch.look(partial(list, current), now)
    assert told == [
        (0.0, status()),
        (0.3, status(7)),
        (1.3, status(7)),
        (1.5, status()),
    ]


def test_a_watcher_that_comes_late_is_told_at_once() -> None:
    watch = EncoderWatch()
    watch.look(status, 5.0)
    told: list[Statuses] = []
    watch.watcher = told.append
    watch.look(status, 5.1)
    watch.look(lambda: [], 5.2)
    assert told == [status(), []]
