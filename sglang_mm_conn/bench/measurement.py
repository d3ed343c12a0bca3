"""From the results of runs to the figures of the report. Pure: no clock, no processes."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sglang_mm_conn.bench.records import Result

BASELINE = "memcpy"  # what every transport is compared with: the upper bound on speed on one host
BUILT_IN = ("zmq_to_scheduler", "mooncake_builtin")


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of ``values`` do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]


@dataclass(frozen=True)
class Row:
    """One transport at one size.

    Attributes:
        transport: Its name, with variations.
        nbytes: Bytes of a room.
        rooms: Rooms measured one after the other, in all rounds.
        rounds: Rounds measured.
        median_ms: Median latency of a room, one after the other, in milliseconds; likewise ``p99_ms``, ``best_ms``.
        gbytes_per_s: GB/s at the median latency.
        cpu_s_per_gbyte: CPU seconds of both processes per GB, at the highest concurrency measured.
        of_baseline: Speed as a share of BASELINE's: the median over the rounds of the ratio within one round.
        of_baseline_best: The same ratio of the fastest room of each, which other load on the machine affects least.
        speed_up: Speed over that of the best built-in transport: the median over the rounds, as above.
        rooms_per_s: By number of rooms in flight: the median over the rounds.
        per_room: Threads started, sockets created, ... by both processes, per room of all runs.
    """

    transport: str
    nbytes: int
    rooms: int
    rounds: int
    median_ms: float
    p99_ms: float
    best_ms: float
    gbytes_per_s: float
    cpu_s_per_gbyte: float
    of_baseline: float | None
    of_baseline_best: float | None
    speed_up: float | None
    rooms_per_s: dict[int, float]
    per_room: dict[str, float]


def rows(results: Iterable[Result]) -> list[Row]:
    """One row per size and transport, in the order in which they first appear."""
    cells: dict[tuple[int, str], list[Result]] = defaultdict(list)
    for result in results:
        cells[result.nbytes, result.transport].append(result)
    return [
        _row(
            transport, nbytes, cell, cells.get((nbytes, BASELINE), []),
            [cells[nbytes, name] for name in BUILT_IN if (nbytes, name) in cells],
        )
        for (nbytes, transport), cell in cells.items()
    ]  # fmt: skip


def _row(
    transport: str,
    nbytes: int,
    cell: Sequence[Result],
    baseline: Sequence[Result],
    built_in: Sequence[Sequence[Result]],
) -> Row:
    singles = [result for result in cell if result.in_flight == 0]
    seconds = [second for result in singles for second in result.seconds]
    concurrent: dict[int, list[Result]] = defaultdict(list)
    for result in cell:
        if result.in_flight:
            concurrent[result.in_flight].append(result)
    busiest = concurrent[max(concurrent)] if concurrent else singles
    gbytes = sum(len(result.seconds) for result in busiest) * nbytes / 1e9
    median = statistics.median(seconds)
    return Row(
        transport=transport,
        nbytes=nbytes,
        rooms=len(seconds),
        rounds=len(singles),
        median_ms=median * 1e3,
        p99_ms=quantile(seconds, 0.99) * 1e3,
        best_ms=min(seconds) * 1e3,
        gbytes_per_s=nbytes / median / 1e9,
        cpu_s_per_gbyte=sum(result.cpu for result in busiest) / gbytes,
        of_baseline=ratio_by_round(baseline, singles),
        of_baseline_best=best(baseline) / min(seconds) if baseline else None,
        speed_up=min(
            (ratio for other in built_in if (ratio := ratio_by_round(other, singles)) is not None), default=None
        ),
        rooms_per_s={
            in_flight: statistics.median(len(result.seconds) / result.wall for result in same)
            for in_flight, same in sorted(concurrent.items())
        },
        per_room=_per_room(cell),
    )


def rooms_per_second(results: Iterable[Result], nbytes: int, transport: str) -> float | None:
    """At the highest concurrency of ``transport``, the median over the rounds; None if it had no concurrent runs."""
    runs = [
        result for result in results if (result.nbytes, result.transport) == (nbytes, transport) and result.in_flight
    ]
    if not runs:
        return None
    highest = max(run.in_flight for run in runs)
    return statistics.median(len(run.seconds) / run.wall for run in runs if run.in_flight == highest)


def best(results: Sequence[Result]) -> float:
    """Seconds of the fastest room among those measured one after the other."""
    return min(second for result in results if result.in_flight == 0 for second in result.seconds)


def medians_by_round(results: Iterable[Result]) -> dict[int, float]:
    """By round: the median seconds of the rooms measured one after the other."""
    return {result.round: statistics.median(result.seconds) for result in results if result.in_flight == 0}


def ratio_by_round(above: Iterable[Result], below: Iterable[Result]) -> float | None:
    """The median over the rounds of (median seconds of ``above``) / (median seconds of ``below``)."""
    upper, lower = medians_by_round(above), medians_by_round(below)
    common = [upper[number] / lower[number] for number in upper if number in lower]
    return statistics.median(common) if common else None


@dataclass(frozen=True)
class Comparison:
    """The latency of one transport over that of another, or over the sum of several others'.

    Attributes:
        what: The transports compared.
        nbytes: Bytes of a room.
        ratio: Median over the rounds of the ratio within one round.
        best: The ratio of the fastest rooms of each.
    """

    what: str
    nbytes: int
    ratio: float
    best: float


def comparisons(results: Iterable[Result]) -> list[Comparison]:
    """This connector's transports over those that bound them, as far as both were measured."""
    cells: dict[tuple[int, str], list[Result]] = defaultdict(list)
    for result in results:
        cells[result.nbytes, result.transport].append(result)
    found = []
    for nbytes in dict.fromkeys(size for size, _ in cells):
        for transport, parts in (
            ("mooncake", ("engine", "memcpy")),
            ("mooncake+key", ("engine", "memcpy")),
            ("shm+windows", ("shm",)),
            ("shm+windows", ("shm+copied",)),
            ("zmq_baseline+windows", ("zmq_baseline+copied",)),
            ("shm", ("zmq_baseline",)),
            ("shm+copied", ("zmq_baseline+copied",)),
            ("shm+windows", ("zmq_baseline+windows",)),
        ):
            compared = [cells.get((nbytes, name), []) for name in (transport, *parts)]
            if not all(compared):
                continue
            mine, *others = [medians_by_round(cell) for cell in compared]
            # An interrupted run has a round that only some of the transports have had.
            common = set(mine).intersection(*others)
            if not common:
                continue
            rounds = [mine[number] / sum(other[number] for other in others) for number in common]
            ratio = best(compared[0]) / sum(best(cell) for cell in compared[1:])
            below = parts[0] if len(parts) == 1 else f"({' + '.join(parts)})"
            what = f"latency ratio {transport} / {below}"
            found.append(Comparison(what, nbytes, statistics.median(rounds), ratio))
    return found


def _per_room(cell: Sequence[Result]) -> dict[str, float]:
    count = sum(len(result.seconds) for result in cell)
    calls: dict[str, float] = {"threads": 0.0, "sockets": 0.0, "connections": 0.0, "http": 0.0, "registrations": 0.0}
    for result in cell:
        for side in (result.encoder, result.language):
            for name, number in side["calls"].items():
                calls[name] = calls.get(name, 0.0) + number
    return {name: number / count for name, number in calls.items()}


def as_json(rows_: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows_]
