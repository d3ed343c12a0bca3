"""docs/protocol.md says what the code says: every message and field, every promise, files and names that exist."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from sglang_mm_conn.core.messages import PROTOCOL_VERSION, AnyMemory, FromEncoder, FromLanguage, Memory, Message
from tests.pages import ROOT

PAGE = (ROOT / "docs" / "protocol.md").read_text()
PACKAGE = ROOT / "sglang_mm_conn"
MESSAGES = {cls.__name__: cls for cls in Message.__subclasses__()}
PROMISES = [f"P{number}" for number in range(1, 11)]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _table(heading: str) -> list[list[str]]:
    """The rows of the first table that has this heading."""
    lines = PAGE.splitlines()
    first = lines.index(heading) + 2
    last = next(number for number in range(first, len(lines)) if not lines[number].startswith("|"))
    return [_cells(line) for line in lines[first:last]]


def _quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def _promises() -> dict[str, str]:
    text = PAGE.partition("## The ten promises")[2].partition("\n## ")[0]
    parts = re.split(r"^### (P\d+) ", text, flags=re.MULTILINE)
    assert len(parts[1::2]) == len(set(parts[1::2]))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


ROWS = _table("| message | direction | fields | answered by |")


def test_every_message_has_one_row() -> None:
    assert sorted(name for row in ROWS for name in _quoted(row[0])) == sorted(MESSAGES)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip("`"))
def test_a_row_has_the_direction_and_exactly_the_fields_of_its_message(row: list[str]) -> None:
    (name,) = _quoted(row[0])
    fields = _quoted(row[2])
    assert len(fields) == len(set(fields)) and set(fields) == set(MESSAGES[name].__struct_fields__)
    language, encoder = (MESSAGES[name] in get_args(side) for side in (FromLanguage, FromEncoder))
    expected = "both" if language and encoder else "language -> encoder" if language else "encoder -> language"
    assert row[1] == expected
    assert {answer for answer in _quoted(row[3]) if answer[0].isupper()} <= set(MESSAGES)


def test_every_kind_of_memory_has_one_row_with_its_tag_and_exactly_its_fields() -> None:
    rows = {name: row for row in _table("| memory | kind | fields |") for name in _quoted(row[0])}
    kinds = {cls.__name__: cls for cls in Memory.__subclasses__()}
    assert list(rows) == list(kinds) and set(get_args(AnyMemory)) == set(kinds.values())
    for name, row in rows.items():
        assert row[1] == kinds[name].__struct_config__.tag
        assert _quoted(row[2]) == list(kinds[name].__struct_fields__), name


def test_every_promise_is_there_in_order_with_what_keeps_it() -> None:
    promises = _promises()
    assert list(promises) == PROMISES
    for promise, text in promises.items():
        assert len(re.findall(r"^\*\*[^*]+\.\*\*$", text, re.MULTILINE)) == 1, promise
        modules, tests = text.partition("Kept by: ")[2].split("tests:")
        assert _quoted(modules) and all((PACKAGE / name).is_file() for name in _quoted(modules)), promise
        assert _quoted(tests) and all((ROOT / name).is_file() for name in _quoted(tests)), promise


def test_every_file_that_the_page_names_exists() -> None:
    names = re.findall(r"[\w/]+\.py\b", PAGE)
    assert len(names) > 50
    for name in names:
        assert (ROOT / name if name.startswith("tests/") else PACKAGE / name).is_file(), name


def test_every_name_of_the_interface_is_in_each_file_that_the_page_puts_it_in() -> None:
    rows = _table("| name | what it means here | where |")
    assert len(rows) >= 20
    for names, _, files in rows:
        for file in _quoted(files):
            text = (PACKAGE / file).read_text()
            for name in _quoted(names):
                assert re.search(rf"\b{name}\b", text), (name, file)


def test_every_promise_that_code_tests_or_pages_cite_is_one_of_the_ten() -> None:
    texts = [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").glob("*.md")]
    for path in texts:
        cited = re.findall(r"\b(P\d+)\b", path.read_text())
        assert set(cited) <= set(PROMISES) or path.name == "test_protocol_page.py", (path, cited)


def test_version_fits_the_byte_in_front_of_a_frame_and_is_not_the_mark_of_a_batch() -> None:
    assert 0 < PROTOCOL_VERSION < 0xFF
