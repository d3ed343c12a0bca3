"""An encoder's and a language rank's endpoint in this process, each with a device of its own."""

from __future__ import annotations

from dataclasses import replace

import torch

from sglang_mm_conn.connector.encoder.endpoint import EncoderEndpoint
from sglang_mm_conn.connector.language.endpoint import LanguageEndpoint
from sglang_mm_conn.connector.metadata import encode_metadata
from sglang_mm_conn.connector.runtime import Runtime
from sglang_mm_conn.control.bootstrap_server import StandaloneBootstrap
from sglang_mm_conn.core.rooms import new_id, new_room_base
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.core.states import Poll
from sglang_mm_conn.datapath.factory import encoder_data_paths
from sglang_mm_conn.memory.device import Device
from tests.connector.processes import wait_for

HOST = "127.0.0.1"
ROW_BYTES = 32
TOKENS = 100  # more than the pool holds
BLOCKS = 8
STAGING_BYTES = 1 << 20

# Data path, where the pool and the staging memory are, where embeddings are.
TRANSPORTS = {
    "shm, host pool, embeddings on the GPU": ("shm", "cpu", "cuda"),
    "shm, host pool, embeddings on the host": ("shm", "cpu", "cpu"),
    "mooncake, GPU pool, embeddings on the GPU": ("auto", "cuda", "cuda"),
    "mooncake, GPU pool, embeddings on the host": ("auto", "cuda", "cpu"),
    "mooncake, host pool, embeddings on the GPU": ("mooncake", "cpu", "cuda"),
}


class Ends:
    """``transport``: one of TRANSPORTS."""

    def __init__(self, transport: str, encoder: Device, language: Device, checksum: bool) -> None:
        data_path, pool, embeddings = TRANSPORTS[transport]
        settings = Settings(
            block_size=4, blocks=BLOCKS, data_path=data_path, checksum=checksum, mooncake_protocol="tcp",
            staging_bytes=STAGING_BYTES,
        )  # fmt: skip
        # A process without a GPU, at the other end of one with one, has the defaults.
        ours = {device: self._settings(settings, device, pool, embeddings) for device in (encoder, language)}
        self.encoder = EncoderEndpoint(
            ours[encoder], host=HOST, dtype="float32", widest_row_bytes=ROW_BYTES, send_timeout=60.0,
            data_paths=encoder_data_paths(ours[encoder], HOST, encoder), runtime=Runtime(encoder),
        )  # fmt: skip
        self._bootstrap = StandaloneBootstrap(HOST, 0, lambda: self.encoder.bootstrap_info)
        self.language = LanguageEndpoint(
            ours[language], server=new_id(), host=HOST, dtype="float32", widest_row_bytes=ROW_BYTES,
            runtime=Runtime(language),
        )  # fmt: skip

    @staticmethod
    def _settings(settings: Settings, device: Device, pool: str, embeddings: str) -> Settings:
        if device.name == "cpu":
            return replace(settings, data_path="mooncake" if pool == "cuda" else settings.data_path)
        return replace(settings, pool_device=pool, embedding_device=embeddings)

    def begin(self, rows: torch.Tensor) -> str:
        """Announce and send; nothing is waited for. Returns the room."""
        room = new_room_base(self.language.server)
        self.language.expect(room, self._bootstrap.url, 60.0, "")
        self.encoder.announce(room, rows.shape[0], ROW_BYTES, "float32", lambda ended: None)
        self.encoder.add_transfer_request(room, rows, encode_metadata({}, 1 << 20))
        return room

    def finish(self, room: str) -> torch.Tensor:
        wait_for(lambda: self.language.poll(room) in (Poll.Success, Poll.Failed), f"the end of {room}")
        assert self.language.poll(room) is Poll.Success, self.language.outcome(room)
        embedding, _ = self.language.take(room)
        self.language.forget(room)
        return embedding

    def transfer(self, rows: torch.Tensor) -> torch.Tensor:
        return self.finish(self.begin(rows))

    def close(self) -> None:
        self.language.close()
        self.encoder.close()
        self._bootstrap.close()
