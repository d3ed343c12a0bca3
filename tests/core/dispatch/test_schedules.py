"""No promise of dispatch is broken in random schedules with faults; a protection that is taken away is noticed."""

from __future__ import annotations

import secrets
from collections import Counter

import pytest

from tests.core.dispatch.mutations import MUTATIONS, without
from tests.core.dispatch.schedule import Schedule, play

SCHEDULES = 800
KINDS = {
    "posts", "posts again", "given up", "delivered", "input", "aborted", "error", "lost", "refused", "cut off",
    "drains", "stranger", "alive", "frozen", "draining", "erring", "refusing",
    "lost after delivery", "aborted, and waits", "loses every part",
}  # fmt: skip


@pytest.mark.parametrize("steady", [False, True])
def test_no_promise_is_broken_in_fresh_schedules_with_every_kind_of_fault(steady: bool) -> None:
    """With ``steady`` one encoder is always well: then nothing is given up before its tries are used up."""
    seed = secrets.token_hex(4)
    seen: Counter[str] = Counter()
    for number in range(SCHEDULES):
        happened, problem = play(f"{seed}:{number}", steady=steady)
        assert not problem, f"Schedule('{seed}:{number}', steady={steady}, log=print).run(): {problem}"
        seen += happened
    expected = KINDS - {"input", "aborted", "loses every part"} if steady else KINDS
    assert not {kind for kind in expected if seen[kind] < 20}, seen


@pytest.mark.parametrize("protection", MUTATIONS)
def test_schedules_notice_when_a_protection_is_taken_away(protection: str) -> None:
    with without(protection):
        assert any(play(f"proof:{number}", steady=number % 2 == 0)[1] for number in range(SCHEDULES))


def test_a_schedule_replays_exactly() -> None:
    first: list[str] = []
    second: list[str] = []
    for lines in (first, second):
        Schedule("again", log=lines.append).run()
    assert first == second and len(first) > 50
