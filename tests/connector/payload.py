"""What travels in these tests: bytes and metadata that both ends can compute from a seed, and nobody else has."""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Part:
    """One embedding part on its way: its room, its shape, and the seed that its bytes are made of."""

    room: str
    tokens: int
    width: int
    seed: int
    dtype: str = "float32"
    metadata: bool = False

    @property
    def row_bytes(self) -> int:
        return self.width * ITEM_BYTES[self.dtype]

    def payload(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """All bytes of the embedding."""
        raw = np.random.default_rng(self.seed).bytes(self.tokens * self.row_bytes)
        return np.frombuffer(bytearray(raw), dtype=np.uint8)

    def values(self) -> dict[str, Any]:
        """Metadata as a processor would send it; the tensor is written as an array here."""
        if not self.metadata:
            return {}
        return {
            "grid": np.arange(self.seed, self.seed + 6, dtype=np.int64).reshape(2, 3),
            "second_per_grid": [0.5, float(self.seed)],
            "modality": "video",
        }

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def expected(self) -> dict[str, Any]:
        """What ``take`` of the language process must answer."""
        return {
            "crc": zlib.crc32(self.payload().tobytes()),
            "shape": [self.tokens, self.width],
            "dtype": self.dtype,
            "metadata": {key: plain(value) for key, value in self.values().items()},
        }


def plain(value: Any) -> Any:
    """A value of metadata as JSON, with type and shape where it has any."""
    if hasattr(value, "numpy"):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return [value.dtype.str, list(value.shape), value.reshape(-1).tolist()]
    return value
