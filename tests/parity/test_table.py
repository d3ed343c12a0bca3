"""The table says of each form whether it is the same on every model and path."""

from __future__ import annotations

from pathlib import Path

from tests.parity.form import Forms
from tests.parity.table import Row, Table

FORMS = Forms("G")
FORMS.post("same", "/", {})
FORMS.post("known", "/", {}, differs="sglang errs")
FORMS.post("bad | <b>", "/", {})


def row(name: str, kind: str = "a", difference: str = "", here: str = "200") -> Row:
    return Row(kind, "shm", "G", name, "200", here, difference, 1.0)


def table(*rows: Row) -> Table:
    made = Table(FORMS)
    made.rows += rows
    return made


def test_a_form_is_the_same_if_it_is_on_every_model() -> None:
    text = table(row("same"), row("same", "b"), row("known", difference="x"), row("bad | <b>", "a"),
                 row("bad | <b>", "b", "y", "500")).in_markdown()  # fmt: skip
    assert "| same | 200 | 200 | yes |" in text and "| known | 200 | 200 | no: sglang errs |" in text
    assert "| bad \\| &lt;b> | 200 | 200 or 500 | no: y |" in text
    assert "`python -m tests.parity` printed this: 5 forms (a over shm, b over shm) in 5 s: 3 same, 1 differ" in text


def test_rows_of_an_earlier_run_are_added(tmp_path: Path) -> None:
    table(row("same")).save(tmp_path / "rows.json")
    made = table(row("known"))
    made.read(tmp_path / "rows.json")
    assert made.rows == [row("known"), row("same")] and not made.bad(made.rows)
