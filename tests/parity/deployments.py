"""Owns the servers that are compared: a colocated one, and encoders with a language server, of one model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sglang_mm_conn.demo import tiny_models
from sglang_mm_conn.demo.launch import Launch
from sglang_mm_conn.demo.servers import Server, ServerGroup, wait_ready

# An idle scheduler spins otherwise, and takes a core from the server that is asked.
_PLAIN = (
    "--sleep-on-idle", "--enable-cache-report", "--enable-return-hidden-states", "--enable-priority-scheduling",
    "--grammar-backend", "xgrammar", "--random-seed", "1",
    "--limit-mm-data-per-request", '{{"image": 24}}',
)  # fmt: skip
SERVERS: dict[str, tuple[str, ...]] = {
    "plain": _PLAIN,
    "chunked": (*_PLAIN, "--chunked-prefill-size", "64"),
    "lora": (*_PLAIN, "--enable-lora", "--lora-paths", "tiny={lora}", "--max-lora-rank", "8", "--lora-target-modules",
             "qkv_proj", "--lora-backend", "torch_native"),
    "engine": (),  # no servers but an encoder: engine.py
}  # fmt: skip
PATHS = ("shm", "mooncake")


@dataclass
class Pair:
    """The two deployments of one model with the same flags."""

    model: Path
    colocated: Server
    group: ServerGroup

    @property
    def servers(self) -> list[Server]:
        return [self.colocated, *self.group.servers]


@contextmanager
def pair(kind: str, servers: str, model: Path, logs: Path, data_path: str = "shm", lora: str = "") -> Iterator[Pair]:
    """Starts both; on exit both have stopped. ``servers``: a name in SERVERS."""
    flags = tuple(flag.format(lora=lora) for flag in SERVERS[servers])
    bed = {"CPU_BED_PIN_NOTHING": "1"} if servers == "lora" else {}
    env = {
        **bed,
        "CPU_BED_FORBID_BUILTIN_TRANSPORT": "1",
        "SGLANG_MM_CONN_CHECKSUM": "1",
        "SGLANG_MM_CONN_DATA_PATH": data_path,
    }
    # sglang's encoder computes other metadata of a video than a colocated server (ci/cpu_bed, media_metadata.py).
    launch = Launch("colocated", model, flags=flags, env={**bed, "CPU_BED_MEDIA_METADATA": "1"})
    group = ServerGroup(
        model, logs, encoders=2, env=env, language_flags=flags, encoder_flags=tiny_models.KINDS[kind].encoder_flags
    )
    with Server(launch, logs) as colocated, group:
        wait_ready([colocated])
        yield Pair(model, colocated, group)
