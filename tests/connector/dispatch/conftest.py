"""Fixtures of the dispatcher's tests: encoders that are only HTTP servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.connector.dispatch.encoders import Answer, FakeEncoder, arrived


@pytest.fixture
def encoder() -> Iterator[Callable[..., FakeEncoder]]:
    """Makes encoders, which end with the test."""
    made: list[FakeEncoder] = []

    def make(encode: Answer = arrived, *, port: int = 0, prefix_cache: bool = False) -> FakeEncoder:
        made.append(FakeEncoder(encode, port=port, prefix_cache=prefix_cache))
        return made[-1]

    yield make
    for one in made:
        one.close()
