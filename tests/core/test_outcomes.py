"""Outcomes: the HTTP status that a client receives."""

from http import HTTPStatus

import pytest

from sglang_mm_conn.core.outcomes import failure, known_http_status


@pytest.mark.parametrize(
    ("code", "expected"),
    [(408, 408), (502, 502), (499, 400), (450, 400), (520, 502), (598, 500), (0, 502), (-1, 502), (700, 502)],
)
def test_every_code_is_one_that_python_knows_so_that_sglangs_scheduler_survives_it(code: int, expected: int) -> None:
    assert known_http_status(code) == expected
    HTTPStatus(expected)


@pytest.mark.parametrize(("given", "kept"), [(200, 410), (0, 410), (399, 410), (404, 404), (499, 499), (599, 599)])
def test_a_failed_room_has_the_code_of_a_failure(given: int, kept: int) -> None:
    outcome = failure("no such image", given)
    assert outcome.code == kept and not outcome.succeeded
