"""Every setting of the connector, declared once: environment variable, default, allowed range, meaning."""

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
    """What both ends read at start. Unset means the default; ``None`` means "decide at start and say so"."""

    blocks: int | None = _setting(
        "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE",
        None,
        _integer(1, 1 << 24),
        "blocks in the language server's pool; unset: as many as fit 256 MiB and half of what /dev/shm has free",
    )
    block_size: int = _setting(
        "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE",
        128,
        _integer(1, 1 << 20),
        "tokens of the model's widest row in one block; must be the same on encoder and language server",
    )
    first_offer: int | None = _setting(
        "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE",
        None,
        _integer(1, 1 << 30),
        "most tokens offered at first, the rest follows by resume; unset: what is needed and free",
    )
    queues: int = _setting(
        "SGLANG_DISAGGREGATION_QUEUE_SIZE",
        4,
        _integer(1, 256),
        "transfer queues of an encoder; a room's queue is the port sum of its sessions modulo this",
    )
    workers: int = _setting(
        "SGLANG_DISAGGREGATION_THREAD_POOL_SIZE",
        16,
        _integer(1, 1024),
        "transfer workers of an encoder, shared out over its queues (at least one each); one language rank gets at "
        "most half of a queue's at a time",
    )
    data_path: str = _setting(
        "SGLANG_MM_CONN_DATA_PATH",
        "auto",
        _choice(*DATA_PATHS),
        "auto: shared memory where both ends can prove it is one host, Mooncake otherwise; "
        "a forced path that cannot be had is an error",
    )
    pool_device: str = _setting(
        "SGLANG_MM_CONN_POOL_DEVICE",
        "cpu",
        _choice(*DEVICES),
        "memory that the engine reads and writes: a language server's pool, an encoder's staging memory; "
        "cuda: on the GPU, reached over Mooncake only (its CUDA build), on one host too",
    )
    embedding_device: str | None = _setting(
        "SGLANG_MM_CONN_EMBEDDING_DEVICE",
        None,
        _choice(*DEVICES),
        "where embeddings are: cuda leaves them on the encoder's GPU until they are sent, and puts them on the "
        "language server's as they arrive, in memory that sglang does not count; unset: as SGLANG_MM_CONN_POOL_DEVICE",
    )
    key_file: str | None = _setting(
        "SGLANG_MM_CONN_KEY_FILE",
        None,
        _text(),
        "file with the deployment's secret (python -m sglang_mm_conn keygen FILE), the same on every server",
    )
    insecure: bool = _setting(
        "SGLANG_MM_CONN_INSECURE",
        False,
        _flag(),
        "1: serve beyond loopback without a key; anybody who reaches the ports can then read and forge embeddings",
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
        "address under which this process is reached by Mooncake; unset: --host, or what sglang finds where that is "
        "loopback or a wildcard",
    )
    mooncake_protocol: str = _setting(
        "SGLANG_MM_CONN_MOONCAKE_PROTOCOL",
        "rdma",
        _choice("rdma", "tcp"),
        "what the Mooncake engine is asked for; without an RDMA device it falls back to TCP by itself",
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
        "registered memory of an encoder through which rows leave over Mooncake, made when it is first needed",
    )
    view_percent: int = _setting(
        "SGLANG_MM_CONN_VIEW_PERCENT",
        50,
        _integer(0, 90),
        "share of the pool that finished embeddings may occupy while their requests live, instead of being copied out "
        "of it; 0: all are copied out",
    )
    result_cache_bytes: int = _setting(
        "SGLANG_MM_CONN_RESULT_CACHE_BYTES",
        512 << 20,
        _integer(0, 1 << 44),
        "memory of finished embeddings that a language server keeps to use again (fresh memory is several times slower "
        "to fill); 0: none",
    )
    heap_kept_bytes: int = _setting(
        "SGLANG_MM_CONN_HEAP_KEPT_BYTES",
        256 << 20,
        _integer(0, (1 << 31) - 1),
        "freed memory that may stay at the end of the heap of each encoder and scheduler process for the next request; "
        "more goes to the kernel as a whole, and comes back page by page; tensors of 32 MiB and more are elsewhere; "
        "0, or a choice of the user's (MALLOC_TRIM_THRESHOLD_ and the like): as glibc has it",
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
        "how often each side of a control connection says that it lives",
    )
    peer_timeout: float = _setting(
        "SGLANG_MM_CONN_PEER_TIMEOUT_SECONDS",
        10.0,
        _seconds(0.2, 3600),
        "silence after which a peer counts as lost",
    )
    claim_timeout: float = _setting(
        "SGLANG_MM_CONN_CLAIM_TIMEOUT_SECONDS",
        30.0,
        _seconds(0.2, 3600),
        "how long an announced room may wait for a request that claims it, before its encode is released",
    )
    doubt_patience: float = _setting(
        "SGLANG_MM_CONN_DOUBT_SECONDS",
        5.0,
        _seconds(0.1, 3600),
        "how long blocks of a failed Mooncake write stay in doubt before the engine is replaced to free them",
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
        "1: the encoder sends a checksum of every embedding and the language server verifies it (both sides)",
    )

    @property
    def shared_pool(self) -> bool:
        """Whether the pool is shared memory: GPU memory cannot be, and is reached through Mooncake from everywhere."""
        return self.data_path != "mooncake" and self.pool_device == "cpu"

    @property
    def resolved_embedding_device(self) -> str:
        return self.embedding_device or self.pool_device

    @property
    def workers_per_queue(self) -> int:
        return max(1, self.workers // self.queues)

    @property
    def all_workers(self) -> int:
        """Transfer workers of an encoder: data calls that can be under way at the same time."""
        return self.queues * self.workers_per_queue

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings from ``environ``. Raises SettingError naming the variable, its value and the range."""
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
