"""Owns the outcome of a scenario: its goals, the table on the terminal and in docs/results/fleet.md. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from tests.fleet.tally import Tally

COLUMNS = ("scenario", "servers", "requests", "failed", "wrong", "slowest, s", "what was seen")


@dataclass(frozen=True)
class Goal:
    """Something that must be true: what was seen, and what was wanted."""

    seen: str
    wanted: str
    met: bool

    def __str__(self) -> str:
        return f"{self.seen} (wanted: {self.wanted})"


@dataclass
class Outcome:
    """What a scenario came to.

    Attributes:
        scenario: its name, and the case where it has several.
        servers: those that took part.
        tally: every question of its clients; None where it was skipped.
        goals: all that must be true.
        figures: what else was measured.
        troubles: a line for each kind of failed or wrong answer.
        skipped: why it was not tried; empty where it was.
        expected: so many of those that failed had to: there was no encoder.
    """

    scenario: str
    servers: str = ""
    tally: Tally | None = None
    goals: list[Goal] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    skipped: str = ""
    expected: int = 0

    @property
    def missed(self) -> list[Goal]:
        return [goal for goal in self.goals if not goal.met]

    @property
    def verdict(self) -> str:
        return "skipped" if self.skipped else "missed" if self.missed else "met"

    def cells(self) -> tuple[str, ...]:
        """Its row, see COLUMNS."""
        if self.skipped or self.tally is None:
            return (self.scenario, self.servers, "", "", "", "", f"not tried: {self.skipped}")
        seen = [f"MISSED: {goal}" if not goal.met else str(goal) for goal in self.goals]
        return (
            self.scenario,
            self.servers,
            str(self.tally.requests),
            self.tally.failed_text() + (f", {self.expected} of them rightly" if self.expected else ""),
            str(len(self.tally.wrong)),
            f"{self.tally.slowest:.1f}",
            "; ".join([*seen, *self.figures]),
        )

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def no_failure(tally: Tally) -> Goal:
    return Goal(f"{tally.failed_text()} failed", "0", not tally.failed)


def no_wrong_answer(tally: Tally) -> Goal:
    return Goal(f"{len(tally.wrong)} wrong", "0", not tally.wrong)


def at_most(what: str, seen: float, most: float, unit: str = " s") -> Goal:
    return Goal(f"{what} {seen:.2f}{unit}", f"at most {most:.2f}{unit}", seen <= most)


def at_least(what: str, seen: float, least: float, unit: str = "") -> Goal:
    return Goal(f"{what} {seen:.2f}{unit}", f"at least {least:.2f}{unit}", seen >= least)


def summary(outcomes: Sequence[Outcome], seconds: float, data_path: str) -> str:
    """One sentence of the whole run."""
    tried = [one for one in outcomes if not one.skipped]
    tallies = [one.tally for one in tried if one.tally is not None]
    expected = sum(one.expected for one in tried)
    failed = sum(len(one.failed) for one in tallies) - expected
    wrong = sum(len(one.wrong) for one in tallies)
    refused = f" (and {expected} were refused at once while there was no encoder)" if expected else ""
    missed = sum(len(one.missed) for one in tried)
    skipped = f", {len(outcomes) - len(tried)} not tried" if len(tried) < len(outcomes) else ""
    return (
        f"{len(tried)} cases over {data_path} in {seconds:.0f} s{skipped}: of {sum(one.requests for one in tallies)} "
        f"requests to whole sglang servers whose encoders ended, froze, lied or were slow, {failed} failed{refused} "
        f"and {wrong} got a wrong answer. {missed} goals missed."
    )


def on_terminal(outcomes: Sequence[Outcome]) -> Table:
    table = Table(title="What clients noticed", show_lines=True)
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in COLUMNS[2:6] else "left", overflow="fold")
    for one in outcomes:
        table.add_row(*map(Text, one.cells()), style={"missed": "red", "skipped": "yellow"}.get(one.verdict))
    return table


def in_markdown(outcomes: Sequence[Outcome], sentence: str) -> str:
    lines = [
        f"`python -m tests.fleet --write` printed this: {sentence}",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for one in outcomes:
        cells = [cell.replace("<", "&lt;").replace("|", "/") for cell in one.cells()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
