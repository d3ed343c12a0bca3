"""``python -m tests.faults``: real processes, every fault at every step of a room, and a table of what happened."""

from __future__ import annotations

import argparse
import json
import random
import secrets
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console

from sglang_mm_conn.memory.segment import sweep_stale_segments
from tests.connector.processes import Zygote
from tests.faults import table
from tests.faults.cases import FAULTS, GRACE_SECONDS, LONG_SECONDS, SHORT_SECONDS, Attempt, Fault, attempt
from tests.faults.network import why_impossible
from tests.faults.processes import DEADLINE, PEER_TIMEOUT, Ground
from tests.faults.stages import STEPS, Step

PATHS = ("shm", "mooncake")
Cell = tuple[Fault, Step]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"""\
Starts encoder and language processes (the connector alone, no model) and brings a room to a certain step. Then it
kills, freezes or restarts one of its two processes, or cuts the network between them. What must be true every time:

  - the room ends in exactly the bytes that were sent, or in an error with a code and a reason, within its deadline of
    {DEADLINE:g} s (and {GRACE_SECONDS:g} s for a busy machine; a process that was frozen answers when it is thawed);
  - a "short" fault ({SHORT_SECONDS:g} s; {PEER_TIMEOUT:g} s of silence make a peer lost) costs nothing;
    a "long" one lasts {LONG_SECONDS:g} s, longer than the deadline;
  - rooms of bystanders, two other pairs of processes, arrive right and in time all the while;
  - afterwards everybody serves everybody; memory, descriptors, sockets, threads and mapped segments are back at what
    they were; the segment of a killed process is removed by the next start, and no other.

Both data paths run at the same time: shared memory, and Mooncake over TCP. Networks are cut between two network
namespaces of our own, which takes root and `ip` (iproute2); without them these faults are left out, and it says so.""",
        epilog="""\
examples:
  python -m tests.faults                                   every fault once, at every step, on both paths: minutes
  python -m tests.faults --only "encoder killed"           one fault; names are those of the table
  python -m tests.faults --only "half written / mooncake"  one step on one path
  python -m tests.faults --duration 3600 --json out.json   for an hour, at random moments after the first round
  python -m tests.faults --write                           the table goes into docs/results/faults.md

Ends with 1 where a promise was broken; the logs of all processes are kept then.""",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help='only what has TEXT in "fault / step / path"')
    parser.add_argument("--path", choices=PATHS, help="only this data path")
    parser.add_argument(
        "--duration", type=float, default=0, metavar="SECONDS",
        help="go on in random order, at random moments, until this has passed (default: every fault once)",
    )  # fmt: skip
    parser.add_argument("--seed", default="", help="of what is random (default: a fresh one, which is printed)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every attempt to FILE")
    parser.add_argument("--write", action="store_true", help="put the table into docs/results/faults.md")
    return parser


class Lane:
    """All attempts on one data path, one after the other; a ground serves until a promise is broken on it."""

    def __init__(self, run: Run, path: str, cells: list[Cell]) -> None:
        self._run = run
        self._path = path
        self._cells = cells
        self._dice = random.Random(f"{run.seed} {path}")
        self._grounds: dict[bool, Ground] = {}
        self._count = 0

    def play(self) -> None:
        try:
            for fault, step in self._cells:
                self._try(fault, step, None)
            while self._run.time_left():
                for fault, step in self._dice.sample(self._cells, len(self._cells)):
                    if self._run.time_left():
                        self._try(fault, step, self._dice)
        finally:
            for with_cable in list(self._grounds):
                self._close(with_cable)

    def _try(self, fault: Fault, step: Step, dice: random.Random | None) -> None:
        if self._run.stopping.is_set():
            return
        with_cable = fault.hurt == "network"
        try:
            ground = self._ground(with_cable)
        except Exception as error:
            self._run.add(Attempt(fault.name, step.name, self._path, broken=f"no healthy start: {error!r}"))
            return
        result = attempt(ground, fault, step, dice)
        if result.broken:
            result.broken += f" (logs: {ground.directory})"
            self._close(with_cable)
        self._run.add(result)

    def _ground(self, with_cable: bool) -> Ground:
        if with_cable not in self._grounds:
            self._count += 1
            directory = self._run.directory / f"{self._path}-{self._count}"
            self._grounds[with_cable] = Ground(self._run.zygote, self._path, directory, with_cable=with_cable)
        return self._grounds[with_cable]

    def _close(self, with_cable: bool) -> None:
        self._grounds.pop(with_cable).close()


