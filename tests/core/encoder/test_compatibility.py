"""Which registrations fit an encoder: each difference is refused, and the reason names both values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from sglang_mm_conn.core.encoder.compatibility import mismatch
from sglang_mm_conn.core.messages import MooncakeMemory, Register, ShmMemory
from sglang_mm_conn.core.settings import Settings

SETTINGS = Settings(
    block_size=4, checksum=True, max_frame_bytes=1 << 20, max_metadata_bytes=1 << 19, data_path="shm"
)  # fmt: skip
DTYPE = "bfloat16"
WIDEST_ROW_BYTES = 100
REGISTER = Register(
    mooncake_session_id="10.0.0.1:17001", epoch=0, incarnation="1", server="2", rank=1, size=2,
    block_size=4, block_bytes=400, blocks_per_region=8, regions=2,
    memory=ShmMemory(segment="name", nonce="nonce", writer_slot=0),
    row_bytes=100, dtype="bfloat16", checksum=True, max_frame_bytes=1 << 20, max_metadata_bytes=1 << 19,
)  # fmt: skip

MOONCAKE = MooncakeMemory(target="10.0.0.1:17002", addresses=[4096, 8192])


def problem(register: Register = REGISTER, settings: Settings = SETTINGS, **model: Any) -> str:
    return mismatch(register, settings, **{"dtype": DTYPE, "widest_row_bytes": WIDEST_ROW_BYTES, **model})


def test_equal_values_fit() -> None:
    assert problem() == ""


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"block_size": 5}, ["SGLANG_EMBEDDING_CACHE_BLOCK_SIZE", "is 5 on the language server", "4 on the encoder"]),
        ({"dtype": "float32"}, ["dtype", "is float32 on the language server", "bfloat16 on the encoder"]),
        ({"checksum": False}, ["SGLANG_MM_CONN_CHECKSUM", "is False on the language server", "True on the encoder"]),
        (
            {"max_frame_bytes": 1 << 21},
            ["SGLANG_MM_CONN_MAX_FRAME_BYTES", "is 2097152 on the language server", "1048576 on the encoder"],
        ),
        (
            {"max_metadata_bytes": 1 << 18},
            ["SGLANG_MM_CONN_MAX_METADATA_BYTES", "is 262144 on the language server", "524288 on the encoder"],
        ),
        ({"row_bytes": 99}, ["widest row has 100 bytes", "at most 99"]),
        ({"memory": MOONCAKE}, ["SGLANG_MM_CONN_DATA_PATH", "is shm on the encoder", "offers mooncake"]),
        ({"mooncake_session_id": "nowhere"}, ["'nowhere'", "host:port"]),
        ({"mooncake_session_id": "10.0.0.1:0"}, ["'10.0.0.1:0'", "host:port"]),
        ({"rank": 2}, ["rank 2 of 2"]),
        ({"oldest_epoch": 1}, ["epoch 0", "below 1"]),
        ({"block_bytes": 1 << 48, "blocks_per_region": 1 << 48}, [str(1 << 96), str(1 << 48)]),
    ],
)
def test_a_difference_is_refused_and_both_values_are_named(changes: dict[str, Any], named: list[str]) -> None:
    reason = problem(msgspec.structs.replace(REGISTER, **changes))
    assert reason and all(text in reason for text in named), reason


@pytest.mark.parametrize("model", [{"dtype": "float16"}, {"widest_row_bytes": 101}])
def test_another_model_on_the_encoder_is_a_difference_too(model: dict[str, Any]) -> None:
    assert str(next(iter(model.values()))) in problem(**model)


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"row_bytes": 400}, SETTINGS),  # narrower rows fit
        ({"memory": MOONCAKE}, replace(SETTINGS, data_path="auto")),
        ({"memory": MOONCAKE}, replace(SETTINGS, data_path="mooncake")),
        ({"mooncake_session_id": "[::1]:65535"}, SETTINGS),
        ({"rank": 0, "size": 1}, SETTINGS),
        ({"regions": 1}, SETTINGS),
    ],
)
def test_what_may_differ(changes: dict[str, Any], settings: Settings) -> None:
    assert problem(msgspec.structs.replace(REGISTER, **changes), settings) == ""
