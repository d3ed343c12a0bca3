"""One soak: its processes, what is watched while it runs, and what must hold at the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.connector.processes import Child, Encoder, Language, World, Zygote, wait_for
from tests.faults.baseline import Holdings
from tests.faults.processes import ENCODER_TABLES, LANGUAGE_TABLES, MOONCAKE_TIMEOUTS
from tests.soak.plan import BLOCK_SIZE, BLOCKS, ENCODERS, LANGUAGES, WIDTH, Plan

# A room that is not served within this has starved; it is far longer than any wait on a machine with other work.
ROOM_SECONDS = 120.0
# What is held is measured when this many rooms have ended (or a tenth of all), and at the end.
WARM_ROOMS = 1000
# Memory of one ended room's tombstone. There are at most 65,536 in a process.
TOMBSTONE_BYTES = 600
# Mooncake keeps connections in a pool: more than there ever were to the peers here.
MOONCAKE_CONNECTIONS = 64


@dataclass(frozen=True)
class Sample:
    """What one process held after so many rooms."""

    process: str
    rooms: int
    holdings: Holdings
    tombstones: int


@dataclass
class Outcome:
    """What a soak came to."""

    plan: Plan
    path: str
    seconds: float = 0.0
    ended: Counter[str] = field(default_factory=Counter)
    longest: dict[str, float] = field(default_factory=dict)
    resumes: int = 0
    short: float = 0.0  # share of looks at the pool that found no block free
    samples: list[Sample] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.ended["ended"] / max(self.seconds, 1e-9)

    def as_json(self) -> dict[str, Any]:
        values = {**vars(self), "plan": asdict(self.plan), "samples": [asdict(sample) for sample in self.samples]}
        return {**values, "rate": round(self.rate, 1)}


class Soak:
    """The processes of one soak."""

    def __init__(self, zygote: Zygote, path: str, directory: Path, seed: str, rooms: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.world = World(zygote, path, directory)
        settings: dict[str, Any] = {
            "blocks": BLOCKS, "block_size": BLOCK_SIZE, "width": WIDTH, "checksum": True, "env": MOONCAKE_TIMEOUTS,
            # Processes that have no processor for a while are not lost.
            "peer_timeout": 30.0, "claim_timeout": ROOM_SECONDS,
        }  # fmt: skip
        try:
            self.encoders: list[Encoder] = [
                self.world.encoder(send_timeout=ROOM_SECONDS, inline=number % 2 == 0, **settings)
                for number in range(ENCODERS)
            ]
            self.languages: list[Language] = [
                self.world.language(*self.encoders, inline=number % 2 == 0, **settings) for number in range(LANGUAGES)
            ]
        except BaseException:
            self.world.close()
            raise
        servers = tuple(str(language.config["server"]) for language in self.languages)
        self.outcome = Outcome(Plan(seed, rooms, servers, ROOM_SECONDS), path)

    @property
    def _named(self) -> list[tuple[str, Child]]:
        return [
            *((f"encoder {index}", encoder) for index, encoder in enumerate(self.encoders)),
            *((f"language {index}", language) for index, language in enumerate(self.languages)),
        ]

    def play(self, progress: Callable[[int], None]) -> Outcome:
        """Let all rooms pass. ``progress`` is told now and then how many have ended."""
        plan = self.outcome.plan
        began = time.monotonic()
        urls = [encoder.url for encoder in self.encoders]
        for index, language in enumerate(self.languages):
            language.call("soak", plan=plan.as_dict(), index=index, urls=urls)
        for index, encoder in enumerate(self.encoders):
            encoder.call("soak", plan=plan.as_dict(), index=index)
        warm = min(WARM_ROOMS, plan.rooms // 10)
        moments = [warm, *(plan.rooms * quarter // 4 for quarter in (1, 2, 3))]
        seen, changed = 0, time.monotonic()
        while True:
            reports = [child.call("soak_report") for _, child in self._named]
            ended = sum(report["ended"].get("ended", 0) for report in reports)
            if ended > seen:
                seen, changed = ended, time.monotonic()
            progress(ended)
            while moments and ended >= moments[0]:
                del moments[0]
                self._sample(ended)
            stuck = time.monotonic() - changed > 2 * ROOM_SECONDS
            if all(report["finished"] for report in reports) or stuck:
                break
            time.sleep(0.5)
        self.outcome.seconds = time.monotonic() - began
        if stuck:
            self.outcome.problems.append(f"nothing ended for {2 * ROOM_SECONDS:g} s, {ended} rooms had")
        for report in reports:
            self._add(report)
        self._check_the_end()
        return self.outcome

    def _add(self, report: dict[str, Any]) -> None:
        outcome = self.outcome
        outcome.ended.update(report["ended"])
        outcome.problems += report["problems"]
        outcome.resumes += report.get("resumes", 0)
        if "looks" in report:
            outcome.short += report["short"] / max(1, report["looks"]) / LANGUAGES
        for size, seconds in report.get("longest", {}).items():
            outcome.longest[size] = max(outcome.longest.get(size, 0.0), seconds)

    def _sample(self, rooms: int) -> None:
        for name, child in self._named:
            self.outcome.samples.append(Sample(name, rooms, Holdings.of(child), child.stats()["tombstones"]))

    def _check_the_end(self) -> None:
        outcome = self.outcome
        if outcome.ended["ended"] != outcome.plan.rooms:
            outcome.problems.append(f"{outcome.ended['ended']} of {outcome.plan.rooms} rooms ended")
        try:
            for language in self.languages:
                language.wait_all_free()
            for name, child in self._named:
                tables = ENCODER_TABLES if name.startswith("encoder") else LANGUAGE_TABLES

                def left(child: Child = child, tables: tuple[str, ...] = tables) -> dict[str, Any]:
                    stats = child.stats()
                    return {table: stats[table] for table in tables if stats[table]}

                wait_for(lambda left=left: not left(), f"the tables of {name} are empty")  # type: ignore[misc]
        except AssertionError as error:
            outcome.problems.append(f"LEAK: {error}")
        self._sample(outcome.ended["ended"])
        outcome.problems += growth(outcome.samples, mooncake=outcome.path == "mooncake")

    def close(self) -> None:
        self.world.close()


def growth(samples: list[Sample], *, mooncake: bool) -> list[str]:
    """What a process holds more at the end than at its first sample. Tombstones are bounded, and their memory with
    them, but not all there in the beginning."""
    problems = []
    for name in dict.fromkeys(sample.process for sample in samples):
        mine = [sample for sample in samples if sample.process == name]
        first, last = mine[0], mine[-1]
        stones = max(0, last.tombstones - first.tombstones)
        pooled = MOONCAKE_CONNECTIONS if mooncake else 0
        allowed = replace(
            first.holdings,
            rss_kb=first.holdings.rss_kb + stones * TOMBSTONE_BYTES // 1024,
            descriptors=first.holdings.descriptors + pooled,
            sockets=first.holdings.sockets + pooled,
        )
        problems += [f"GROWTH: {name}: {text}" for text in last.holdings.growth(allowed, vanished=0, mooncake=mooncake)]
    return problems
