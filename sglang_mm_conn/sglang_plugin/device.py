"""The device of an sglang process."""

from __future__ import annotations

import torch
from sglang.srt.runtime_context import get_device


def compute_device() -> torch.device:
    """The GPU that sglang has chosen for this process; the CPU if its device is not CUDA."""
    if get_device().device != "cuda":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
