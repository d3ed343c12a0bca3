"""A scheduler process: batches with embeddings of encoders and with media that this server processes by itself.

sglang 0.5.23 can only embed both in one batch with ``--enable-adaptive-dispatch-to-encoder``; otherwise the scheduler
ends (``_get_precomputed_embedding``: NotImplementedError). Here both come without that flag, too: media that a client
has preprocessed, and requests that came while no encoder was registered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.runtime_context import get_disagg


def embed_apart(original: Callable[..., Any], input_ids: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``prepare_mm_inputs``: let sglang embed the two kinds apart, if both are there."""
    if not is_mixed(forward_batch):
        return original(input_ids, forward_batch, *args, **kwargs)
    with get_disagg().override(enable_adaptive_dispatch_to_encoder=True):
        return original(input_ids, forward_batch, *args, **kwargs)


def is_mixed(forward_batch: Any) -> bool:
    if forward_batch.forward_mode.is_decode() or not forward_batch.mm_inputs:
        return False
    from_encoders = {
        all(item.precomputed_embeddings is not None for item in inputs.mm_items)
        for inputs in forward_batch.mm_inputs
        if inputs is not None and inputs.mm_items
    }
    return len(from_encoders) > 1
