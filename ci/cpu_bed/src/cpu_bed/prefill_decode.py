"""What separate prefill and decode servers take for granted about an accelerator: pinned memory and CUDA events.

Where an accelerator is present nothing is changed. Made only on request, because TorchScript cannot compile a call of a
`torch.empty` that is written in Python.
"""

from typing import Any


def do_without_accelerator() -> None:
    import torch

    if torch.accelerator.is_available():
        return
    original_empty = torch.empty

    def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
        return original_empty(*args, **kwargs)

    torch.empty = empty

    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVSender.__init__", _use_plain_indices, HookType.AFTER
    )


def _use_plain_indices(result: None, sender: Any, *args: Any, **kwargs: Any) -> None:
    sender.supports_host_tensor_indices = False  # the other way records a CUDA event
