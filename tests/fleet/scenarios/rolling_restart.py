"""Owns rolling-restart: encoders end by SIGTERM and come back, one after the other, while clients ask."""

from __future__ import annotations

import time

from sglang_mm_conn.demo.servers import Server
from tests.fleet.fleet import Fleet
from tests.fleet.load import Load
from tests.fleet.outcome import Goal, Outcome

NAME = "rolling-restart"
WHAT = "three encoders get SIGTERM and are started again, one after the other, for 1,000 requests and more"
ENCODERS = 3
ROUNDS = 2  # at least


def run(fleet: Fleet) -> list[Outcome]:
    group = fleet.servers(ENCODERS)
    restarts: list[Restart] = []
    with fleet.load(group) as load:
        time.sleep(fleet.options.seconds)
        fleet.story.say(f"undisturbed: {load.tally()}")
        while len(restarts) < ROUNDS * ENCODERS or load.tally().requests < fleet.options.requests:
            restarts += [Restart(fleet, encoder, load) for encoder in group.encoders]
            fleet.story.say(f"{len(restarts)} restarts: {load.tally()}")
        time.sleep(fleet.options.seconds)
    return [outcome(fleet, load, restarts, f"{ENCODERS} encoders")]


class Restart:
    """One restart of one encoder.

    Attributes:
        ended_after: seconds from SIGTERM to its end.
        by_itself: whether it ended without being killed.
        down: seconds from SIGTERM to its readiness.
    """

    def __init__(self, fleet: Fleet, encoder: Server, load: Load) -> None:
        began = time.monotonic()
        self.ended_after, self.by_itself = fleet.terminate(encoder)
        self.down = fleet.start(encoder) - began
        fleet.story.say(f"{encoder.name} was away for {self.down:.0f} s; {load.tally()}")


def outcome(fleet: Fleet, load: Load, restarts: list[Restart], servers: str) -> Outcome:
    ended = Goal(
        f"{sum(one.by_itself for one in restarts)} of {len(restarts)} ended by themselves",
        "all",
        all(one.by_itself for one in restarts),
    )
    tally = load.tally()
    goals = [ended]
    if fleet.options.requests:
        enough = tally.requests >= fleet.options.requests
        goals.append(Goal(f"{tally.requests} requests", f"at least {fleet.options.requests}", enough))
    figures = [
        f"{len(restarts)} restarts",
        f"from SIGTERM to the end {max(one.ended_after for one in restarts):.1f} s at most",
        f"away for {max(one.down for one in restarts):.0f} s at most",
    ]
    return fleet.outcome(NAME, servers, tally, goals, figures)
