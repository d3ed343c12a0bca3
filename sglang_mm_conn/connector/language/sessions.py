"""The language rank's sessions: the pool as encoders on this host and on others may write it."""

from __future__ import annotations

import logging
import threading
from typing import Any

from sglang_mm_conn.connector.runtime import Runtime
from sglang_mm_conn.core.messages import Region, Register
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.datapath.mooncake import writer as mooncake
from sglang_mm_conn.memory.pool import BlockPool

logger = logging.getLogger(__name__)


class LocalSessions:
    """One session for shared memory, and one for Mooncake that is made when it is first needed.

    The engine listens on all interfaces, so a deployment on one host never makes it.
    """

    def __init__(
        self,
        settings: Settings,
        pool: BlockPool,
        *,
        host: str,
        incarnation: str,
        server: str,
        rank: int,
        size: int,
        widest_row_bytes: int,
        dtype: str,
        runtime: Runtime,
    ) -> None:
        """Raises DataPathUnavailable where SGLANG_MM_CONN_DATA_PATH=mooncake and Mooncake cannot be had."""
        self._settings = settings
        self._pool = pool
        self._host = host
        self._lock = threading.Lock()
        self._engines: dict[int, Any] = {}  # by epoch; the newest is offered
        self._newest_epoch = self._oldest_epoch = 0
        self._make_engine = lambda: runtime.mooncake_engine(settings, host)
        self.mooncake_session = ""
        # A session id is host:port, and the shard rule sums ports.
        port, self._release_port = runtime.reserve_port()
        self._shm_session = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._common: dict[str, Any] = {
            "incarnation": incarnation,
            "server": server,
            "rank": rank,
            "size": size,
            "block_size": settings.block_size,
            "block_bytes": pool.geometry.block_bytes,
            "blocks_per_region": pool.geometry.blocks_per_region,
            "row_bytes": widest_row_bytes,
            "dtype": dtype,
            "checksum": settings.checksum,
            "max_frame_bytes": settings.max_frame_bytes,
            "max_metadata_bytes": settings.max_metadata_bytes,
        }
        if self.first_path == "mooncake":
            self._start_mooncake()

    @property
    def first_path(self) -> str:
        """The path to try first with a new encoder."""
        return "shm" if self._settings.shared_pool else "mooncake"

    def other_path(self, refused: str) -> str | None:
        """What to try after ``refused`` was impossible; None where nothing else is allowed."""
        return "mooncake" if self._settings.data_path == "auto" and refused == "shm" else None

    def retire_writer(self, slot: int) -> bool:
        """Whether nobody can write with ``slot`` any more, now and ever after: see memory.segment."""
        return self._pool.segment is None or self._pool.segment.retire_writer(slot)

    def is_newest(self, path: str, epoch: int) -> bool:
        """Whether ``epoch`` is the one to offer over ``path``. Never waits."""
        return epoch == (0 if path == "shm" else self._newest_epoch)

    def retired_epoch(self, path: str) -> int | None:
        """The newest epoch of ``path`` that was revoked; None where none was. Never waits."""
        return self._oldest_epoch - 1 if path == "mooncake" and self._oldest_epoch > 0 else None

    def session(self, path: str) -> str:
        """The id of the session over ``path``."""
        return self._shm_session if path == "shm" else self.mooncake_session

    def register_message(self, path: str, slot: int, number: int) -> Register:
        """How this rank presents itself over ``path``, for the ``number``-th time.

        Making the Mooncake engine for the first time takes a while.
        """
        if path == "shm":
            segment = self._pool.segment
            assert segment is not None
            return Register(
                mooncake_session_id=self._shm_session,
                number=number,
                epoch=0,
                data_path="shm",
                regions=[Region(0, region.length) for region in self._pool.describe()],
                segment=segment.name,
                nonce=segment.nonce,
                writer_slot=slot,
                **self._common,
            )
        self._start_mooncake()
        with self._lock:
            epoch, engine = max(self._engines.items())
            return Register(
                mooncake_session_id=self.mooncake_session,
                number=number,
                epoch=epoch,
                oldest_epoch=min(self._engines),
                target=mooncake.session_id(engine, self._host),
                data_path="mooncake",
                regions=self._pool.describe(),
                **self._common,
            )

    def _start_mooncake(self) -> None:
        with self._lock:
            if not self._engines:
                self.mooncake_session = mooncake.session_id(self._new_engine(0), self._host)
                count = len(self._pool.regions)
                logger.info("Mooncake session %s: %d regions registered", self.mooncake_session, count)

    def _new_engine(self, epoch: int) -> Any:
        engine = self._make_engine()
        for region in self._pool.regions:
            mooncake.register_memory(engine, region)
        self._engines[epoch] = engine
        self._newest_epoch = epoch
        return engine

    def renew_mooncake(self) -> int:
        """Make the engine of the next epoch for the Mooncake session. Returns the epoch of the one it replaces (which
        stays)."""
        with self._lock:
            replaced = max(self._engines)
            self._new_engine(replaced + 1)
        return replaced

    def destroy_mooncake(self, epoch: int) -> None:
        """Revoke ``epoch``: destroy its engine. When this returns, no write through it lands any more; it takes a
        second."""
        with self._lock:
            engine = self._engines.pop(epoch)
            self._oldest_epoch = min(self._engines)
        del engine  # the last reference: its destructor closes every connection and joins its threads

    def close(self) -> None:
        """The Mooncake engine ends with the process."""
        self._release_port()
