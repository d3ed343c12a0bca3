"""Settings: read once, refused if they are out of range, all described."""

from __future__ import annotations

from dataclasses import fields

import pytest

from sglang_mm_conn.core.errors import SettingError
from sglang_mm_conn.core.settings import Settings

VARIABLES = {item.name: item.metadata["env"] for item in fields(Settings)}

GOOD: dict[str, tuple[str, object]] = {
    "blocks": ("16", 16),
    "block_size": ("64", 64),
    "first_offer": ("1024", 1024),
    "queues": ("8", 8),
    "workers": ("16", 16),
    "data_path": ("shm", "shm"),
    "pool_device": ("cuda", "cuda"),
    "embedding_device": ("cuda", "cuda"),
    "key_file": ("/etc/key", "/etc/key"),
    "insecure": ("yes", True),
    "regions": ("2", 2),
    "host": ("10.0.0.1", "10.0.0.1"),
    "mooncake_protocol": ("tcp", "tcp"),
    "mooncake_device": ("mlx5_0,mlx5_1", "mlx5_0,mlx5_1"),
    "staging_bytes": ("1048576", 1 << 20),
    "view_percent": ("0", 0),
    "result_cache_bytes": ("0", 0),
    "heap_kept_bytes": ("0", 0),
    "copiers": ("4", 4),
    "heartbeat": ("0.5", 0.5),
    "peer_timeout": ("20", 20.0),
    "claim_timeout": ("5.5", 5.5),
    "doubt_patience": ("2.5", 2.5),
    "drain_seconds": ("12.5", 12.5),
    "dispatch_tries": ("5", 5),
    "dispatch_wait": ("0", 0.0),
    "max_embedding_bytes": ("1024", 1024),
    "max_frame_bytes": ("2097152", 2097152),
    "max_metadata_bytes": ("2048", 2048),
    "checksum": ("1", True),
}
TEXTS = {"host", "mooncake_device", "key_file"}
FLAGS = {"insecure", "checksum"}
CHOICES = {
    "data_path": "auto, shm, mooncake",
    "mooncake_protocol": "rdma, tcp",
    "pool_device": "cpu, cuda",
    "embedding_device": "cpu, cuda",
}
FROM_ZERO = {"view_percent", "result_cache_bytes", "heap_kept_bytes"}
SECONDS = {"heartbeat", "peer_timeout", "claim_timeout", "doubt_patience"}
SECONDS_FROM_ZERO = {"dispatch_wait", "drain_seconds"}


def bad_values(name: str) -> list[str]:
    if name in TEXTS:
        return []
    if name in CHOICES:
        return ["SHM", "auto;", "1"]
    if name in FLAGS:
        return ["2", "maybe"]
    if name in SECONDS:
        return ["0", "-1", "nan", "inf", "soon", "1e9"]
    if name in SECONDS_FROM_ZERO:
        return ["-1", "nan", "inf", "soon", "1e9"]
    if name in FROM_ZERO:
        return ["-1", "1.5", "many", str(1 << 60)]
    return ["0", "-1", "1.5", "many", "1e3", str(1 << 60)]


def test_every_setting_is_in_these_tables() -> None:
    assert set(GOOD) == set(VARIABLES)


@pytest.mark.parametrize("name", GOOD)
def test_a_good_value_is_taken(name: str) -> None:
    text, value = GOOD[name]
    assert getattr(Settings.from_env({VARIABLES[name]: f" {text} "}), name) == value


@pytest.mark.parametrize(("name", "text"), [(name, text) for name in GOOD for text in bad_values(name)])
def test_a_bad_value_is_refused_naming_variable_value_and_range(name: str, text: str) -> None:
    allowed = {item.name: item.metadata["allowed"] for item in fields(Settings)}[name]
    with pytest.raises(SettingError) as caught:
        Settings.from_env({VARIABLES[name]: text})
    for part in (VARIABLES[name], repr(text), allowed):
        assert part in str(caught.value)
    assert CHOICES.get(name, "") in allowed


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_variable_means_the_default(text: str) -> None:
    assert Settings.from_env(dict.fromkeys(VARIABLES.values(), text)) == Settings()


@pytest.mark.parametrize(("text", "value"), [("on", True), ("YES", True), ("0", False), ("False", False)])
def test_a_flag_has_its_usual_words(text: str, value: bool) -> None:
    assert Settings.from_env({VARIABLES["checksum"]: text}).checksum is value


def test_a_peer_timeout_below_the_heartbeat_is_refused_naming_both() -> None:
    with pytest.raises(SettingError, match=r"PEER_TIMEOUT_SECONDS=0\.5.*HEARTBEAT_SECONDS=1"):
        Settings.from_env({VARIABLES["peer_timeout"]: "0.5"})


def test_a_pool_in_gpu_memory_is_refused_on_shared_memory_naming_both() -> None:
    both = {VARIABLES["pool_device"]: "cuda", VARIABLES["data_path"]: "shm"}
    with pytest.raises(SettingError, match=r"POOL_DEVICE=cuda .*DATA_PATH must be auto or mooncake, not shm"):
        Settings.from_env(both)


@pytest.mark.parametrize(
    ("data_path", "pool_device", "shared"),
    [("auto", "cpu", True), ("shm", "cpu", True), ("mooncake", "cpu", False), ("auto", "cuda", False)],
)
def test_a_pool_is_shared_memory_where_it_can_be(data_path: str, pool_device: str, shared: bool) -> None:
    assert Settings(data_path=data_path, pool_device=pool_device).shared_pool is shared


def test_embeddings_are_where_the_pool_is_unless_told_otherwise() -> None:
    assert Settings(pool_device="cuda").resolved_embedding_device == "cuda"
    assert Settings(pool_device="cuda", embedding_device="cpu").resolved_embedding_device == "cpu"
    assert Settings(embedding_device="cuda").resolved_embedding_device == "cuda"


def test_other_variables_are_none_of_ours() -> None:
    assert Settings.from_env({"PATH": "/bin", "SGLANG_MM_CONN_UNKNOWN": "x"}) == Settings()


def test_describe_lists_every_setting_with_default_range_and_meaning() -> None:
    rows = Settings.describe()
    assert [row[0] for row in rows] == list(VARIABLES.values())
    assert len({row[0] for row in rows}) == len(rows)
    assert all(allowed and meaning for _, _, allowed, meaning in rows)
    defaults = {env: default for env, default, _, _ in rows}
    assert defaults[VARIABLES["block_size"]] == "128"
    assert defaults[VARIABLES["first_offer"]] == "unset"
