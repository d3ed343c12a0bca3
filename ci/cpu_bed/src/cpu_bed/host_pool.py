"""sglang's Mooncake embedding transport puts what it receives into GPU memory: here it means host memory.

Where an accelerator is present nothing is changed.
"""

from typing import Any


def receive_into_host_memory() -> None:
    import torch

    if torch.accelerator.is_available():
        return
    original_empty = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return original_empty(*args, **kwargs)

    torch.empty = empty
