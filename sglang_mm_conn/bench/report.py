"""The tables of `bench transfers`, on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from sglang_mm_conn.bench.measurement import BASELINE, Comparison, Row
from sglang_mm_conn.bench.runner import Special
from sglang_mm_conn.bench.sizes import show_size

if TYPE_CHECKING:
    from rich.console import Console

HEADINGS = (
    "transport", "p50 ms", "p99 ms", "best ms", "GB/s", f"of {BASELINE}", "best-run ratio",
    "speed-up over the best built-in", "CPU s/GB", "rooms/s",
)  # fmt: skip
COMPARISON_HEADINGS = ("what", "size", "ratio", "best-run ratio")
LEFT = frozenset({"transport", "case (A, B)", "what"})  # headings of the columns of words
SPECIAL_HEADINGS = ("case (A, B)", "transport", "A", "B", "B / A")


def by_size(rows: Sequence[Row]) -> dict[int, list[Row]]:
    sizes: dict[int, list[Row]] = {}
    for row in rows:
        sizes.setdefault(row.nbytes, []).append(row)
    return sizes


def cells(row: Row) -> tuple[str, ...]:
    return (
        row.transport,
        _short(row.median_ms),
        _short(row.p99_ms),
        _short(row.best_ms),
        f"{row.gbytes_per_s:.2f}",
        _share(row.of_baseline),
        _share(row.of_baseline_best),
        "-" if row.speed_up is None else f"{row.speed_up:.1f}",
        f"{row.cpu_s_per_gbyte:.2f}",
        ", ".join(f"{rate:,.0f} at {in_flight}" for in_flight, rate in row.rooms_per_s.items()) or "-",
    )


def special_cells(special: Special) -> tuple[str, ...]:
    unit = special.unit
    one, other = f"{_short(special.one)} {unit}", f"{_short(special.other)} {unit}"
    return (special.what, special.transport, one, other, f"{special.ratio:.2f}")


def comparison_cells(one: Comparison) -> tuple[str, ...]:
    return (one.what, show_size(one.nbytes), f"{one.ratio:.2f}", f"{one.best:.2f}")


def print_report(
    console: Console, rows: Sequence[Row], specials: Sequence[Special], comparisons: Sequence[Comparison]
) -> None:
    from rich.table import Table

    for nbytes, same in by_size(rows).items():
        table = Table(title=f"{show_size(nbytes)} ({same[0].rounds} rounds)", title_justify="left")
        for heading in HEADINGS:
            table.add_column(
                heading, justify="left" if heading == "transport" else "right", no_wrap=heading == "transport"
            )
        for row in same:
            table.add_row(*cells(row))
        console.print(table)
    if specials:
        table = Table(title="Special cases", title_justify="left")
        for heading in SPECIAL_HEADINGS:
            table.add_column(heading, justify="left" if heading in LEFT else "right")
        for special in specials:
            table.add_row(*special_cells(special))
        console.print(table)
    if comparisons:
        table = Table(*COMPARISON_HEADINGS, title="Compared within each round", title_justify="left")
        for one in comparisons:
            table.add_row(*comparison_cells(one))
        console.print(table)
    calls = per_room_lines(rows)
    if calls:
        console.print("Created per room, both processes together:")
        for line in calls:
            console.print(f"  {line}", markup=False, highlight=False)


def per_room_lines(rows: Sequence[Row]) -> list[str]:
    """What each transport creates per room: the longest list of all sizes."""
    lines: dict[str, str] = {}
    for row in rows:
        counts = {name: number for name, number in row.per_room.items() if number >= 0.005}
        text = ", ".join(f"{number:.2f} {name}" for name, number in counts.items())
        if row.transport not in lines or len(text) > len(lines[row.transport]):
            lines[row.transport] = text
    nothing = "no thread, socket, connection, HTTP call or registration"
    return [f"{transport}: {text or nothing}" for transport, text in lines.items()]


def markdown(rows: Sequence[Row], specials: Sequence[Special], comparisons: Sequence[Comparison]) -> str:
    """The same tables in Markdown."""
    parts = []
    for nbytes, same in by_size(rows).items():
        parts.append(f"### {show_size(nbytes)}\n\n" + markdown_table(HEADINGS, [cells(row) for row in same]))
    if specials:
        parts.append(
            "### Special cases\n\n" + markdown_table(SPECIAL_HEADINGS, [special_cells(one) for one in specials])
        )
    if comparisons:
        table = markdown_table(COMPARISON_HEADINGS, [comparison_cells(one) for one in comparisons])
        parts.append(f"### Compared within each round\n\n{table}")
    parts.append("### Created per room\n\n" + "\n".join(f"- {line}" for line in per_room_lines(rows)))
    return "\n\n".join(parts)


def markdown_table(headings: Sequence[str], lines: Sequence[Sequence[str]], left: Collection[str] = LEFT) -> str:
    """A Markdown table. The columns with the headings ``left`` are aligned left, the others right."""
    rule = "|".join("---" if heading in left else "---:" for heading in headings)
    return "\n".join([f"| {' | '.join(headings)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)])


def _short(number: float) -> str:
    return f"{number:.3f}" if number < 1 else f"{number:.2f}" if number < 100 else f"{number:.0f}"


def _share(part: float | None) -> str:
    return "-" if part is None else f"{part:.0%}"
