"""A batch with media from encoders and media of this server is embedded in two steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_mm_conn.sglang_plugin import mixed_batches
from sglang_mm_conn.sglang_plugin.mixed_batches import embed_apart, is_mixed

OURS, THEIRS = (SimpleNamespace(mm_items=[SimpleNamespace(precomputed_embeddings=one)]) for one in ("rows", None))


def batch(*inputs: Any, decode: bool = False) -> SimpleNamespace:
    return SimpleNamespace(mm_inputs=list(inputs), forward_mode=SimpleNamespace(is_decode=lambda: decode))


def test_a_batch_is_mixed_if_it_has_both_kinds() -> None:
    assert is_mixed(batch(OURS, None, THEIRS))
    assert not is_mixed(batch(OURS, OURS)) and not is_mixed(batch(THEIRS, None)) and not is_mixed(batch())
    assert not is_mixed(batch(OURS, THEIRS, decode=True)), "no media are embedded then"


@pytest.mark.parametrize(("inputs", "apart"), [([OURS, THEIRS], [True]), ([OURS], []), ([None], [])])
def test_sglang_embeds_the_two_kinds_apart(
    inputs: list[Any], apart: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    overridden: list[bool] = []

    class Flags:
        def override(self, *, enable_adaptive_dispatch_to_encoder: bool) -> Flags:
            overridden.append(enable_adaptive_dispatch_to_encoder)
            return self

        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(mixed_batches, "get_disagg", Flags)
    assert embed_apart(lambda *args, **more: (args, more), "ids", batch(*inputs), "model", a=1)[1] == {"a": 1}
    assert overridden == apart
