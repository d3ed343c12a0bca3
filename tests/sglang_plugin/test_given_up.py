"""Rooms that were given up before the model ran for them: it does not run.

sglang's own ``MMEncoder.batch_encode`` runs; what it calls of the model is replaced.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from sglang.srt.disaggregation.encoder import server
from sglang.srt.disaggregation.encoder.server import MMError
from sglang.srt.managers.schedule_batch import Modality

from sglang_mm_conn.core.dispatch.verdicts import BATCH_GIVEN_UP, Verdict, of_answer
from sglang_mm_conn.core.rooms import new_room_base
from sglang_mm_conn.sglang_plugin import encoder as plugin

SERVER = "5e" * 8


def announced(monkeypatch: pytest.MonkeyPatch, over: list[bool], *, health_check: bool = False) -> list[str]:
    """Announce a batch whose rooms are over or not, as the hook does. Returns the rooms announced."""
    rooms = [new_room_base(SERVER) for _ in over]
    ended = dict(zip(rooms, over, strict=True))
    made: list[str] = []

    def announce(manager: Any, room: str, shape: list[int], dtype: Any) -> Any:
        made.append(room)
        return SimpleNamespace(ended=SimpleNamespace(done=lambda: ended[room]))

    async def original(self: Any, ctx: Any, requests: Any) -> None:
        pass

    monkeypatch.setattr(plugin, "_announce", announce)
    data = SimpleNamespace(shape=[2, 3], dtype=torch.float32)
    encoder = SimpleNamespace(
        conn_multimodal=SimpleNamespace(),
        req_states={room: SimpleNamespace(embedding_data=data) for room in rooms},
    )
    ctx = SimpleNamespace(is_health_check=health_check)
    asyncio.run(plugin.announce_rooms(original, encoder, ctx, [{"req_id": room} for room in rooms]))
    return made


def test_the_model_does_not_run_for_a_batch_whose_rooms_were_all_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MMError, match="given up") as caught:
        announced(monkeypatch, [True, True])
    assert caught.value.code == HTTPStatus.GONE, "400 would make sglang try each request again"


def test_the_model_runs_for_a_batch_with_one_room_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(announced(monkeypatch, [True, False])) == 2
    assert announced(monkeypatch, [True], health_check=True) == []


class Encoder(server.MMEncoder):
    """Of one rank, without a model."""

    def __init__(self) -> None:
        self.rank = 0
        self.req_states: dict[str, Any] = {}
        self.abandoned_req_ids: set[str] = set()
        self.use_mooncake = False
        self.mm_global_cache = self.profiler = None

    async def _prepare_encode_context(self, *args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace()

    async def _publish_preprocess_metadata(self, ctx: Any, requests: Any) -> None:
        raise MMError(BATCH_GIVEN_UP, code=HTTPStatus.GONE)

    async def _compute_embedding(self, ctx: Any, *, keep_on_gpu: bool) -> Any:
        raise AssertionError("the model runs")


def test_sglang_makes_of_it_an_error_of_each_request_that_it_does_not_try_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "get_parallel", lambda: SimpleNamespace(tp_group=SimpleNamespace(world_size=1)))
    encoder = Encoder()
    requests = [{"req_id": name, "num_parts": 1, "part_idx": 0} for name in "ab"]
    results = asyncio.run(encoder.batch_encode(requests, Modality.IMAGE))
    assert len(results) == 2 and all("given up" in result[3] for result in results)
    # If all were 400, EncoderScheduler would try each by itself.
    assert all(int(result[4]) != HTTPStatus.BAD_REQUEST for result in results)
    assert all(state.embedding_ready.is_set() for state in encoder.req_states.values())
    for _, _, _, message, code, *_ in results:  # no fault of the encoder, and not encoded elsewhere
        body = msgspec.json.encode({"status": "error", "message": message, "req_id": "a"})
        assert of_answer("a", int(code), body).verdict is Verdict.ABORTED
