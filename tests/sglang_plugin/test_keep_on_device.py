"""The embedding stays where the model made it, as the setting says, and where sglang needs it on the host it does not.

sglang's own ``MMEncoder._compute_direct_embedding`` runs, hooked as in a server; the model is a function.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.disaggregation.encoder import server
from sglang.srt.managers.schedule_batch import Modality

from sglang_mm_conn.sglang_plugin import encoder as plugin


class Rows:
    """Stands in for a tensor on a GPU: it knows whether it was asked for on the host."""

    shape = (4, 8)
    on_host = False

    def cpu(self) -> Rows:
        self.on_host = True
        return self


def compute(
    monkeypatch: pytest.MonkeyPatch, *, setting: str = "cuda", ours: bool = True, cache: bool = False,
    health_check: bool = False, modality: Modality = Modality.IMAGE, sound: bool = False,
) -> Rows:  # fmt: skip
    """What the hooked function makes of a model's rows."""
    monkeypatch.setenv("SGLANG_MM_CONN_EMBEDDING_DEVICE", setting)
    config = SimpleNamespace(enable_prefix_mm_cache=cache)
    monkeypatch.setattr(plugin, "get_mm", lambda: config)
    monkeypatch.setattr(server, "get_mm", lambda: SimpleNamespace(enable_prefix_mm_cache=False))
    rows = Rows()
    backend = "conn_multimodal" if ours else "mooncake"
    encoder: Any = SimpleNamespace(
        server_args=SimpleNamespace(disaggregation_transfer_backend=backend),
        model=SimpleNamespace(),
        _build_model_mm_items=lambda *args: [],
        _validate_embedding_token_count=lambda *args: None,
    )
    ctx: Any = SimpleNamespace(
        modality=modality, mm_feature=None, num_items=1, items_per_req=[1], is_health_check=health_check,
        get_feature_fn=lambda items: rows, aux_data={},
        preprocess_result=SimpleNamespace(mm_inputs={"video_audio_features": [1]} if sound else {}),
    )  # fmt: skip
    original = server.MMEncoder._compute_direct_embedding
    original = getattr(original, "__wrapped__", original)
    found = asyncio.run(plugin.keep_on_device(original, encoder, ctx, keep_on_gpu=False))
    assert found is rows
    return rows


def test_with_the_setting_the_embedding_stays_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not compute(monkeypatch).on_host
    assert not compute(monkeypatch, modality=Modality.VIDEO).on_host


@pytest.mark.parametrize(
    "otherwise",
    [
        {"setting": "cpu"},
        {"ours": False},
        {"cache": True},
        {"health_check": True},
        {"modality": Modality.VIDEO, "sound": True},
    ],
)
def test_otherwise_sglang_moves_it_to_the_host(otherwise: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert compute(monkeypatch, **otherwise).on_host


def test_a_process_that_computes_on_a_cpu_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_mm_conn.sglang_plugin import device

    monkeypatch.setattr(device, "get_device", lambda: SimpleNamespace(device="cpu"))
    assert device.compute_device() == torch.device("cpu")
    monkeypatch.setattr(device, "get_device", lambda: SimpleNamespace(device="cuda"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert device.compute_device() == torch.device("cuda", 3)
