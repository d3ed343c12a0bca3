"""Names of tests are short enough to be read in a report."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parent
LONGEST = 80


def long_names(source: str) -> list[str]:
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [found.name for found in functions if found.name.startswith("test_") and len(found.name) > LONGEST]


def test_no_name_of_a_test_is_too_long() -> None:
    files = sorted(TESTS.rglob("test_*.py"))
    found = {f"{path.relative_to(TESTS)}::{name}" for path in files for name in long_names(path.read_text())}
    assert not found


def test_long_name_is_found() -> None:
    fits, long = "test_".ljust(LONGEST, "x"), "test_".ljust(LONGEST + 1, "x")
    source = f"def {fits}(): ...\nclass Test:\n    def {long}(self): ...\ndef {long[5:]}_for_help(): ...\n"
    assert long_names(source) == [long]
