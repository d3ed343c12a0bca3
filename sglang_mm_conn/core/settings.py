"""Owns the settings of the connector: the environment variable, default, allowed range and meaning of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sglang_mm_conn.core.errors import SettingError

DATA_PATHS = ("auto", "shm", "mooncake")
DEVICES = ("cpu", "cuda")


def _integer(low: int, high: int) -> tuple[Callable[[str], Any], str]:
    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    return parse, f"a whole number from {low} to {high}"


def _seconds(low: float, high: float) -> tuple[Callable[[str], Any], str]:
    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    return parse, f"seconds from {low:g} to {high:g}"


def _choice(*names: str) -> tuple[Callable[[str], Any], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(text)
        return text

    return parse, "one of " + ", ".join(names)


def _flag() -> tuple[Callable[[str], Any], str]:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}

    def parse(text: str) -> bool:
        try:
            return words[text.lower()]
        except KeyError:
            raise ValueError(text) from None

    return parse, "1 or 0"


def _text() -> tuple[Callable[[str], Any], str]:
    return str, "text"


def _setting(env: str, default: Any, kind: tuple[Callable[[str], Any], str], help_text: str) -> Any:
    parse, allowed = kind
    return field(default=default, metadata={"env": env, "parse": parse, "allowed": allowed, "help": help_text})


@dataclass(frozen=True)
class Settings:
    """The settings that both sides read at start. ``None``: the side decides at start and logs the value."""

    blocks: int | None = _setting(
        "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE",
        None,
        _integer(1, 1 << 24),
        "blocks in the language server's pool; unset: as many as fit into 256 MiB and into half of the free /dev/shm",
    )
    block_size: int = _setting(
        "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE",
        128,
        _integer(1, 1 << 20),
        "size of a block in rows (of the model's widest row); must be the same on encoder and language server",
    )
    first_offer: int | None = _setting(
        "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE",
        None,
        _integer(1, 1 << 30),
        "most rows offered in window 0; resumes offer the rest; unset: as many as are needed and free blocks hold",
    )
    queues: int = _setting(
        "SGLANG_DISAGGREGATION_QUEUE_SIZE",
        4,
        _integer(1, 256),
        "transfer queues of an encoder; a room's queue is the sum of the ports of its sessions, modulo this number",
    )
    workers: int = _setting(
        "SGLANG_DISAGGREGATION_THREAD_POOL_SIZE",
        16,
        _integer(1, 1024),
        "transfer workers of an encoder, divided among its queues (at least one each); one language rank gets at "
        "most half as many as one queue has (at least one)",
    )
    data_path: str = _setting(
        "SGLANG_MM_CONN_DATA_PATH",
        "auto",
        _choice(*DATA_PATHS),
        "auto: shared memory if encoder and language server can prove that they run on one host, otherwise Mooncake; "
        "shm, mooncake: this path, or an error if it is unavailable",
    )
    pool_device: str = _setting(
        "SGLANG_MM_CONN_POOL_DEVICE",
        "cpu",
        _choice(*DEVICES),
        "device of the memory that data paths read and write: a language server's pool, an encoder's staging memory; "
        "cuda: on the GPU, which only Mooncake (its CUDA build) can reach, even on one host",
    )
    embedding_device: str | None = _setting(
        "SGLANG_MM_CONN_EMBEDDING_DEVICE",
        None,
        _choice(*DEVICES),
        "device of embeddings; cuda: they stay on the encoder's GPU until they are sent, and are copied out to the "
        "language server's GPU, into memory that sglang does not count; unset: same as SGLANG_MM_CONN_POOL_DEVICE",
    )
    key_file: str | None = _setting(
        "SGLANG_MM_CONN_KEY_FILE",
        None,
        _text(),
        "file with the deployment's secret, the same on every server (python -m sglang_mm_conn keygen FILE makes it)",
    )
    insecure: bool = _setting(
        "SGLANG_MM_CONN_INSECURE",
        False,
        _flag(),
        "1: serve beyond loopback without a key; then anybody who reaches the ports can read and forge embeddings",
    )
    regions: int = _setting(
        "SGLANG_MM_CONN_REGIONS",
        4,
        _integer(1, 64),
        "registered regions that the pool is divided into",
    )
    host: str | None = _setting(
        "SGLANG_MM_CONN_HOST",
        None,
        _text(),
        "address at which Mooncake reaches this process; unset: --host, or the address that sglang finds if --host is "
        "loopback or a wildcard",
    )
    mooncake_protocol: str = _setting(
        "SGLANG_MM_CONN_MOONCAKE_PROTOCOL",
        "rdma",
        _choice("rdma", "tcp"),
        "protocol of the Mooncake engine; without an RDMA device, Mooncake itself falls back from rdma to tcp",
    )
    mooncake_device: str = _setting(
        "SGLANG_MM_CONN_MOONCAKE_DEVICE",
        "",
        _text(),
        "RDMA devices for Mooncake, separated by commas; empty: the engine chooses",
    )
    staging_bytes: int = _setting(
        "SGLANG_MM_CONN_STAGING_BYTES",
        64 << 20,
        _integer(1 << 20, 1 << 36),
        "bytes of an encoder's staging memory, the registered memory through which Mooncake sends rows; allocated at "
        "first use",
    )
    view_percent: int = _setting(
        "SGLANG_MM_CONN_VIEW_PERCENT",
        50,
        _integer(0, 90),
        "percentage of the pool's blocks that embeddings may keep as views until their requests end; other embeddings "
        "are copied out; 0: no views",
    )
    result_cache_bytes: int = _setting(
        "SGLANG_MM_CONN_RESULT_CACHE_BYTES",
        512 << 20,
        _integer(0, 1 << 44),
        "bytes of the buffer cache: memory of earlier results that a language server reuses (fresh memory is several "
        "times slower to fill); 0: no cache",
    )
    heap_kept_bytes: int = _setting(
        "SGLANG_MM_CONN_HEAP_KEPT_BYTES",
        256 << 20,
        _integer(0, (1 << 31) - 1),
        "malloc trim threshold of each encoder and scheduler process: freed bytes that stay on the heap for reuse; if "
        "more are free, glibc returns all of them to the kernel, and getting memory back costs a page fault per page; "
        "does not apply to tensors of 32 MiB and more; 0, or a MALLOC_* variable set by the user: glibc's behaviour",
    )
    copiers: int = _setting(
        "SGLANG_MM_CONN_MOVERS",
        2,
        _integer(1, 64),
        "threads of a language server that copy rows out of blocks",
    )
    heartbeat: float = _setting(
        "SGLANG_MM_CONN_HEARTBEAT_SECONDS",
        1.0,
        _seconds(0.05, 60),
        "interval of the heartbeats that each side of a control connection sends",
    )
    peer_timeout: float = _setting(
        "SGLANG_MM_CONN_PEER_TIMEOUT_SECONDS",
        10.0,
        _seconds(0.2, 3600),
        "a peer that sends nothing for so long is lost",
    )
    claim_timeout: float = _setting(
        "SGLANG_MM_CONN_CLAIM_TIMEOUT_SECONDS",
        30.0,
        _seconds(0.2, 3600),
        "how long an announced room may stay unclaimed before its encode is released",
    )
    drain_seconds: float = _setting(
        "SGLANG_MM_CONN_DRAIN_SECONDS",
        20.0,
        _seconds(0, 3600),
        "how long an encoder that gets SIGTERM may finish the requests that it holds before it ends; new ones are "
        "refused at once; 0: it ends as sglang does without this plugin",
    )
    doubt_patience: float = _setting(
        "SGLANG_MM_CONN_DOUBT_SECONDS",
        5.0,
        _seconds(0.1, 3600),
        "how long blocks of a failed Mooncake write stay in quarantine before the engine is replaced to free them",
    )
    dispatch_tries: int = _setting(
        "SGLANG_MM_CONN_DISPATCH_TRIES",
        3,
        _integer(1, 16),
        "most encoders that a language server sends one part of a request to, one after the other, if they fail; "
        "1: no other encoder is tried",
    )
    dispatch_wait: float = _setting(
        "SGLANG_MM_CONN_DISPATCH_WAIT_SECONDS",
        0.0,
        _seconds(0, 3600),
        "how long a request waits for an encoder to come back if none is up; 0: it gets HTTP 503 at once",
    )
    max_embedding_bytes: int = _setting(
        "SGLANG_MM_CONN_MAX_EMBEDDING_BYTES",
        16 << 30,
        _integer(1 << 10, 1 << 44),
        "largest embedding that a language server accepts",
    )
    max_frame_bytes: int = _setting(
        "SGLANG_MM_CONN_MAX_FRAME_BYTES",
        1 << 20,
        _integer(1 << 20, 1 << 30),
        "largest control message, its metadata not counted",
    )
    max_metadata_bytes: int = _setting(
        "SGLANG_MM_CONN_MAX_METADATA_BYTES",
        64 << 20,
        _integer(1 << 10, 1 << 32),
        "largest metadata (grids, time stamps) of one part",
    )
    checksum: bool = _setting(
        "SGLANG_MM_CONN_CHECKSUM",
        False,
        _flag(),
        "1: the encoder sends a checksum of every embedding and the language server verifies it; must be the same on "
        "both sides",
    )

    @property
    def shared_pool(self) -> bool:
        """Whether the pool is shared memory. A pool on a GPU never is; only Mooncake can reach it."""
        return self.data_path != "mooncake" and self.pool_device == "cpu"

    @property
    def resolved_embedding_device(self) -> str:
        return self.embedding_device or self.pool_device

    @property
    def workers_per_queue(self) -> int:
        return max(1, self.workers // self.queues)

    @property
    def all_workers(self) -> int:
        """Transfer workers of an encoder, which is the limit of concurrent data calls of the workers."""
        return self.queues * self.workers_per_queue

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings from ``environ``. Raises SettingError with the variable, its value and the range."""
        values: dict[str, Any] = {}
        for item in fields(cls):
            text = environ.get(item.metadata["env"], "").strip()
            if not text:
                continue
            try:
                values[item.name] = item.metadata["parse"](text)
            except ValueError:
                raise SettingError(
                    f"{item.metadata['env']}={text!r} is not allowed: must be {item.metadata['allowed']}"
                ) from None
        settings = cls(**values)
        if settings.peer_timeout <= settings.heartbeat:
            raise SettingError(
                f"SGLANG_MM_CONN_PEER_TIMEOUT_SECONDS={settings.peer_timeout:g} must be larger than "
                f"SGLANG_MM_CONN_HEARTBEAT_SECONDS={settings.heartbeat:g}"
            )
        if settings.data_path == "shm" and settings.pool_device != "cpu":
            raise SettingError(
                f"SGLANG_MM_CONN_POOL_DEVICE={settings.pool_device} cannot be shared memory: "
                "SGLANG_MM_CONN_DATA_PATH must be auto or mooncake, not shm"
            )
        return settings

    @classmethod
    def describe(cls) -> list[tuple[str, str, str, str]]:
        """(variable, default, allowed, meaning) of every setting, for ``--help`` and the documentation."""
        return [
            (
                item.metadata["env"],
                "unset" if item.default is None else str(item.default),
                item.metadata["allowed"],
                item.metadata["help"],
            )
            for item in fields(cls)
        ]
