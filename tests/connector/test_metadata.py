"""Metadata: plain values and tensors come back as they were, and nothing but that comes out of bytes."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mm_conn.connector.metadata import DTYPES, decode_metadata, dtype_name, dtype_of, encode_metadata
from sglang_mm_conn.core.errors import ProtocolError

LIMIT = 1 << 20


def there_and_back(value: Any) -> Any:
    return decode_metadata(encode_metadata({"key": value}, LIMIT), LIMIT)["key"]


def same(one: Any, two: Any) -> bool:
    if type(one) is not type(two):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(bits(one), bits(two))
    if isinstance(one, np.ndarray):
        return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    return bool(one == two)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (0, 4), (2, 0, 3), (1, 1, 1)])
@pytest.mark.parametrize("name", DTYPES)
def test_a_tensor_of_every_dtype_and_shape_comes_back(name: str, shape: tuple[int, ...]) -> None:
    tensor = (torch.rand(shape) * 5).to(DTYPES[name])
    assert same(there_and_back(tensor), tensor)


@pytest.mark.parametrize(
    "tensor",
    [torch.arange(6).reshape(2, 3).t(), torch.arange(10)[2:9:3], torch.ones(3, requires_grad=True) * 2,
     torch.tensor(3).expand(2, 2)],
)  # fmt: skip
def test_a_view_comes_back_as_its_values(tensor: torch.Tensor) -> None:
    assert same(there_and_back(tensor), tensor.detach())


@pytest.mark.parametrize(
    "array",
    [np.zeros((0, 3), np.float32), np.array(5), np.arange(6, dtype=">i4").reshape(2, 3), np.array(["a", "bcd"]),
     np.array([True, False]), np.arange(9.0).reshape(3, 3)[:, ::2], np.array([1 + 2j]), np.array([b"xy"])],
)  # fmt: skip
def test_an_array_comes_back(array: np.ndarray[Any, Any]) -> None:
    assert same(there_and_back(array), np.ascontiguousarray(array).reshape(array.shape))


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -5, 1.5, "text", b"bytes", [], (), {}, [1, [2, (3, None)]], (1, (2,), [3]),
     {"a": {"b": (torch.ones(2), [np.zeros(1)])}}, ((torch.zeros(0), ()),), float("inf")],
)  # fmt: skip
def test_plain_values_and_nesting_come_back(value: Any) -> None:
    assert same(there_and_back(value), value)


def test_numbers_of_numpy_become_plain() -> None:
    assert there_and_back(np.float32(1.5)) == 1.5 and there_and_back(np.int64(7)) == 7


def test_what_comes_back_can_be_written() -> None:
    tensor, array = there_and_back((torch.zeros(3), np.zeros(3)))
    tensor += 1
    array += 1
    assert tensor.sum() == 3 and array.sum() == 3


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, 1j, lambda: 0, np.array([object()]), np.zeros(2, dtype=[("a", "i4"), ("o", "O")]),
     np.zeros(2, dtype=[("a", "i4"), ("b", "f4")]), torch.zeros(2, dtype=torch.complex64), 2**70, "\udcff",
     [1, object()], {"a": (object(),)}, torch.eye(2).to_sparse(), np.longdouble(1)],
)  # fmt: skip
def test_what_cannot_travel_is_refused_naming_its_key(value: Any) -> None:
    with pytest.raises(ProtocolError, match="'grid'"):
        encode_metadata({"grid": value}, LIMIT)


def test_the_limit_holds_on_both_sides_naming_the_setting() -> None:
    data = encode_metadata({"key": b"x" * 100}, LIMIT)
    assert decode_metadata(data, len(data)) == {"key": b"x" * 100}
    with pytest.raises(ProtocolError, match="MAX_METADATA_BYTES"):
        encode_metadata({"key": b"x" * 100}, len(data) - 1)
    with pytest.raises(ProtocolError, match="MAX_METADATA_BYTES"):
        decode_metadata(data, len(data) - 1)


def test_no_metadata_is_an_empty_table() -> None:
    assert decode_metadata(b"", LIMIT) == {}


def test_a_dtype_that_does_not_travel_is_refused_both_ways() -> None:
    with pytest.raises(ProtocolError, match="complex64"):
        dtype_name(torch.complex64)
    with pytest.raises(ProtocolError, match="no_such"):
        dtype_of("no_such")
    assert all(dtype_of(dtype_name(dtype)) is dtype for dtype in DTYPES.values())


def ext(code: int, content: Any) -> bytes:
    return msgspec.msgpack.encode({"key": msgspec.msgpack.Ext(code, msgspec.msgpack.encode(content))})


@pytest.mark.parametrize(
    ("code", "content"),
    [
        (1, ["float32", [1], 10**13]),  # bytearray(n) would take n bytes of memory
        (2, ["<f4", [1], 10**13]),
        (1, ["float32", [-1], b"1234"]),
        (1, ["float32", [2], b"1234"]),
        (1, ["float32", [1], b"12"]),
        (1, ["float32", [2**62, 8], b"1234"]),
        (1, ["object", [1], b"1234"]),
        (1, [["x"], [1], b"1234"]),
        (2, ["O", [1], b"12345678"]),
        (2, ["|O8,i4", [1], b"123456789012"]),
        (2, ["(1,f", [1], b"1234"]),
        (2, [None, [1], b"12345678"]),
        (2, [{"names": ["a"]}, [1], b"1234"]),
        (2, ["V0", [0], b""]),
        (2, ["<f4", [2**62], b"1234"]),
        (3, 5),
        (3, {"a": 1}),
        (1, 5),
        (1, []),
        (9, [1, 2, 3]),
        (-1, b"\xff" * 8),
    ],
)
def test_a_forged_extension_is_refused(code: int, content: Any) -> None:
    with pytest.raises(ProtocolError):
        decode_metadata(ext(code, content), LIMIT)


@pytest.mark.parametrize("data", [b"\x01", b"\x90", b"\xc1", b"\x81", b"\x80\x80", b"\x91" * 100_000])
def test_bytes_that_are_no_table_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_metadata(data, LIMIT)


def test_extensions_nested_without_end_are_refused() -> None:
    inner = msgspec.msgpack.encode([1])
    for _ in range(2000):
        inner = msgspec.msgpack.encode([msgspec.msgpack.Ext(3, inner)])
    with pytest.raises(ProtocolError):
        decode_metadata(msgspec.msgpack.encode({"key": msgspec.msgpack.Ext(3, inner)}), LIMIT)


SAMPLE = encode_metadata(
    {"grid": torch.arange(6).reshape(2, 3), "times": np.arange(3, dtype=np.float32), "pair": (1, "two", [3.0, None])},
    LIMIT,
)


@settings(max_examples=1500, deadline=None)
@given(st.data())
def test_damaged_metadata_is_a_table_or_a_protocol_error(data: st.DataObject) -> None:
    damaged = bytearray(SAMPLE)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        if data.draw(st.booleans()):
            damaged[at] = data.draw(st.integers(0, 255))
        elif data.draw(st.booleans()):
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=5))
        elif len(damaged) > 1:
            del damaged[at]
    try:
        assert isinstance(decode_metadata(bytes(damaged), LIMIT), dict)
    except ProtocolError:
        return


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=12), st.lists(st.integers(-2, 2**63 - 1), max_size=3), st.binary(max_size=16))
def test_any_dtype_name_and_shape_is_an_array_or_a_protocol_error(name: str, shape: list[int], raw: bytes) -> None:
    for code in (1, 2):
        try:
            decode_metadata(ext(code, [name, shape, raw]), LIMIT)
        except ProtocolError:
            continue