class Run:
    """Both lanes, and what they came to."""

    def __init__(
        self, console: Console, seed: str, duration: float, directory: Path, cells: dict[str, list[Cell]]
    ) -> None:
        self.seed = seed
        self.directory = directory
        self.stopping = threading.Event()
        self.attempts: list[Attempt] = []
        self._console = console
        self._until = time.monotonic() + duration
        self._cells = cells
        self._most = 0 if duration else sum(map(len, cells.values()))
        self._lock = threading.Lock()

    def time_left(self) -> bool:
        return time.monotonic() < self._until and not self.stopping.is_set()

    def add(self, result: Attempt) -> None:
        with self._lock:
            self.attempts.append(result)
            of = f"/{self._most}" if self._most else ""
            what = f"BROKEN: {result.broken}" if result.broken else result.happened
            line = f"{len(self.attempts)}{of} {result.name}: {what} ({result.seconds:.2f} s)"
            self._console.print(line, style="red" if result.broken else None, markup=False, highlight=False)

    def play(self) -> None:
        self.zygote = Zygote()
        try:
            with ThreadPoolExecutor(len(PATHS)) as executor:
                lanes = [executor.submit(Lane(self, path, cells).play) for path, cells in self._cells.items() if cells]
                try:
                    for lane in lanes:
                        lane.result()
                except BaseException:
                    self.stopping.set()
                    raise
        finally:
            self.zygote.close()
            sweep_stale_segments()


def main() -> int:
    parser = arguments()
    options = parser.parse_args()
    if options.write and (options.only or options.path):
        parser.error("--write takes the whole table: leave --only and --path out")
    console = Console(width=None if sys.stdout.isatty() else 200)
    impossible = why_impossible()
    faults = [fault for fault in FAULTS if not (impossible and fault.hurt == "network")]
    cells = {
        path: [
            (fault, step)
            for fault in faults
            for step in STEPS
            if options.only in Attempt(fault.name, step.name, path).name
        ]
        for path in PATHS
        if options.path in (None, path)
    }
    skipped = f"Not tried: network cuts, because {impossible}." if impossible else ""
    if skipped:
        console.print(skipped, style="yellow")
    if not any(cells.values()):
        parser.error(f"nothing has {options.only!r} in its name")
    if options.write and impossible:
        parser.error(f"--write takes the whole table: {impossible}")
    seed = options.seed or secrets.token_hex(4)
    directory = Path(tempfile.mkdtemp(prefix="mm-conn-faults-"))
    began = time.monotonic()
    run = Run(console, seed, options.duration, directory, cells)
    run.play()
    seconds = time.monotonic() - began
    broken = [item for item in run.attempts if item.broken]
    rooms = sum(item.bystander_rooms for item in run.attempts)
    slowest = max((item.bystander_slowest for item in run.attempts), default=0.0)
    summary = (
        f"{len(run.attempts)} faults in {seconds:.0f} s (seed {seed}): {len(broken)} broken promises. "
        f"{rooms} rooms of bystanders arrived right, the slowest in {slowest:.2f} s. {skipped}"
    ).strip()
    console.print(table.on_terminal(run.attempts))
    console.print(summary)
    if options.json:
        about = {
            "seed": seed, "seconds": round(seconds, 1), "summary": summary, "broken": len(broken), "skipped": skipped,
        }  # fmt: skip
        options.json.write_text(json.dumps(table.as_json(run.attempts, about), indent=1) + "\n")
    if broken:
        for item in broken:
            console.print(f"BROKEN {item.name}: {item.broken}", style="red", markup=False)
        return 1
    if options.write:
        table.write(table.in_markdown(run.attempts, f"`python -m tests.faults --write` printed this: {summary}"))
        console.print(f"Written into {table.DOCUMENT}")
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
