"""Owns the encoding of a part's metadata (grids, time stamps): plain values and tensors as msgpack, without pickle."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import numpy as np
import torch

from sglang_mm_conn.core.errors import ProtocolError

_TENSOR, _ARRAY, _TUPLE = 1, 2, 3
Size = Annotated[int, msgspec.Meta(ge=0)]

# Only these dtypes are sent, and only these are accepted.
DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``. Raises ProtocolError for a dtype that cannot be sent."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ProtocolError(f"dtype {dtype} cannot be sent; supported: {', '.join(DTYPES)}")
    return name


def dtype_of(name: str) -> torch.dtype:
    """The inverse of ``dtype_name``. Raises ProtocolError."""
    try:
        return DTYPES[name]
    except KeyError:
        raise ProtocolError(f"unknown dtype {name!r}") from None


def _pack(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous()
        raw = flat.reshape(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        return _ext(_TENSOR, [dtype_name(value.dtype), list(value.shape), raw])
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject or value.dtype.names:
            raise ProtocolError(f"an array of {value.dtype} cannot be sent")
        return _ext(_ARRAY, [value.dtype.str, list(value.shape), np.ascontiguousarray(value).tobytes()])
    if isinstance(value, tuple):
        return _ext(_TUPLE, [_pack(item) for item in value])
    if isinstance(value, list):
        return [_pack(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _pack(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    raise ProtocolError(f"a value of type {type(value).__name__} cannot be sent as metadata")


def _ext(code: int, content: list[Any]) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(code, msgspec.msgpack.encode(content))


def _unpack(code: int, data: memoryview) -> Any:
    if code == _TUPLE:
        return tuple(msgspec.msgpack.decode(data, type=list[Any], ext_hook=_unpack))
    name, shape, raw = msgspec.msgpack.decode(data, type=tuple[str, list[Size], bytes])
    if code == _TENSOR:
        flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
        return flat.view(dtype_of(name)).reshape(shape)
    if code == _ARRAY:
        dtype = np.dtype(name)
        if dtype.hasobject:
            raise ProtocolError(f"an array of {name} cannot be received")
        return np.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)
    raise ProtocolError(f"unknown metadata extension {code}")


def encode_metadata(values: dict[str, Any], limit: int) -> bytes:
    """Raises ProtocolError. It names the value that cannot be sent, or the size if that exceeds ``limit`` bytes."""
    packed = {}
    for key, value in values.items():
        try:
            packed[key] = msgspec.Raw(msgspec.msgpack.encode(_pack(value)))
        except ProtocolError as error:
            raise ProtocolError(f"metadata {key!r}: {error}") from None
        except Exception as error:  # an integer, a text or a tensor layout that msgpack or torch cannot turn into bytes
            raise ProtocolError(f"metadata {key!r}: {type(error).__name__}: {error}") from None
    data = msgspec.msgpack.encode(packed)
    if len(data) > limit:
        raise ProtocolError(f"{len(data)} bytes of metadata exceed SGLANG_MM_CONN_MAX_METADATA_BYTES={limit}")
    return data


def decode_metadata(data: bytes, limit: int) -> dict[str, Any]:
    """The inverse of ``encode_metadata``. Raises ProtocolError for any other input."""
    if len(data) > limit:
        raise ProtocolError(f"{len(data)} bytes of metadata exceed SGLANG_MM_CONN_MAX_METADATA_BYTES={limit}")
    if not data:
        return {}
    try:
        values = msgspec.msgpack.decode(data, ext_hook=_unpack)
    except Exception as error:  # torch and numpy do not document what they raise for an invalid shape or dtype
        raise ProtocolError(f"malformed metadata: {error}") from None
    if not isinstance(values, dict):
        raise ProtocolError("malformed metadata: not a map")
    return values
