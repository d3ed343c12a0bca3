"""sglang's LoRA keeps tensors in pinned memory, which only an accelerator has: here it is ordinary memory.

Where an accelerator is present nothing is changed.
"""

from collections.abc import Callable
from typing import Any

_MAKERS = ("tensor", "zeros", "empty", "ones", "arange", "full")


def pin_nothing() -> None:
    import torch

    if torch.accelerator.is_available():
        return
    for name in _MAKERS:
        setattr(torch, name, _without_pinning(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *_: self


def _without_pinning(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        return make(*args, **kwargs)

    return made
