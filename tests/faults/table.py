"""The table of what was seen: on the terminal, as JSON, and in docs/results/faults.md."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.connector.processes import ROOT
from tests.faults.cases import Attempt

RESULTS = ROOT / "docs" / "results"
DOCUMENT = RESULTS / "faults.md"
BEGIN, END = "<!-- faults:begin -->", "<!-- faults:end -->"
COLUMNS = ("fault", "step", "data path", "what happened", "answer after s (median / max)", "tried")


@dataclass(frozen=True)
class Row:
    """All attempts of one fault at one step on one data path."""

    fault: str
    step: str
    path: str
    happened: str
    median: float
    longest: float
    tried: int
    broken: int

    def cells(self) -> tuple[str, ...]:
        happened = f"BROKEN {self.broken} times; {self.happened}" if self.broken else self.happened
        return (
            self.fault, self.step, self.path, happened, f"{self.median:.2f} / {self.longest:.2f}", str(self.tried),
        )  # fmt: skip


def rows(attempts: Sequence[Attempt]) -> list[Row]:
    """One per fault, step and data path, in the order in which they were first tried; shared memory first."""
    groups: dict[tuple[str, str, str], list[Attempt]] = {}
    for attempt in attempts:
        groups.setdefault((attempt.fault, attempt.step, attempt.path), []).append(attempt)
    table = []
    for (fault, step, path), group in groups.items():
        whole = [attempt for attempt in group if attempt.happened]
        seen = Counter(attempt.happened for attempt in whole).most_common()
        happened = seen[0][0] if len(seen) == 1 else "; ".join(f"{count}x {what}" for what, count in seen)
        times = [attempt.seconds for attempt in whole] or [0.0]
        broken = sum(bool(attempt.broken) for attempt in group)
        table.append(Row(fault, step, path, happened, statistics.median(times), max(times), len(group), broken))
    return sorted(table, key=lambda row: row.path != "shm")


def on_terminal(attempts: Sequence[Attempt]) -> Table:
    table = Table(title="Faults between real processes")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in COLUMNS[4:] else "left", overflow="fold")
    for row in rows(attempts):
        table.add_row(*row.cells(), style="red" if row.broken else None)
    return table


def as_json(attempts: Sequence[Attempt], run: dict[str, Any]) -> dict[str, Any]:
    return {**run, "rows": [asdict(row) for row in rows(attempts)], "attempts": [asdict(item) for item in attempts]}


def in_markdown(attempts: Sequence[Attempt], summary: str) -> str:
    lines = [summary, "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows(attempts):
        cells = [cell.replace("<", "&lt;").replace("|", "/") for cell in row.cells()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(text: str, document: Path = DOCUMENT, markers: tuple[str, str] = (BEGIN, END)) -> None:
    """Put ``text`` between the markers. Raises ValueError where the document does not have them, once and in order."""
    old = document.read_text()
    head, begin, rest = old.partition(markers[0])
    _, end, tail = rest.partition(markers[1])
    if not begin or not end:
        raise ValueError(f"{document} has no {markers[0]} ... {markers[1]}")
    document.write_text(f"{head}{begin}\n{text}\n{end}{tail}")
