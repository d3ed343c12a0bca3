"""Owns healthy: what all of this costs when nothing is wrong, beside an older checkout, in turns."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from sglang_mm_conn.demo.servers import ServerGroup
from tests.connector.processes import ROOT
from tests.fleet.fleet import LANGUAGE_FLAGS, Fleet, FleetError
from tests.fleet.load import CLIENTS, play
from tests.fleet.outcome import Outcome, at_least, at_most
from tests.fleet.tally import Tally

NAME = "healthy"
WHAT = "two healthy encoders: requests/s and the time alone, this tree beside --baseline, in turns"
THIS, OLDER = "this tree", "the older checkout"
TURNS = 4  # of each
# Turns of the same code differ by about so much on two busy cores.
LEAST_RATE, MOST_ALONE = 0.95, 1.05
SERVERS = "2 encoders"


def run(fleet: Fleet) -> list[Outcome]:
    baseline = fleet.options.baseline
    if baseline is None:
        return [Outcome(NAME, SERVERS, skipped="there is no --baseline to compare with")]
    fleet.learn(fleet.asked)
    fleet.reset()
    with ExitStack() as stack:
        groups = {
            THIS: _group(fleet, "this", ROOT),
            OLDER: _group(fleet, "older", baseline),
        }
        for name, group in groups.items():
            fleet.story.say(f"{name}: two encoders and a language server: starting")
            stack.enter_context(group)
        return [_compare(fleet, groups)]


def environment(checkout: Path) -> dict[str, str]:
    """With which a Python process has the package of this checkout, and all else as here. Raises FleetError where it
    has another one."""
    others = [one for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]
    path = os.pathsep.join([str(checkout.resolve()), *others])
    # Otherwise `python -m` looks into the working directory first.
    found = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    code = "import sglang_mm_conn; print(sglang_mm_conn.__file__)"
    said = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **found}, capture_output=True, text=True, check=False
    ).stdout.strip()
    if not Path(said).is_relative_to(checkout.resolve()):
        raise FleetError(f"--baseline {checkout}: Python finds {said or 'nothing'} in place of its sglang_mm_conn")
    return found


def _group(fleet: Fleet, name: str, checkout: Path) -> ServerGroup:
    env = {**fleet.env, **environment(checkout)}
    directory = fleet.directory / f"healthy-{name}"
    return ServerGroup(fleet.model, directory, encoders=2, env=env, language_flags=LANGUAGE_FLAGS)


def _compare(fleet: Fleet, groups: dict[str, ServerGroup]) -> Outcome:
    count = max(2 * CLIENTS, fleet.options.requests // 2)
    together: dict[str, list[Tally]] = {name: [] for name in groups}
    alone: dict[str, list[Tally]] = {name: [] for name in groups}
    for name, group in groups.items():
        fleet.story.say(f"{name}, not counted: {_ask(fleet, group, 2 * CLIENTS, CLIENTS)}")
    for number in range(TURNS):
        # Each of them is the first one in every other turn.
        for name in (THIS, OLDER) if number % 2 == 0 else (OLDER, THIS):
            alone[name].append(_ask(fleet, groups[name], count // 5, 1))
            together[name].append(_ask(fleet, groups[name], count, CLIENTS))
            rate, median = together[name][-1].rate, alone[name][-1].median
            fleet.story.say(f"turn {number + 1}: {name}: {rate:.2f} requests/s, alone {median * 1e3:.0f} ms")
    rates = {name: statistics.median(one.rate for one in turns) for name, turns in together.items()}
    times = {name: statistics.median(one.median for one in turns) for name, turns in alone.items()}
    every = [*together[THIS], *alone[THIS]]
    goals = [
        at_least(f"requests/s with {CLIENTS} clients, times the older:", rates[THIS] / rates[OLDER], LEAST_RATE),
        at_most("time alone, times the older:", times[THIS] / times[OLDER], MOST_ALONE, ""),
    ]
    figures = [f"{name}: {rates[name]:.2f} requests/s, alone {times[name] * 1e3:.0f} ms" for name in groups]
    return fleet.outcome(NAME, SERVERS, sum(every[1:], every[0]), goals, figures)


def _ask(fleet: Fleet, group: ServerGroup, count: int, clients: int) -> Tally:
    return play([group.language.url], fleet.asked, fleet.right, count=count, clients=clients)
