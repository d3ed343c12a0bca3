"""The endurance step notices wrong bytes and whatever does not come back."""

from __future__ import annotations

import pytest
import torch

from tests.connector.endpoints import TRANSPORTS, Ends
from tests.gpu.endurance import Held, play, transports_of

SHM = "shm, host pool, embeddings on the host"


def test_rooms_arrive_and_everything_is_back() -> None:
    result = play(SHM, "cpu", 100, 60.0, 1)
    assert (result.rooms, result.wrong, result.problems) == (100, 0, [])
    assert result.kernels > 0 and result.before == result.after


def test_wrong_bytes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Ends.finish
    monkeypatch.setattr(Ends, "finish", lambda ends, room: torch.zeros_like(finish(ends, room)))
    result = play(SHM, "cpu", 20, 60.0, 1)
    assert result.wrong == 20 and result.problems == ["20 of 20 rooms with wrong bytes"]


@pytest.mark.parametrize("name", ["descriptors", "pinned_bytes", "torch_bytes", "gpu_bytes"])
def test_what_does_not_come_back_is_named(name: str) -> None:
    before = Held(10, 0, 0, 0)
    after = Held(**{**vars(before), name: 1 << 30})
    assert after.growth(before, "shm") == [f"{name} {getattr(before, name)} before, {1 << 30} after"]
    assert before.growth(before, "shm") == []


def test_every_transport_is_tried_on_a_gpu_and_every_data_path_without_one() -> None:
    assert sorted(transports_of("cuda")) == sorted(TRANSPORTS)
    assert [TRANSPORTS[transport][1] for transport in transports_of("cuda")] == ["cpu", "cpu", "cpu", "cuda", "cuda"]
    assert {TRANSPORTS[transport][0] for transport in transports_of("cpu")} == {"shm", "mooncake"}
