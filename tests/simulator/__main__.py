"""``python -m tests.simulator``: play many schedules; print and replay those in which a promise is broken."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import secrets
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable

from tests.faults.table import RESULTS, write
from tests.simulator.dispatched import DispatchedSchedule
from tests.simulator.mutations import MUTATIONS, OF_THE_DISPATCHER, without
from tests.simulator.schedule import Schedule

CHUNK = 100
DOCUMENT = RESULTS / "simulator.md"
MARKERS = ("<!-- simulator:begin -->", "<!-- simulator:end -->")
PROOF_MARKERS = ("<!-- protections:begin -->", "<!-- protections:end -->")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulator",
        description="Plays schedules: encoders and language servers made of the real endpoints, with simulated "
        "network, memory and clock, and with faults, all drawn from a seed. Ends with 1 where a promise was broken.",
    )
    parser.add_argument("--schedules", type=int, default=100_000, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seed", default="", help="of the whole run (default: a fresh one, which is printed)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--replay", metavar="SEED:NUMBER", help="play this schedule alone and print what happens in it")
    parser.add_argument(
        "--without", choices=MUTATIONS, metavar="PROTECTION",
        help="take a protection out of the code first: " + "; ".join(MUTATIONS),
    )  # fmt: skip
    parser.add_argument(
        "--prove", action="store_true",
        help="remove each protection in turn; print after how many schedules (at most --schedules) that is noticed",
    )  # fmt: skip
    parser.add_argument("--most", type=int, default=5, metavar="N", help="violations to stop at (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    parser.add_argument(
        "--write", action="store_true",
        help="put the figures, or with --prove those of each protection, into docs/results/simulator.md",
    )  # fmt: skip
    return parser


def schedule_of(name: str, trace: Callable[[str], None] | None = None) -> Schedule:
    """The requests of every other schedule go through a dispatcher."""
    _, _, number = name.rpartition(":")
    return DispatchedSchedule(name, trace) if number.isdigit() and int(number) % 2 else Schedule(name, trace)


def play(name: str) -> tuple[Counter[str], str]:
    """One schedule: what happened, and how it broke a promise (empty: it did not)."""
    schedule = schedule_of(name)
    try:
        return schedule.run(), ""
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return schedule.seen, f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}:{where.lineno})"


def play_chunk(task: tuple[str, int, int, str | None]) -> tuple[int, Counter[str], list[tuple[str, str]]]:
    seed, first, count, protection = task
    seen: Counter[str] = Counter()
    broken = []
    with without(protection) if protection else contextlib.nullcontext():
        for number in range(first, first + count):
            # Without a protection only the kind of schedule that has it is played: see schedule_of.
            played = number if protection is None else 2 * number + (protection in OF_THE_DISPATCHER)
            name = f"{seed}:{played}"
            happened, problem = play(name)
            seen += happened
            if problem:
                broken.append((name, problem))
    return count, seen, broken


class Run:
    """Many schedules on several processes; ends early after ``most`` violations."""

    def __init__(self, seed: str, schedules: int, jobs: int, protection: str | None, most: int, *, quiet: bool) -> None:
        self.seed = seed
        self.schedules = 0
        self.seen: Counter[str] = Counter()
        self.broken: list[tuple[str, str]] = []
        tasks = [(seed, first, min(CHUNK, schedules - first), protection) for first in range(0, schedules, CHUNK)]
        began, shown = time.monotonic(), 0.0
        with multiprocessing.get_context("fork").Pool(jobs) as pool:
            for count, happened, problems in pool.imap_unordered(play_chunk, tasks):
                self.schedules += count
                self.seen += happened
                self.broken += problems
                now = time.monotonic()
                if now - shown > 5 and not quiet:
                    shown = now
                    left = (schedules - self.schedules) * (now - began) / self.schedules
                    print(f"{self.schedules} schedules, {len(self.broken)} violations, {left:.0f} s left",
                          file=sys.stderr)  # fmt: skip
                if len(self.broken) >= most:
                    pool.terminate()
                    break
        self.seconds = round(time.monotonic() - began, 1)


def summary(run: Run, seed: str, jobs: int) -> str:
    return (
        f"{run.schedules:,} schedules in {run.seconds:.0f} s (seed {seed}, {jobs} processes), "
        f"{len(run.broken)} violations.\nIn them: "
        + ", ".join(f"{count:,} {what}" for what, count in run.seen.most_common()) + "."
    )  # fmt: skip


def prove(seed: str, schedules: int, jobs: int, *, as_json: bool, into_document: bool) -> int:
    """Play without each protection until a violation is reported. Returns 1 if one removal is not noticed."""
    noticed: dict[str, tuple[int, str]] = {}
    for protection in MUTATIONS:
        run = Run(seed, schedules, jobs, protection, 1, quiet=True)
        noticed[protection] = (run.schedules, run.broken[0][1] if run.broken else "")
        if not as_json:
            print(f"{protection}: " + (f"noticed within {run.schedules} schedules: {noticed[protection][1]}"
                  if run.broken else f"NOT NOTICED in {run.schedules} schedules"))  # fmt: skip
    if as_json:
        print(json.dumps(noticed))
    if into_document:
        lines = [f"`python -m tests.simulator --prove --schedules {schedules} --write` printed this (seed {seed}):", "",
                 "| taken away | noticed within schedules |", "|---|---:|",
                 *(f"| {name} | {within if problem else f'not in {within}'} |"
                   for name, (within, problem) in noticed.items())]  # fmt: skip
        write("\n".join(lines), DOCUMENT, PROOF_MARKERS)
    return 0 if all(problem for _, problem in noticed.values()) else 1


def replay(name: str, protection: str | None) -> int:
    schedule = schedule_of(name, print)
    with without(protection) if protection else contextlib.nullcontext():
        try:
            schedule.run()
        except Exception:
            traceback.print_exc(file=sys.stdout)
            for part in schedule.parts:
                print(
                    f"part {part.number}: touched by {sorted(part.touched) or 'nothing'}, outcome {part.outcome}, "
                    f"on the encoder {part.sender_outcome}"
                )
            return 1
    print("No promise was broken.")
    return 0


def main() -> int:
    options = arguments().parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":
        # The order of sets is part of a schedule: it must be the same when the schedule is played again.
        os.execve(sys.executable, [sys.executable, "-m", "tests.simulator", *sys.argv[1:]],
                  {**os.environ, "PYTHONHASHSEED": "0"})  # fmt: skip
    if options.replay:
        return replay(options.replay, options.without)
    seed = options.seed or secrets.token_hex(4)
    if options.prove:
        return prove(seed, options.schedules, options.jobs, as_json=options.json, into_document=options.write)
    run = Run(seed, options.schedules, options.jobs, options.without, options.most, quiet=options.json)
    if options.json:
        print(json.dumps(vars(run)))
        return 1 if run.broken else 0
    figures = summary(run, seed, options.jobs)
    print(figures)
    if options.write:
        command = f"python -m tests.simulator --schedules {options.schedules} --write"
        write(f"`{command}` printed this:\n\n{figures}", DOCUMENT, MARKERS)
    for name, problem in run.broken:
        print(f"VIOLATION in {name}: {problem}\n    python -m tests.simulator --replay {name}"
              + (f" --without '{options.without}'" if options.without else ""))  # fmt: skip
    return 1 if run.broken else 0


if __name__ == "__main__":
    sys.exit(main())
