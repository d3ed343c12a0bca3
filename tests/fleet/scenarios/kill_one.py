"""Owns kill-one: one of two encoders is killed, and started again later, while clients ask."""

from __future__ import annotations

import time

from tests.fleet.fleet import USED_AGAIN_SECONDS, Fleet
from tests.fleet.outcome import Outcome, at_most

NAME = "kill-one"
WHAT = "SIGKILL of one of two encoders, which is started again later"
ENCODERS = 2


def run(fleet: Fleet) -> list[Outcome]:
    group = fleet.servers(ENCODERS)
    victim = group.encoders[-1]
    with fleet.load(group) as load:
        time.sleep(fleet.options.seconds)
        fleet.story.say(f"undisturbed: {load.tally()}")
        killed_at = fleet.kill(victim)
        time.sleep(fleet.options.seconds)
        fleet.story.say(f"killed: {load.tally(since=killed_at)}")
        used_after = fleet.seconds_until_used(victim, fleet.start(victim), load)
        time.sleep(fleet.options.seconds)
    goals = [at_most("used again after", used_after, USED_AGAIN_SECONDS)]
    return [fleet.outcome(NAME, f"{ENCODERS} encoders", load.tally(), goals)]
