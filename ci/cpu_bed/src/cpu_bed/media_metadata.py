"""Gives a colocated Qwen server the metadata of video and audio that sglang's encoder gives a language server.

sglang 0.5.23 computes them twice, and differently (multimodal/processors/qwen_vl.py, `_process_mm_data_uncached`):
- Qwen2.5-VL and Qwen3-Omni: the time between two frames. The colocated server takes the default of the Hugging Face
  processor (2/24 s or 2 s), because the clip's metadata are not handed to it (line 1042); the encoder takes the rate at
  which the frames were sampled (disaggregation/encoder/preprocessor.py, line 808).
- Qwen3-Omni: with an image and two audio parts, the colocated server knows the length of the first only (line 1066),
  and fails with an IndexError.
Both change nothing but the positions of tokens. With this, a test can compare the embeddings and all else.
"""

from contextvars import ContextVar
from typing import Any

_PROCESSOR = "sglang.srt.multimodal.processors.qwen_vl.QwenVLImageProcessor.process_and_combine_mm_data_async"
_POSITIONS = "sglang.srt.layers.rotary_embedding.MRotaryEmbedding.get_rope_index"
_SAMPLED_PER_SECOND = 2.0  # the encoder's default
_sound_lengths: ContextVar[Any] = ContextVar("sound_lengths", default=None)


def use_the_encoders_metadata() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(_PROCESSOR, _process, HookType.AROUND)
    HookRegistry.register(_POSITIONS, _positions, HookType.AROUND)


async def _process(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    import torch

    items, input_ids, values = await original(self, *args, **kwargs)
    grids = values.get("video_grid_thw")
    if grids is not None and self.model_type in ("qwen2_5_vl", "qwen3_omni_moe"):
        seconds = self._processor.video_processor.temporal_patch_size / _SAMPLED_PER_SECOND
        values["second_per_grid_ts"] = torch.full((len(grids),), seconds)
    masks = [item.feature_attention_mask for item in items if item.is_audio()]
    _sound_lengths.set(torch.cat([mask.sum(dim=1) for mask in masks]) if masks else None)
    return items, input_ids, values


def _positions(original: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("audio_seqlens") is not None:
        kwargs["audio_seqlens"] = _sound_lengths.get()
    return original(*args, **kwargs)
