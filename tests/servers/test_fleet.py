"""The short form of `make fleet`: encoders end under load, and clients notice as little as can be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.fleet import USED_AGAIN_SECONDS, Fleet, Options, Story
from tests.fleet.load import questions
from tests.fleet.outcome import Outcome
from tests.fleet.scenarios import rolling_restart
from tests.fleet.scenarios.all_killed import Outage
from tests.fleet.scenarios.rolling_restart import Restart
from tests.servers.conftest import SharedGroups

KIND = "qwen2_5_vl"
ENCODERS = 2
BEFORE_AND_AFTER = 16  # answers


@dataclass
class Watched:
    """A fleet, and what is told of it."""

    fleet: Fleet
    told: list[str] = field(default_factory=list)

    def check(self, outcome: Outcome) -> None:
        assert not outcome.missed, "\n".join([*map(str, outcome.missed), *outcome.troubles, *self.told])


@pytest.fixture(scope="module")
def watched(
    shared_group: SharedGroups,
    reference: Callable[..., Any],
    tiny_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Watched]:
    told: list[str] = []

    def group(**options: Any) -> Any:
        return shared_group(KIND, **options)

    fleet = Fleet(
        group, shared_group.stop, reference(KIND).answer, Options(requests=0, seconds=3.0), Story(told.append),
        tmp_path_factory.mktemp("fleet"), tiny_model(KIND), questions(10),
    )  # fmt: skip
    yield Watched(fleet, told)
    shared_group.stop()  # not all are alive


def test_no_client_notices_that_an_encoder_is_restarted(watched: Watched) -> None:
    fleet = watched.fleet
    group = fleet.servers(ENCODERS)
    with fleet.load(group) as load:
        load.wait_for_more(BEFORE_AND_AFTER)
        restart = Restart(fleet, group.encoders[0], load)
        load.wait_for_more(BEFORE_AND_AFTER)
    watched.check(rolling_restart.outcome(fleet, load, [restart], f"{ENCODERS} encoders"))


def test_no_client_notices_a_killed_encoder_and_images_get_503_while_there_is_none(watched: Watched) -> None:
    fleet = watched.fleet
    group = fleet.servers(ENCODERS)
    with fleet.load(group) as load:
        load.wait_for_more(BEFORE_AND_AFTER)
        fleet.kill(group.encoders[1])
        load.wait_for_more(2 * BEFORE_AND_AFTER)
        fleet.story.say(f"one of two is left: {load.tally()}")
        outage = Outage(fleet, group, group.encoders[0], load)
        time.sleep(max(0.0, outage.ready_at + USED_AGAIN_SECONDS - time.monotonic()))
        load.wait_for_more(2 * BEFORE_AND_AFTER)
    watched.check(outage.outcome("all killed", f"{ENCODERS} encoders", load, []))
