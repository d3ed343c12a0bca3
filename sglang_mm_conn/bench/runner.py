"""The order of a benchmark: for every size all transports are open at once and take turns in rounds, so that whatever
else the machine does hits all alike; then the special cases."""

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
from sglang_mm_conn.bench.measurement import LIMIT, quantile, rooms_per_second, rows
from sglang_mm_conn.bench.payload import PayloadFile
from sglang_mm_conn.bench.process_pair import Pair, warm_up
from sglang_mm_conn.bench.records import Result
from sglang_mm_conn.bench.sizes import KIB, MIB, effort, show_size
from sglang_mm_conn.bench.transports import BUILTIN, CONNECTOR, TransportVariant
from sglang_mm_conn.bench.transports.base import Config

Say = Callable[[str, float], None]  # what is done now, and which part of the whole is done already

FEW_UNCLAIMED, MANY_UNCLAIMED = 10, 1000
# A room's last message: control thread, a thread of libzmq at each end, control thread, whoever waits for the room. A
# write at once by the caller is before all of them; memcpy has the last one too.
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
    device: str = "cpu"  # where embeddings begin and end


@dataclass(frozen=True)
class Special:
    """A case of its own: two figures of one transport that are compared."""

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
    pieces: dict[int, int] = field(default_factory=dict)  # by size: the piece that suited the engine best


def carry_out(plan: Plan, say: Say, outcome: BenchResult) -> None:
    """Adds to ``outcome`` as it goes. Raises BenchError where a transport does not start, fails, or delivers wrong
    bytes."""
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
    """Tells of one step's progress as of a part of the whole."""
    return lambda text, part: say(text, (step + part) / steps)


def _one_size(plan: Plan, nbytes: int, key_file: str, outcome: BenchResult, say: Say) -> None:
    work = effort(nbytes, quick=plan.quick)
    in_flight = max([1, *(in_flight for in_flight, _ in work.flows)])
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
            if pair.facts.get("piece"):
                outcome.pieces[nbytes] = min(nbytes, pair.facts["piece"])
        for pair in pairs:
            pair.run(min(2, work.singles), nbytes)  # whatever happens once only is not measured here
        for number in range(plan.rounds):
            order = pairs[number % len(pairs) :] + pairs[: number % len(pairs)]
            for turn, pair in enumerate(order):
                done = (number + turn / len(order)) / plan.rounds
                say(f"{show_size(nbytes)}, round {number + 1} of {plan.rounds}: {pair.transport.name}", done)
                outcome.results.append(pair.run(work.singles, nbytes, round_number=number))
                for in_flight, count in work.flows:
                    outcome.results.append(pair.run(count, nbytes, in_flight, number))


def _special_cases(plan: Plan, key_file: str, outcome: BenchResult, say: Say) -> None:
    """Of this connector's transports that are measured at all, without variations; of memcpy the first use of its
    memory."""
    transports = [
        transport for transport in plan.transports if transport.base in (LIMIT, *CONNECTOR) and not transport.variations
    ]
    outcome.specials.extend(_small_rooms(plan, outcome))
    for number, transport in enumerate(transports):
        if transport.base in CONNECTOR:
            say(f"{transport.name}: one room among unclaimed rooms", 0.5 * number / len(transports))
            outcome.specials.extend(_among_unclaimed(plan, transport, key_file))
    outcome.specials.extend(_first_use(plan, transports, key_file, lambda text, part: say(text, 0.5 + 0.5 * part)))


def _small_rooms(plan: Plan, outcome: BenchResult) -> list[Special]:
    """How close flows of small rooms come to an estimate of what their logic leaves time for: what a room takes in
    concurrent memcpy (to be made, named, copied and compared), and the logic of the side that has more of it. And one
    alone to memcpy's time with the threads woken that pass its last message on, of which memcpy has one.
    """
    nbytes, row_bytes = 64 * KIB, plan.width * 2
    limit, whole = (rooms_per_second(outcome.results, nbytes, transport) for transport in (LIMIT, "shm"))
    if limit is None or whole is None:
        return []
    estimate = 1 / (1 / limit + max(seconds_per_room(2000, max(1, nbytes // row_bytes), row_bytes)))
    what = (
        "64 KiB rooms/s, estimate for concurrent memcpy with the cores and the codec in it, compared with those reached"
    )
    specials = [Special(what, "shm", "rooms/s", estimate, whole)]
    alone = {row.transport: row.median_ms for row in rows(one for one in outcome.results if one.nbytes == nbytes)}
    what = f"64 KiB room alone, estimate for memcpy's time and {WAKES} more threads to wake, compared with its own: p50"
    waking = WAKES * seconds_per_wake(300) * 1e3
    return [*specials, Special(what, "shm", "ms", alone[LIMIT] + waking, alone["shm"])]


def _among_unclaimed(plan: Plan, transport: TransportVariant, key_file: str) -> list[Special]:
    nbytes = 64 * KIB
    rooms, rounds = 100, 5 if plan.quick else max(10, plan.rounds)  # the p99 leaves out five of 500
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
    what = f"64 KiB room among {MANY_UNCLAIMED} unclaimed rooms, compared with {FEW_UNCLAIMED}"
    few, many = seconds[FEW_UNCLAIMED], seconds[MANY_UNCLAIMED]
    return [
        Special(f"{what}: p50", transport.name, "ms", statistics.median(few) * 1e3, statistics.median(many) * 1e3),
        Special(f"{what}: p99", transport.name, "ms", quantile(few, 0.99) * 1e3, quantile(many, 0.99) * 1e3),
    ]


def _first_use(plan: Plan, transports: Sequence[TransportVariant], key_file: str, say: Say) -> list[Special]:
    """The first room in a new pool, in processes that have moved smaller ones, so that their code has run; and the
    first one of new processes. The transports take turns, so that what the machine does meanwhile hits all alike."""
    nbytes = 16 * MIB
    config = Config(nbytes=nbytes, width=plan.width, in_flight=1, block_size=plan.block_size)
    payload = PayloadFile(nbytes)
    cases = {"in a new pool, after four of 4 MiB": 4, "of new processes": 0}
    first: dict[tuple[TransportVariant, str], list[float]] = defaultdict(list)
    later: dict[tuple[TransportVariant, str], list[float]] = defaultdict(list)
    repeats = 9 if plan.quick else 15
    with ExitStack() as stack:
        stack.callback(payload.close)
        for number in range(repeats):
            say("first use of a pool, and of processes", number / repeats)
            for transport, (case, small_ones) in itertools.product(transports, cases.items()):
                with Pair(transport, config, (payload.path, nbytes, 1), key_file) as pair:
                    for _ in range(small_ones):
                        pair.run(1, 4 * MIB)
                    first[transport, case] += pair.run(1, nbytes).seconds
                    later[transport, case] += pair.run(8, nbytes).seconds
    return [
        Special(
            f"16 MiB room, the first one {case}, compared with the next eight: p50", transport.name, "ms",
            statistics.median(later[transport, case]) * 1e3, statistics.median(first[transport, case]) * 1e3,
        )
        for transport, case in first
    ]  # fmt: skip
