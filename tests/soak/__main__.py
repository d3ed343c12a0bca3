"""``python -m tests.soak``: many rooms between real processes, and a table of how they fared."""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sglang_mm_conn.memory.segment import sweep_stale_segments
from tests.connector.processes import Zygote
from tests.faults.table import RESULTS, write
from tests.soak.plan import ABORTED, ENCODERS, LANGUAGES, POOL_TOKENS, UNDER_WAY
from tests.soak.run import ROOM_SECONDS, Outcome, Soak

DOCUMENT = RESULTS / "soak.md"
MARKERS = ("<!-- soak:begin -->", "<!-- soak:end -->")
SIZES = ("small", "medium", "larger than the pool")
HELD = ("process", "rooms ended", "descriptors", "sockets", "threads", "resident MiB", "tombstones")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"""\
Sends rooms from {ENCODERS} encoder processes to {LANGUAGES} language processes (the connector alone, no model). Each
pool holds {POOL_TOKENS} rows, and {UNDER_WAY} rooms are under way in each pair, so rooms wait for blocks nearly
always; some are larger than the pool. {ABORTED:.0%} are given up, by either side, at a random moment.
What must be true:

  - every other room arrives within {ROOM_SECONDS:g} s, byte for byte what was sent, with its metadata;
  - at the end every block is free, nothing is in quarantine and no table holds a room;
  - no process holds more memory, descriptors, sockets or threads than after the first thousand rooms
    (but for tombstones of ended rooms, which are bounded).""",
        epilog="""\
examples:
  python -m tests.soak                       100,000 rooms over shared memory: minutes
  python -m tests.soak --path mooncake       over Mooncake
  python -m tests.soak --rooms 2000          seconds
  python -m tests.soak --write               the figures go into docs/results/soak.md

Ends with 1 where a promise was broken; the logs of all processes are kept then.""",
    )
    parser.add_argument("--rooms", type=int, default=100_000, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--path", choices=("shm", "mooncake"), default="shm", help="data path (default: %(default)s)")
    parser.add_argument("--seed", default="", help="of all that is random (default: a fresh one, which is printed)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--write", action="store_true", help="put the figures into docs/results/soak.md")
    return parser


def summary(outcome: Outcome) -> str:
    ended = outcome.ended
    waits = ", ".join(f"{size} {outcome.longest[size]:.2f} s" for size in SIZES if size in outcome.longest)
    return (
        f"{ended['ended']} rooms over {outcome.path} in {outcome.seconds:.0f} s, {outcome.rate:.0f} rooms/s "
        f"(seed {outcome.plan.seed}): {ended['right bytes']} arrived with the right bytes, "
        f"{ended['larger than the pool, served']} of them larger than the pool, with {outcome.resumes} resumes; "
        f"{ended['given up by the language']} were given up by the language server and "
        f"{ended['given up by the encoder']} by the encoder. The pool had no free block "
        f"{outcome.short:.0%} of the time. Longest wait, from the request to the last row: {waits}. "
        f"{len(outcome.problems)} broken promises."
    )


def held(outcome: Outcome) -> list[tuple[str, ...]]:
    """Each process, first and last sample after one another."""
    samples = sorted(outcome.samples, key=lambda sample: sample.process)
    return [
        (
            sample.process, str(sample.rooms), str(sample.holdings.descriptors), str(sample.holdings.sockets),
            str(sample.holdings.threads), str(sample.holdings.rss_kb >> 10), str(sample.tombstones),
        )
        for sample in samples
    ]  # fmt: skip


def in_markdown(outcome: Outcome) -> str:
    rows = held(outcome)
    kept = [
        row for index, row in enumerate(rows)
        if index in (0, len(rows) - 1) or row[0] not in (rows[index - 1][0],) or row[0] != rows[index + 1][0]
    ]  # fmt: skip
    lines = [
        f"`python -m tests.soak --write` printed this: {summary(outcome)}", "",
        "| " + " | ".join(HELD) + " |", "|" + "---|" * len(HELD),
    ]  # fmt: skip
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in kept)])


def main() -> int:
    parser = arguments()
    options = parser.parse_args()
    if options.rooms < 100:
        parser.error(f"--rooms {options.rooms}: at least 100, or nothing is seen")
    console = Console(width=None if sys.stdout.isatty() else 160)
    seed = options.seed or secrets.token_hex(4)
    console.print(f"seed {seed}", highlight=False)
    directory = Path(tempfile.mkdtemp(prefix="mm-conn-soak-"))
    zygote = Zygote()
    try:
        soak = Soak(zygote, options.path, directory, seed, options.rooms)
        try:
            columns = (TextColumn("rooms"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            with Progress(*columns, console=console) as bar:
                task = bar.add_task("rooms", total=options.rooms)
                said = [0]

                def progress(ended: int) -> None:
                    bar.update(task, completed=ended)
                    if not console.is_terminal and ended - said[0] >= options.rooms // 20:
                        said[0] = ended
                        console.print(f"{ended} of {options.rooms} rooms have ended", highlight=False)

                outcome = soak.play(progress)
        finally:
            soak.close()
    finally:
        zygote.close()
        sweep_stale_segments()
    table = Table(title="What the processes hold")
    for column in HELD:
        table.add_column(column, justify="left" if column == "process" else "right")
    for row in held(outcome):
        table.add_row(*row)
    console.print(table)
    console.print(summary(outcome), highlight=False)
    if options.json:
        options.json.write_text(json.dumps(outcome.as_json(), indent=1) + "\n")
    if outcome.problems:
        for problem in outcome.problems:
            console.print(f"BROKEN: {problem}", style="red", markup=False)
        console.print(f"Logs: {directory}")
        return 1
    if options.write:
        write(in_markdown(outcome), DOCUMENT, MARKERS)
        console.print(f"Written into {DOCUMENT}")
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
