"""Owns the list of scenarios, in the order in which they are played: neighbours share their servers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from tests.fleet.fleet import Fleet
from tests.fleet.outcome import Outcome
from tests.fleet.scenarios import (
    affinity,
    all_killed,
    bad_encoders,
    bench_serving,
    freeze,
    healthy,
    kill_one,
    network_cut,
    poison,
    rolling_restart,
    slow_encoder,
)


@dataclass(frozen=True)
class Scenario:
    """One scenario: its name for --only, a line for --help, and the function that plays it."""

    name: str
    what: str
    run: Callable[[Fleet], list[Outcome]]


def _of(module: ModuleType) -> Scenario:
    return Scenario(module.NAME, module.WHAT, module.run)


SCENARIOS = tuple(
    map(
        _of,
        (
            rolling_restart,
            kill_one,
            freeze,
            all_killed,
            bad_encoders,
            network_cut,
            poison,
            slow_encoder,
            affinity,
            healthy,
            bench_serving,
        ),
    )
)
