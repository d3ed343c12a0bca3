"""The interface of a data path, seen from the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from sglang_mm_conn.core.layout import Extent
from sglang_mm_conn.core.messages import Register


class WriteLink(Protocol):
    """Writes into the memory of one session."""

    name: str
    synchronous: bool  # whether nothing more lands once ``write`` has ended, however it ended

    def write(self, source: torch.Tensor, extents: Sequence[Extent]) -> None:
        """Write bytes of ``source``, an embedding (uint8, one dimension), to ``extents``; returns when all of them are
        in place.

        The extents were checked against the session's geometry, and lie within ``source``. Raises DataPathError; where
        it is ``in_doubt``, bytes may still land, and the link has taken care that its own source memory is not reused.
        """

    def close(self) -> None:
        """Give the link up. Only when no write is under way."""


class DataPath(Protocol):
    """Opens links of one kind."""

    name: str

    def open(self, register: Register) -> WriteLink:
        """A link to the session that presents itself. Raises DataPathUnavailable saying why there can be none."""

    def close(self) -> None:
        """Give everything up at the end of the process."""
