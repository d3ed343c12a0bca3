"""Owns the rows of all comparisons: on the terminal, in a JSON file, and in docs/requests.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from tests.parity.compare import Compared
from tests.parity.form import Form


class Row(msgspec.Struct, frozen=True):
    """One form on one model over one data path, as ``Compared`` has it."""

    kind: str
    data_path: str
    group: str
    name: str
    there: str
    here: str
    difference: str
    seconds: float

    @classmethod
    def of(cls, kind: str, data_path: str, one: Compared) -> Row:
        form = one.form
        return cls(kind, data_path, form.group, form.name, one.there, one.here, one.difference, one.seconds)


class Table:
    """Rows, and why some forms are known to differ."""

    def __init__(self, forms: Sequence[Form]) -> None:
        self.rows: list[Row] = []
        self._reasons = {(form.group, form.name): form.differs for form in forms}

    def reason(self, row: Row) -> str:
        return self._reasons.get((row.group, row.name), "")

    def bad(self, rows: Sequence[Row]) -> list[Row]:
        """Those that differ without a reason."""
        return [row for row in rows if row.difference and not self.reason(row)]

    def read(self, path: Path) -> None:
        """Add the rows of an earlier run. Raises OSError, msgspec.DecodeError."""
        self.rows += msgspec.json.decode(path.read_bytes(), type=list[Row])

    def save(self, path: Path) -> None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self.rows)))

    def summary(self) -> str:
        same, bad = sum(not row.difference for row in self.rows), len(self.bad(self.rows))
        runs = dict.fromkeys(f"{row.kind} over {row.data_path}" for row in self.rows)
        seconds = sum(row.seconds for row in self.rows)
        return (
            f"{len(self.rows)} forms ({', '.join(runs)}) in {seconds:.0f} s: {same} same, "
            f"{len(self.rows) - same - bad} differ for a reason that is known, {bad} differ without."
        )

    def in_markdown(self) -> str:
        """One line a form. One that was asked of several models, or over several paths, is the same if all are."""
        lines = [f"`python -m tests.parity` printed this: {self.summary()}"]
        groups: dict[str, dict[str, list[Row]]] = {}
        for row in self.rows:
            groups.setdefault(row.group, {}).setdefault(row.name, []).append(row)
        for group, forms in groups.items():
            lines += ["", f"### {group}", "", "| form | colocated | here | same |", "|---|---|---|---|"]
            lines += [self._line(name, rows) for name, rows in forms.items()]
        return "\n".join(lines)

    def _line(self, name: str, rows: Sequence[Row]) -> str:
        there, here = (
            " or ".join(dict.fromkeys(statuses)) for statuses in ([r.there for r in rows], [r.here for r in rows])
        )
        differ = self.bad(rows) or [row for row in rows if row.difference]
        same = f"no: {self.reason(differ[0]) or differ[0].difference}" if differ else "yes"
        return f"| {_cell(name)} | {there} | {here} | {_cell(same)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
