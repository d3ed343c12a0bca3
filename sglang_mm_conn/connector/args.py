"""Owns the arguments that the managers of conn_multimodal.py are created with."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import torch

from sglang_mm_conn.core.errors import ConnError
from sglang_mm_conn.core.settings import Settings


class EmbeddingMode(enum.Enum):
    """The role of a manager's process.

    Attributes:
        ENCODE: The process holds embeddings and sends them.
        LANGUAGE: The process is a language rank and receives embeddings.
    """

    ENCODE = "encode"
    LANGUAGE = "language"


@dataclass(frozen=True)
class EmbeddingArgs:
    """What a manager must know about its server.

    Attributes:
        settings: The settings, see ``Settings.from_env``.
        dtype: dtype of the model's embeddings.
        row_bytes: Bytes of the model's widest embedding row.
        host: Encoder: the address that the control socket binds to. Language rank: the address at which the Mooncake
            engines of encoders reach it.
        timeout: The longest life of a room, in seconds. ``EmbeddingReceiver.init`` may override it.
        server: Language rank: the incarnation of its server, which is the prefix of its rooms' names.
        rank: Language rank: its number among the tensor-parallel ranks.
        size: Language rank: the number of tensor-parallel ranks. Consecutive groups of ``ranks_per_host`` ranks share a
            host and one copy of every embedding, which the first rank of the group, its leader, receives.
        ranks_per_host: Language rank: ranks on each host.
        device: The device that the process computes on.

    Raises:
        ConnError: ``rank``, ``size`` and ``ranks_per_host`` contradict each other.
    """

    settings: Settings
    dtype: torch.dtype
    row_bytes: int
    host: str
    timeout: float
    server: str = ""
    rank: int = 0
    size: int = 1
    ranks_per_host: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size or self.size % self.ranks_per_host:
            raise ConnError(f"invalid ranks: rank {self.rank} of {self.size} with {self.ranks_per_host} per host")

    @property
    def hosts(self) -> int:
        """Number of hosts of the language server, each of which receives one copy of every embedding."""
        return self.size // self.ranks_per_host

    @property
    def host_index(self) -> int:
        """Number of this rank's host."""
        return self.rank // self.ranks_per_host

    @property
    def leads(self) -> bool:
        """Whether this rank receives for its host. The other ranks read what it has received."""
        return self.rank % self.ranks_per_host == 0
