"""``python -m tests.fuzz``: malicious peers at real processes, and what they could not do."""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sglang_mm_conn.memory.segment import sweep_stale_segments
from tests.connector.processes import Zygote
from tests.faults.baseline import RSS_MARGIN_KB
from tests.faults.table import RESULTS, write
from tests.fuzz.flood import FLOODS, FLOOR_SECONDS, MOST_RATIO, Measured, measure
from tests.fuzz.run import DEADLINE, Ground, Outcome, fuzz

DOCUMENT = RESULTS / "fuzz.md"
MARKERS = ("<!-- fuzz:begin -->", "<!-- fuzz:end -->")
FLOOD_MARKERS = ("<!-- flood:begin -->", "<!-- flood:end -->")
COLUMNS = (
    "flooded", "with", "frames/s", "healthy room before, ms", "beside it, ms", "times as long", "growth, MiB",
)  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"""\
Starts an encoder and a language process (the connector alone, no model), and malicious peers at both: language ranks,
registered and not, one that reads no answers; encoders with a bootstrap route of their own; strangers without a key.
They send random bytes, valid messages out of order, and mutated ones. It is done without a key and with one. What must
be true:

  - rooms between the healthy two arrive all the while, byte for byte, each within {DEADLINE:g} s;
  - no process and no thread ends, and every block is accounted for;
  - when the malicious peers are gone nothing of theirs is left: no session, link, room, or block in quarantine;
  - neither process holds more than after the first tenth: memory ({RSS_MARGIN_KB >> 10} MiB and tombstones, which are
    bounded), descriptors, sockets, threads.

Then it floods: one peer sends as fast as it can. A healthy room may take {MOST_RATIO:g} times as long as before (in the
median; at least {MOST_RATIO * FLOOR_SECONDS:g} s), and neither memory nor tables grow.

What a peer that has the key and lies about who it is may do to the server that it claims to be is not tried.""",
        epilog="""\
examples:
  python -m tests.fuzz                            100,000 frames, half of them with a key, and the floods: minutes
  python -m tests.fuzz --frames 1000000 --write   the long form; its figures go into docs/results/fuzz.md
  python -m tests.fuzz --seed 1234abcd --no-flood the same frames in the same order again

Ends with 1 where a promise was broken; the seed is printed and the logs of both processes are kept then.""",
    )
    parser.add_argument("--frames", type=int, default=100_000, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seed", default="", help="of all frames (default: a fresh one, which is printed)")
    parser.add_argument("--flood", action="store_true", help="only the floods")
    parser.add_argument("--no-flood", action="store_true", help="all but the floods")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--write", action="store_true", help="put the figures into docs/results/fuzz.md")
    return parser


def problems(outcomes: Sequence[Outcome], floods: Sequence[Measured]) -> list[str]:
    return [outcome.problem for outcome in outcomes] + [flood.problem for flood in floods]


def summary(outcomes: Sequence[Outcome], floods: Sequence[Measured]) -> str:
    broken = sum(bool(problem) for problem in problems(outcomes, floods))
    texts = []
    if outcomes:
        frames = sum(outcome.frames for outcome in outcomes)
        requests = sum(outcome.requests for outcome in outcomes)
        rooms = sum(outcome.rooms for outcome in outcomes)
        texts.append(
            f"{frames} frames and {requests} connections of strangers in {sum(one.seconds for one in outcomes):.0f} s "
            f"(seed {outcomes[0].seed}); {rooms} healthy rooms arrived beside them, the slowest in "
            f"{max(outcome.slowest for outcome in outcomes):.2f} s."
        )
    if floods:
        worst = max(floods, key=lambda one: one.ratio)
        texts.append(f"Beside {len(floods)} floods a healthy room took at most {worst.ratio:.1f} times as long.")
    return " ".join([*texts, f"{broken} broken promises."])


def cells(flood: Measured) -> tuple[str, ...]:
    return (
        flood.side, flood.name, f"{flood.rate:,.0f}", f"{flood.before * 1000:.1f}", f"{flood.during * 1000:.1f}",
        f"{flood.ratio:.1f}", f"{flood.growth_kb / 1024:.1f}",
    )  # fmt: skip


def fuzz_in_markdown(outcomes: Sequence[Outcome]) -> str:
    frames = sum(outcome.frames for outcome in outcomes)
    held = [
        f"{name} process{', with a key' if outcome.key else ''}: {first.rss_kb >> 10} MiB resident, "
        f"{first.descriptors} descriptors, {first.threads} threads after a tenth; {last.rss_kb >> 10} MiB, "
        f"{last.descriptors} and {last.threads} at the end"
        for outcome in outcomes
        for name, (first, last) in outcome.held.items()
    ]
    lines = [
        f"`python -m tests.fuzz --frames {frames // 10_000 * 10_000} --write` printed this: "
        f"{summary(outcomes, ())}",
        "", *(f"- {text}" for text in held),
    ]  # fmt: skip
    return "\n".join(lines)


def floods_in_markdown(floods: Sequence[Measured]) -> str:
    lines = [
        f"`python -m tests.fuzz --flood --write` printed this: {summary((), floods)}", "",
        "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS),
    ]  # fmt: skip
    return "\n".join([*lines, *("| " + " | ".join(cells(flood)) + " |" for flood in floods)])


class Run:
    """All that was asked for, one after the other."""

    def __init__(self, console: Console, directory: Path, seed: str) -> None:
        self._console = console
        self._directory = directory
        self._seed = seed
        self.outcomes: list[Outcome] = []
        self.floods: list[Measured] = []

    def fuzz(self, zygote: Zygote, frames: int) -> None:
        for with_key in (False, True):
            name = "with a key" if with_key else "without a key"
            step, said = max(1000, frames // 20), [0]

            def progress(sent: int, name: str = name, step: int = step, said: list[int] = said) -> None:
                if sent - said[0] >= step:
                    said[0] = sent
                    self._console.print(f"{sent} of {frames // 2} frames {name}", highlight=False)

            directory = self._directory / name.replace(" ", "-")
            outcome = fuzz(zygote, directory, self._seed, frames // 2, with_key=with_key, progress=progress)
            self.outcomes.append(outcome)
            if outcome.problem:
                self._complain(f"{name}: {outcome.problem}")

    def flood(self, zygote: Zygote) -> None:
        ground = Ground(zygote, self._directory / "flood", self._seed, with_key=False)
        try:
            for flood in FLOODS:
                measured = measure(ground, flood)
                self.floods.append(measured)
                self._console.print("flood: " + ", ".join(cells(measured)), highlight=False)
                if measured.problem:
                    self._complain(f"flood of the {flood.side} with {flood.name}: {measured.problem}")
        finally:
            ground.close()

    def _complain(self, text: str) -> None:
        self._console.print(f"BROKEN (seed {self._seed}): {text}", style="red", markup=False)

    @property
    def broken(self) -> bool:
        return any(problems(self.outcomes, self.floods))

    def as_json(self) -> dict[str, Any]:
        return {
            "seed": self._seed, "summary": summary(self.outcomes, self.floods),
            "fuzz": [outcome.as_json() for outcome in self.outcomes],
            "floods": [flood.as_json() for flood in self.floods],
        }  # fmt: skip


def main() -> int:
    parser = arguments()
    options = parser.parse_args()
    if options.frames < 1000:
        parser.error(f"--frames {options.frames}: at least 1000, or nothing is seen")
    console = Console(width=None if sys.stdout.isatty() else 160)
    seed = options.seed or secrets.token_hex(4)
    console.print(f"seed {seed}", highlight=False)
    directory = Path(tempfile.mkdtemp(prefix="mm-conn-fuzz-"))
    run = Run(console, directory, seed)
    zygote = Zygote()
    try:
        if not options.flood:
            run.fuzz(zygote, options.frames)
        if not options.no_flood:
            run.flood(zygote)
    finally:
        zygote.close()
        sweep_stale_segments()
    if run.floods:
        table = Table(title="Floods")
        for column in COLUMNS:
            table.add_column(column, justify="left" if column in COLUMNS[:2] else "right")
        for flood in run.floods:
            table.add_row(*cells(flood), style="red" if flood.problem else None)
        console.print(table)
    console.print(summary(run.outcomes, run.floods), highlight=False)
    if options.json:
        options.json.write_text(json.dumps(run.as_json(), indent=1) + "\n")
    if run.broken:
        console.print(f"Logs: {directory}")
        return 1
    if options.write:
        if run.outcomes:
            write(fuzz_in_markdown(run.outcomes), DOCUMENT, MARKERS)
        if run.floods:
            write(floods_in_markdown(run.floods), DOCUMENT, FLOOD_MARKERS)
        console.print(f"Written into {DOCUMENT}")
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
