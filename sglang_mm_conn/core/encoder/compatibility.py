"""Owns the comparison of a registration with the encoder: memory and settings must fit. Pure."""

from __future__ import annotations

from sglang_mm_conn.core.errors import ProtocolError
from sglang_mm_conn.core.messages import Register
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.core.sharding import session_port

_MOST_REGION_BYTES = 1 << 48


def mismatch(register: Register, settings: Settings, *, dtype: str, widest_row_bytes: int) -> str:
    """Why ``register`` does not fit an encoder with ``settings``, with both values; empty if it fits.

    ``dtype``, ``widest_row_bytes``: of the encoder's model.
    """
    for what, theirs, ours in (
        ("block size (SGLANG_EMBEDDING_CACHE_BLOCK_SIZE)", register.block_size, settings.block_size),
        ("dtype", register.dtype, dtype),
        ("SGLANG_MM_CONN_CHECKSUM", register.checksum, settings.checksum),
        ("SGLANG_MM_CONN_MAX_FRAME_BYTES", register.max_frame_bytes, settings.max_frame_bytes),
        ("SGLANG_MM_CONN_MAX_METADATA_BYTES", register.max_metadata_bytes, settings.max_metadata_bytes),
    ):
        if theirs != ours:
            return f"{what} is {theirs} on the language server and {ours} on the encoder"
    if widest_row_bytes > register.row_bytes:
        return (
            f"the encoder's widest row has {widest_row_bytes} bytes, "
            f"the language server expects at most {register.row_bytes}"
        )
    if settings.data_path not in ("auto", register.data_path):
        return (
            f"SGLANG_MM_CONN_DATA_PATH is {settings.data_path} on the encoder, "
            f"but the language server offers {register.data_path}"
        )
    return _contradiction(register)


def _contradiction(register: Register) -> str:
    """How ``register`` contradicts itself; empty if it does not."""
    try:
        session_port(register.mooncake_session_id)  # the shard rule adds the ports up
    except ProtocolError as error:
        return str(error)
    if register.rank >= register.size:
        return f"invalid registration: rank {register.rank} of {register.size}"
    if register.oldest_epoch > register.epoch:
        return f"invalid registration: epoch {register.epoch}, but those below {register.oldest_epoch} are revoked"
    if register.geometry.region_bytes > _MOST_REGION_BYTES:  # an offset must fit an address
        return f"a region has {register.geometry.region_bytes} bytes, at most {_MOST_REGION_BYTES} are allowed"
    return ""
