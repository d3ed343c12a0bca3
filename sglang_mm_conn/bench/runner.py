"""Carries out a plan: for every size the rounds of all transports, interleaved, and then the special cases.

Interleaved rounds let other load on the machine affect all transports alike.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sglang_mm_conn.bench.cpu_cost import seconds_per_room, seconds_per_wake
from sglang_mm_conn.bench.measurement import BASELINE, quantile, rooms_per_second, rows
from sglang_mm_conn.bench.payload import PayloadFile
from sglang_mm_conn.bench.process_pair import Pair, warm_up
from sglang_mm_conn.bench.records import Result
from sglang_mm_conn.bench.sizes import KIB, MIB, effort, show_size
from sglang_mm_conn.bench.transports import BUILTIN, CONNECTOR, TransportVariant
from sglang_mm_conn.bench.transports.base import Config

Say = Callable[[str, float], None]  # progress: what is measured now, and the share of the plan that is done

FEW_UNCLAIMED, MANY_UNCLAIMED = 10, 1000
# Threads that a room's last message wakes beyond the one that memcpy wakes too (the reader at the other end): the
# encoder's control thread, a libzmq thread in each process, and the language process's control thread.
WAKES = 4


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    transports: tuple[TransportVariant, ...]
    sizes: tuple[int, ...]
    rounds: int
    width: int = 4096
    block_size: int = 128
    quick: bool = False
    special: bool = True
    device: str = "cpu"  # where embeddings start and end


@dataclass(frozen=True)
class Special:
    """A special case: two figures of one transport, and ``ratio``, the second over the first."""

    what: str
    transport: str
    unit: str
    one: float
    other: float

    @property
    def ratio(self) -> float:
        return self.other / self.one

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


@dataclass(frozen=True)
class BenchResult:
    """What has been measured so far."""

    results: list[Result] = field(default_factory=list)
    specials: list[Special] = field(default_factory=list)
    engine_slices: dict[int, int] = field(default_factory=dict)  # by size: the fastest slice of `engine`, in bytes


def carry_out(plan: Plan, say: Say, outcome: BenchResult) -> None:
    """Measure, and add to ``outcome`` meanwhile.

    Raises BenchError where a transport does not start, fails, or delivers wrong bytes.
    """
    from sglang_mm_conn.control.authentication import generate

    warm_up(builtin=any(transport.base in BUILTIN for transport in plan.transports), device=plan.device)
    with tempfile.TemporaryDirectory(prefix="sglang-mm-conn-bench-") as directory:
        key_file = str(Path(directory) / "key")
        generate(key_file)
        steps = len(plan.sizes) + bool(plan.special)
        for number, nbytes in enumerate(plan.sizes):
            _one_size(plan, nbytes, key_file, outcome, _share(say, number, steps))
        if plan.special:
            _special_cases(plan, key_file, outcome, _share(say, steps - 1, steps))


def _share(say: Say, step: int, steps: int) -> Say:
    """``say`` for one of ``steps`` steps: its share of the step becomes a share of the plan."""
    return lambda text, part: say(text, (step + part) / steps)


def _one_size(plan: Plan, nbytes: int, key_file: str, outcome: BenchResult, say: Say) -> None:
    work = effort(nbytes, quick=plan.quick)
    in_flight = max([1, *(in_flight for in_flight, _ in work.concurrent)])
    config = Config(nbytes, plan.width, in_flight, plan.block_size, device=plan.device)
    payload = PayloadFile(nbytes * in_flight)
    with ExitStack() as stack:
        stack.callback(payload.close)
        say(f"{show_size(nbytes)}: starting {2 * len(plan.transports)} processes", 0.0)
        pairs = []
        for transport in plan.transports:
            pair = Pair(transport, config, (payload.path, nbytes, in_flight), key_file)
            stack.callback(pair.close)
            pairs.append(pair)
        for pair in pairs:
            pair.start()
            if pair.facts.get("slice_bytes"):
                outcome.engine_slices[nbytes] = min(nbytes, pair.facts["slice_bytes"])
        for pair in pairs:
            pair.run(min(2, work.singles), nbytes)  # warms up: what only the first rooms cost is a special case
        for number in range(plan.rounds):
            order = pairs[number % len(pairs) :] + pairs[: number % len(pairs)]
            for place, pair in enumerate(order):
                done = (number + place / len(order)) / plan.rounds
                say(f"{show_size(nbytes)}, round {number + 1} of {plan.rounds}: {pair.transport.name}", done)
                outcome.results.append(pair.run(work.singles, nbytes, round_number=number))
                for in_flight, count in work.concurrent:
                    outcome.results.append(pair.run(count, nbytes, in_flight, number))


def _special_cases(plan: Plan, key_file: str, outcome: BenchResult, say: Say) -> None:
    """Those of the planned transports without variations: of this connector all cases, of memcpy the first use."""
    transports = [
        transport
        for transport in plan.transports
        if transport.base in (BASELINE, *CONNECTOR) and not transport.variations
    ]
    outcome.specials.extend(_small_rooms(plan, outcome))
    for number, transport in enumerate(transports):
        if transport.base in CONNECTOR:
            say(f"{transport.name}: one room among unclaimed rooms", 0.5 * number / len(transports))
            outcome.specials.extend(_among_unclaimed(plan, transport, key_file))
    outcome.specials.extend(_first_use(plan, transports, key_file, lambda text, part: say(text, 0.5 + 0.5 * part)))


def _small_rooms(plan: Plan, outcome: BenchResult) -> list[Special]:
    """Two estimates of what small rooms over shm can reach, each beside what they reach.

    rooms/s: the time per room of concurrent memcpy (the benchmark's own work is in it), plus the CPU time of the
    protocol logic on the side that has more of it. Latency: that of memcpy, plus the time to wake WAKES threads.
    """
    nbytes, row_bytes = 64 * KIB, plan.width * 2
    bound, reached = (rooms_per_second(outcome.results, nbytes, transport) for transport in (BASELINE, "shm"))
    if bound is None or reached is None:
        return []
    estimate = 1 / (1 / bound + max(seconds_per_room(2000, max(1, nbytes // row_bytes), row_bytes)))
    what = "64 KiB rooms/s (estimate from memcpy and the CPU time of the protocol logic, measured)"
    specials = [Special(what, "shm", "rooms/s", estimate, reached)]
    alone = {row.transport: row.median_ms for row in rows(one for one in outcome.results if one.nbytes == nbytes)}
    what = f"64 KiB room, p50 (estimate from memcpy and {WAKES} thread wake-ups, measured)"
    waking = WAKES * seconds_per_wake(300) * 1e3
    return [*specials, Special(what, "shm", "ms", alone[BASELINE] + waking, alone["shm"])]


def _among_unclaimed(plan: Plan, transport: TransportVariant, key_file: str) -> list[Special]:
    nbytes = 64 * KIB
    rooms, rounds = 100, 5 if plan.quick else max(10, plan.rounds)  # 500 rooms and more: the p99 is not the slowest
    config = Config(nbytes=nbytes, width=plan.width, in_flight=1, block_size=plan.block_size)
    payload = PayloadFile(nbytes)
    seconds: dict[int, list[float]] = {FEW_UNCLAIMED: [], MANY_UNCLAIMED: []}
    with ExitStack() as stack:
        stack.callback(payload.close)
        pairs = {}
        for unclaimed in seconds:
            pairs[unclaimed] = stack.enter_context(Pair(transport, config, (payload.path, nbytes, 1), key_file))
            pairs[unclaimed].run(5, nbytes)
            pairs[unclaimed].park(unclaimed, nbytes)
        for _ in range(rounds):
            for unclaimed, pair in pairs.items():
                seconds[unclaimed] += pair.run(rooms, nbytes).seconds
    what = f"({FEW_UNCLAIMED} unclaimed rooms, {MANY_UNCLAIMED})"
    few, many = seconds[FEW_UNCLAIMED], seconds[MANY_UNCLAIMED]
    return [
        Special(
            f"64 KiB room, p50 {what}",
            transport.name,
            "ms",
            statistics.median(few) * 1e3,
            statistics.median(many) * 1e3,
        ),
        Special(
            f"64 KiB room, p99 {what}", transport.name, "ms", quantile(few, 0.99) * 1e3, quantile(many, 0.99) * 1e3
        ),
    ]


def _first_use(plan: Plan, transports: Sequence[TransportVariant], key_file: str, say: Say) -> list[Special]:
    """The first room in a new pool, after smaller rooms in the same processes; and the first room of new processes.

    The repeats of the transports are interleaved, as rounds are.
    """
    nbytes = 16 * MIB
    config = Config(nbytes=nbytes, width=plan.width, in_flight=1, block_size=plan.block_size)
    payload = PayloadFile(nbytes)
    cases = {"first in a new pool after four of 4 MiB": 4, "first of new processes": 0}
    first: dict[tuple[TransportVariant, str], list[float]] = defaultdict(list)
    later: dict[tuple[TransportVariant, str], list[float]] = defaultdict(list)
    repeats = 9 if plan.quick else 15
    with ExitStack() as stack:
        stack.callback(payload.close)
        for number in range(repeats):
            say("first use of a pool and of processes", number / repeats)
            for transport, (case, small_ones) in itertools.product(transports, cases.items()):
                with Pair(transport, config, (payload.path, nbytes, 1), key_file) as pair:
                    for _ in range(small_ones):
                        pair.run(1, 4 * MIB)
                    first[transport, case] += pair.run(1, nbytes).seconds
                    later[transport, case] += pair.run(8, nbytes).seconds
    return [
        Special(
            f"16 MiB room, p50 (next eight, {case})", transport.name, "ms",
            statistics.median(later[transport, case]) * 1e3, statistics.median(first[transport, case]) * 1e3,
        )
        for transport, case in first
    ]  # fmt: skip
