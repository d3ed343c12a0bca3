"""Texts of errors: short, and without the client's media."""

from __future__ import annotations

import base64

import pytest

from sglang_mm_conn.core.texts import MOST_CHARACTERS, as_text


@pytest.mark.parametrize("data", [base64.b64encode(bytes(range(256)) * 100).decode(), "A" * 8_000_000, "ab-_" * 40])
def test_media_in_an_error_are_not_passed_on(data: str) -> None:
    told = as_text(f"cannot identify image data:image/png;base64,{data}: truncated")
    assert told.startswith("cannot identify image data:image/png;base64,") and len(told) <= MOST_CHARACTERS
    assert data[:17] not in told and (len(data) > 60_000 or told.endswith(": truncated"))


def test_an_ordinary_error_is_passed_on_as_it_is() -> None:
    error = f"room {'5e' * 8}-{'a1' * 8}_local_part_0 at http://encoder:30000/path?x=1 failed: {'0f' * 32}"
    assert as_text(error) == error and as_text("") == ""


def test_a_text_has_a_limit_and_no_lone_surrogate() -> None:
    assert as_text("é " * 5000) == ("é " * 5000)[:MOST_CHARACTERS]
    assert as_text("a b c", 3) == "a b"
    as_text("\ud800 bad").encode()
