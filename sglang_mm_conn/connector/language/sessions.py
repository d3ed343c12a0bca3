"""Owns the language rank's sessions, one per data path into its pool, and makes their Register messages."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from sglang_mm_conn.core.layout import Geometry
from sglang_mm_conn.core.messages import Register
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.datapath.base import ReceivePath


class LocalSessions:
    """Makes Register messages. They differ only in the path, the writer slot and the number."""

    def __init__(
        self,
        settings: Settings,
        geometry: Geometry,
        paths: Mapping[str, ReceivePath],
        *,
        incarnation: str,
        server: str,
        rank: int,
        size: int,
        widest_row_bytes: int,
        dtype: str,
    ) -> None:
        """``paths``: at least one. This rank registers with a new encoder over the first, and after each refusal over
        the next.

        Raises DataPathUnavailable if the first path cannot be started.
        """
        self.paths = paths
        self._common: dict[str, Any] = {
            "incarnation": incarnation,
            "server": server,
            "rank": rank,
            "size": size,
            "block_size": settings.block_size,
            "block_bytes": geometry.block_bytes,
            "blocks_per_region": geometry.blocks_per_region,
            "regions": geometry.regions,
            "row_bytes": widest_row_bytes,
            "dtype": dtype,
            "checksum": settings.checksum,
            "max_frame_bytes": settings.max_frame_bytes,
            "max_metadata_bytes": settings.max_metadata_bytes,
        }
        paths[self.first_path].start()

    @property
    def first_path(self) -> str:
        """The path to try first with a new encoder."""
        return next(iter(self.paths))

    def other_path(self, refused: str) -> str | None:
        """The path to try after ``refused``; None if no path is left."""
        names = [*self.paths]
        return dict(itertools.pairwise(names)).get(refused)

    def retire_writer(self, slot: int) -> bool:
        """Whether it is proved that no process can write with ``slot`` now or later. A process may have locked the slot
        over each path that has a lock, so all of them must prove it."""
        return all(path.prove_writer_gone(slot) for path in self.paths.values() if path.exclusive_lock)

    def register_message(self, path: str, slot: int, number: int) -> Register:
        """The ``number``-th Register of this rank, over ``path``.

        This starts the path if necessary, which may take long. Raises DataPathUnavailable, MemoryUnavailable.
        """
        description = self.paths[path].describe(slot)
        return Register(
            mooncake_session_id=self.paths[path].session_id,
            number=number,
            epoch=description.epoch,
            oldest_epoch=description.oldest_epoch,
            memory=description.memory,
            **self._common,
        )

    def close(self) -> None:
        for path in self.paths.values():
            path.close()
