"""Owns the table of all comparisons, for the terminal and for docs/requests.md."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from tests.parity.compare import Compared

Found = Sequence[tuple[str, str, Compared]]


def summary(found: Found, seconds: float) -> str:
    same = sum(not one.difference for _, _, one in found)
    known = sum(bool(one.difference) and one.ok for _, _, one in found)
    runs = dict.fromkeys(f"{kind} over {path}" for kind, path, _ in found)
    return (
        f"{len(found)} forms in {seconds:.0f} s ({', '.join(runs)}): {same} same, {known} differ for a reason that is "
        f"known, {len(found) - same - known} differ without."
    )


def in_markdown(found: Found, seconds: float, options: Sequence[str]) -> str:
    """One row a form; a form that was asked of several models, or over several paths, is same where all are."""
    command = " ".join(["python -m tests.parity", *options])
    lines = [f"`{command}` printed this: {summary(found, seconds)}"]
    by_group: dict[str, dict[str, list[Compared]]] = {}
    for _, _, one in found:
        by_group.setdefault(one.form.group, {}).setdefault(one.form.name, []).append(one)
    for group, forms in by_group.items():
        lines += ["", f"### {group}", "", "| form | colocated | here | same |", "|---|---|---|---|"]
        lines += [_row(name, compared) for name, compared in forms.items()]
    return "\n".join(lines)


def _row(name: str, compared: Sequence[Compared]) -> str:
    there = ", ".join(key for key, _ in groupby(one.there for one in compared))
    here = ", ".join(key for key, _ in groupby(one.here for one in compared))
    worst = next((one for one in compared if not one.ok), None) or next((one for one in compared if one.difference),
                                                                        None)  # fmt: skip
    same = "yes" if worst is None else f"no: {worst.form.differs or worst.difference}"
    return f"| {_cell(name)} | {there} | {here} | {_cell(same)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
