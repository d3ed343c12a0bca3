"""Owns freeze: one of two encoders stops for longer than the peer timeout, and goes on, while clients ask."""

from __future__ import annotations

import signal
import time

from sglang_mm_conn.demo.servers import Server
from tests.fleet.fleet import PEER_TIMEOUT, Fleet
from tests.fleet.outcome import Outcome, at_most
from tests.servers.observe import encodes_begun

NAME = "freeze"
WHAT = "SIGSTOP of one of two encoders for 30 s, then SIGCONT"
ENCODERS = 2
TIMES_ALONE = 3


def run(fleet: Fleet) -> list[Outcome]:
    group = fleet.servers(ENCODERS)
    victim = group.encoders[-1]
    with fleet.load(group) as load:
        time.sleep(2 * fleet.options.seconds)
        frozen_at = time.monotonic()
        alone = load.tally(until=frozen_at - 1)
        fleet.story.say(f"undisturbed: {alone}")
        goes_on_at = freeze(fleet, victim, fleet.options.frozen)
        fleet.story.say(f"frozen: {load.tally(since=frozen_at)}")
        time.sleep(1)  # what was on its way to it is no sign of trust
        used_after = fleet.seconds_until_used(victim, goes_on_at, load, before=encodes_begun(victim))
        time.sleep(fleet.options.seconds)
    tally = load.tally()
    most = PEER_TIMEOUT + TIMES_ALONE * alone.slowest
    goals = [at_most("slowest answer", tally.slowest, most)]
    figures = [
        f"undisturbed under the same load: slowest {alone.slowest:.2f} s, median {alone.median:.2f} s",
        f"used again {used_after:.1f} s after SIGCONT",
    ]
    return [fleet.outcome(NAME, f"{ENCODERS} encoders", tally, goals, figures)]


def freeze(fleet: Fleet, server: Server, seconds: float) -> float:
    """Returns the moment at which it went on."""
    server.signal(signal.SIGSTOP)
    fleet.story.event(f"{server.name} frozen")
    try:
        time.sleep(seconds)
    finally:
        server.signal(signal.SIGCONT)
    return fleet.story.event(f"{server.name} goes on")
