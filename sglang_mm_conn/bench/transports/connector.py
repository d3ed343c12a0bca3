"""This connector: the two endpoints that sglang's processes use, without sglang."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Mapping
from typing import Any

import torch

from sglang_mm_conn.bench.transports.base import DTYPE, HOST, Config, Room, device_for
from sglang_mm_conn.connector.encoder.endpoint import EncoderEndpoint
from sglang_mm_conn.connector.language.endpoint import LanguageEndpoint
from sglang_mm_conn.connector.metadata import dtype_name
from sglang_mm_conn.connector.runtime import Runtime
from sglang_mm_conn.control.bootstrap_server import StandaloneBootstrap
from sglang_mm_conn.core.actions import Ended
from sglang_mm_conn.core.rooms import new_id
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.core.states import Poll
from sglang_mm_conn.datapath.factory import encoder_data_paths

_PATIENCE = 300.0  # seconds; longer than any run
_DTYPE = dtype_name(DTYPE)
_SPARE_BLOCKS = 8  # beyond what the rooms in flight need


def _settings(config: Config, path: str) -> Settings:
    views: dict[str, Any] = {"view_percent": 0} if config.result == "copied" else {}
    return Settings(
        **views,
        data_path=path,
        blocks=pool_blocks(config),
        block_size=config.block_size,
        key_file=config.key_file or None,
        mooncake_protocol="tcp",
        claim_timeout=_PATIENCE,
        pool_device=config.pool_device,
        embedding_device=config.device,
    )


def pool_blocks(config: Config) -> int:
    """Blocks of the language process's pool: an eighth of a room with ``windows``, else twice what the rooms in flight
    need (finished embeddings may occupy half of the pool), and twice as many again with ``fragmented``."""
    block_bytes = config.block_size * config.width * DTYPE.itemsize
    needed = -(-config.nbytes // block_bytes)
    if config.pool == "windows":
        return max(1, needed // 8)
    blocks = 2 * config.in_flight * needed + _SPARE_BLOCKS
    return 2 * blocks if config.pool == "fragmented" else blocks


class ConnectorSender:
    def __init__(self, config: Config, path: str) -> None:
        settings = _settings(config, path)
        device = device_for(config)
        self._endpoint = EncoderEndpoint(
            settings,
            host=HOST,
            dtype=_DTYPE,
            widest_row_bytes=config.width * DTYPE.itemsize,
            send_timeout=_PATIENCE,
            data_paths=encoder_data_paths(settings, HOST, device),
            runtime=Runtime(device),
        )
        self._bootstrap = StandaloneBootstrap(HOST, 0, lambda: self._endpoint.bootstrap_info)
        self._ended: list[Ended] = []
        self._some_ended = threading.Condition()

    def hello(self) -> dict[str, Any]:
        return {"url": self._bootstrap.url}

    def connect(self, peer: Mapping[str, Any]) -> None:
        """Nothing to do: the language process connects."""

    def prepare(self, room: Room) -> None:
        self._endpoint.announce(room.name, room.tokens, room.width * DTYPE.itemsize, _DTYPE, self._on_end)

    def _on_end(self, ended: Ended) -> None:
        with self._some_ended:
            self._ended.append(ended)
            self._some_ended.notify()

    def prepared(self, room: Room) -> bool:
        return self._endpoint.has_offer(room.name)

    def go(self, room: Room, tensor: torch.Tensor) -> None:
        self._endpoint.add_transfer_request(room.name, tensor, b"")

    def wait(self, timeout: float) -> list[str]:
        with self._some_ended:
            if not self._ended:
                self._some_ended.wait(timeout)
            ended, self._ended = self._ended, []
        for one in ended:
            if not one.success:
                raise RuntimeError(f"{one.room} was not sent: {one.reason}")
        return [one.room for one in ended]

    def close(self) -> None:
        self._endpoint.close()
        self._bootstrap.close()


class ConnectorReceiver:
    def __init__(self, config: Config, path: str) -> None:
        self.server = new_id()
        self._config = config
        self._endpoint = LanguageEndpoint(
            _settings(config, path),
            server=self.server,
            host=HOST,
            dtype=_DTYPE,
            widest_row_bytes=config.width * DTYPE.itemsize,
            runtime=Runtime(device_for(config)),
        )
        self._url = ""
        self._pending: dict[str, None] = {}
        if config.pool == "fragmented":
            self._endpoint.fragment_pool()

    def hello(self) -> dict[str, Any]:
        return {"server": self.server}

    def connect(self, peer: Mapping[str, Any]) -> None:
        self._url = peer["url"]
        self._endpoint.use_encoder(self._url)
        until = time.monotonic() + 60
        while not self._endpoint.is_registered(self._url):
            if time.monotonic() > until:
                raise RuntimeError(f"not registered with the encoder at {self._url} within 60 s")
            time.sleep(0.005)

    def expect(self, room: Room) -> None:
        self._pending[room.name] = None
        self._endpoint.expect(room.name, self._url, _PATIENCE, "")

    def wait(self, timeout: float) -> list[tuple[str, torch.Tensor]]:
        arrived = self._arrived()
        if not arrived and select.select([self._endpoint.completions], [], [], timeout)[0]:
            self._endpoint.completions.clear()
            arrived = self._arrived()
        return arrived

    def _arrived(self) -> list[tuple[str, torch.Tensor]]:
        arrived = []
        for name in list(self._pending):
            state = self._endpoint.poll(name)
            if state is Poll.Success:
                arrived.append((name, self._endpoint.take(name)[0]))
                del self._pending[name]
            elif state is Poll.Failed:
                raise RuntimeError(f"{name} did not arrive: {self._endpoint.outcome(name).reason}")
        return arrived

    def release(self, name: str) -> None:
        self._endpoint.forget(name)

    def close(self) -> None:
        self._endpoint.close()
