"""Owns the demo's report, and the decision whether the run was a success."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sglang_mm_conn.demo import timeline
from sglang_mm_conn.demo.chat import Answer
from sglang_mm_conn.demo.questions import Question


@dataclass(frozen=True)
class Outcome:
    """One question and both answers to it."""

    question: Question
    rid: str  # what the language server calls the request
    colocated: Answer
    split: Answer

    @property
    def same(self) -> bool:
        return self.split.same_as(self.colocated)


def print_report(console: Console, outcomes: Sequence[Outcome], language_log: str, first_offer: int | None) -> bool:
    """Prints answers and timeline. Returns whether all went well. `first_offer` is None with a backend of sglang."""
    rooms = timeline.received(language_log)
    console.print(_answers(outcomes))
    if rooms:
        console.print(_timeline(outcomes, rooms))
    faults = verdict(outcomes, rooms, first_offer)
    for fault in faults:
        console.print(fault, style="bold red", markup=False)
    if not faults:
        console.print(_summary(outcomes, rooms), style="bold green")
    return not faults


def verdict(outcomes: Sequence[Outcome], rooms: Sequence[timeline.Received], first_offer: int | None) -> list[str]:
    """What went wrong, one sentence each; empty when nothing did."""
    faults = [f"{outcome.question.name}: the answers differ" for outcome in outcomes if not outcome.same]
    if first_offer is None:
        return faults
    if not rooms:
        return [*faults, "no embedding came through the connector: the language server logged none"]
    largest = max(room.tokens for room in rooms)
    if first_offer and first_offer < largest and not any(room.resumes for room in rooms):
        faults.append(
            f"no transfer was resumed, though --first-offer is {first_offer} and an embedding had {largest} tokens"
        )
    return faults


def _summary(outcomes: Sequence[Outcome], rooms: Sequence[timeline.Received]) -> str:
    text = f"All {len(outcomes)} answers are the same"
    if rooms:
        text += f"; {len(rooms)} embeddings received, with {sum(room.resumes for room in rooms)} resumes"
    return text + "."


def _answers(outcomes: Sequence[Outcome]) -> Table:
    table = Table("request", "images", "colocated", "encoder + language", "same", title="Answers")
    for outcome in outcomes:
        table.add_row(
            outcome.question.name,
            str(len(outcome.question.images)),
            _shown(outcome.colocated),
            _shown(outcome.split),
            Text("yes", "green") if outcome.same else Text("NO", "bold red"),
        )
    return table


def _timeline(outcomes: Sequence[Outcome], rooms: Sequence[timeline.Received]) -> Table:
    names = {outcome.rid: outcome.question.name for outcome in outcomes}
    table = Table(title="Embeddings, as the language server received them")
    for heading in ("request", "room"):
        table.add_column(heading, overflow="fold")
    for heading in ("tokens", "windows", "resumes"):
        table.add_column(heading, justify="right")
    table.add_column("data path")
    for heading in ("ms", "MB/s"):
        table.add_column(heading, justify="right")
    for room in rooms:
        table.add_row(
            names.get(room.rid, room.rid),
            room.room,
            *(str(count) for count in (room.tokens, room.windows, room.resumes)),
            room.path,
            f"{room.ms:.1f}",
            f"{room.rate:.1f}",
        )
    return table


def _shown(answer: Answer) -> Text:
    return Text(answer.text) if answer.ok else Text(f"HTTP {answer.status}: {answer.error}", "red")
