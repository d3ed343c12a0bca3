"""Owns the tiny random-weight multimodal models: generated in seconds, without a download."""

import importlib.metadata
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sglang_mm_conn.demo.tiny_tokenizer import BYTES, TOKEN_ID, VOCABULARY, byte_alphabet, dump, write_tokenizer

VERSION = 2  # raise it when the generated files change, so that those of older runs are replaced
STAMP = "tiny-model.json"

HIDDEN = 128


@dataclass(frozen=True)
class Kind:
    """What one model family needs beyond the parts common to all."""

    classes: str  # prefix of its classes in transformers
    patch: int
    vision: dict[str, Any]
    text: dict[str, Any]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_processor: str
    video_processor: str
    audio: dict[str, Any] | None = None  # its audio tower; with one, the model is a "thinker"
    video_pixels: tuple[int, int] | None = None  # fewest and most; unset: as for an image
    encoder_flags: tuple[str, ...] = ()  # what sglang needs to start an encoder of it


_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MROPE = {"rope_scaling": {"rope_type": "default", "type": "mrope", "mrope_section": [4, 6, 6]}}
_VISION = {"num_heads": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}

KINDS = {
    "qwen2_vl": Kind(
        classes="Qwen2VL",
        patch=14,
        # in_chans beside in_channels: sglang reads the one, transformers the other.
        vision={**_VISION, "depth": 2, "embed_dim": 64, "hidden_size": HIDDEN, "mlp_ratio": 2, "in_chans": 3},
        text=_MROPE,
        mean=_CLIP_MEAN,
        std=_CLIP_STD,
        image_processor="Qwen2VLImageProcessor",
        video_processor="Qwen2VLVideoProcessor",
    ),
    "qwen2_5_vl": Kind(
        classes="Qwen2_5_VL",
        patch=14,
        vision={
            **_VISION,
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "out_hidden_size": HIDDEN,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        text=_MROPE,
        mean=_CLIP_MEAN,
        std=_CLIP_STD,
        image_processor="Qwen2VLImageProcessor",
        video_processor="Qwen2VLVideoProcessor",
    ),
    "qwen3_vl": Kind(
        classes="Qwen3VL",
        patch=16,
        vision={
            **_VISION,
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0, 1],
        },
        text={
            "head_dim": 32,
            "rope_theta": 10000.0,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [6, 5, 5]},
        },
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        image_processor="Qwen2VLImageProcessorFast",
        video_processor="Qwen3VLVideoProcessor",
    ),
    "qwen3_omni_moe": Kind(
        classes="Qwen3OmniMoe",
        patch=16,
        vision={
            **_VISION,
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0, 1],
        },
        text={
            "head_dim": 32,
            "rope_theta": 10000.0,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [6, 5, 5]},
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
        },
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        image_processor="Qwen2VLImageProcessorFast",
        video_processor="Qwen2VLVideoProcessor",
        audio={
            "d_model": 64,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "num_mel_bins": 32,
            "downsample_hidden_size": 16,
            "output_dim": HIDDEN,
        },
        # The processor of the whole model asks for these whatever the video processor's own are.
        video_pixels=(128 * 32 * 32, 768 * 32 * 32),
        # Without it an encoder builds the language model too, and fails: sglang 0.5.23 looks for this in the thinker's
        # config (models/qwen3_vl.py, line 1347), but sets it outside of it (configs/model_config.py, line 908).
        encoder_flags=("--json-model-override-args", '{"thinker_config": {"encoder_only": true}}'),
    ),
}
SEEING = tuple(name for name, kind in KINDS.items() if kind.audio is None)


@dataclass(frozen=True)
class Shape:
    """The language model's size; rows of embeddings are ``hidden`` values wide. A multiple of 64."""

    hidden: int = HIDDEN
    layers: int = 2
    thin: bool = False  # the least computation for a row

    def text(self) -> dict[str, Any]:
        heads = 2 if self.thin else self.hidden // 32  # the rotary sections of the kinds are for heads of 32
        text = {"hidden_size": self.hidden, "num_attention_heads": heads, "num_hidden_layers": self.layers}
        return {**text, "intermediate_size": 64} if self.thin else text

    def vision(self, vision: dict[str, Any]) -> dict[str, Any]:
        name = "out_hidden_size" if "out_hidden_size" in vision else "hidden_size"
        thin = {"num_heads": 1, "hidden_size": 32, "intermediate_size": 64, "depth": 2} if self.thin else {}
        return {**vision, **thin, name: self.hidden}


TINY = Shape()


def write(kind: str, directory: Path, seed: int = 0, shape: Shape = TINY) -> Path:
    """Writes the model into the directory, unless the same model is there already. Returns the directory."""
    if kind not in KINDS:
        raise ValueError(f"model kind must be one of {', '.join(KINDS)}, not {kind!r}")
    stamp = {
        "kind": kind,
        "seed": seed,
        "version": VERSION,
        **({} if shape == TINY else asdict(shape)),
        "transformers": importlib.metadata.version("transformers"),
    }
    if _stamp_of(directory) == stamp:
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Written to another directory and renamed, so that an interrupted run leaves nothing that looks finished.
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        write_tokenizer(draft)
        _write_weights(KINDS[kind], draft, seed, shape)
        _write_processors(KINDS[kind], draft)
        dump(draft / STAMP, stamp)
        draft.chmod(0o755)
        if directory.exists():
            if _stamp_of(directory) is None and any(directory.iterdir()):
                raise ValueError(f"{directory} holds something else than a tiny model, and is left alone")
            shutil.rmtree(directory)
        os.replace(draft, directory)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return directory


def _stamp_of(directory: Path) -> Any:
    try:
        return json.loads((directory / STAMP).read_text())
    except (OSError, ValueError):
        return None


def _write_weights(kind: Kind, directory: Path, seed: int, shape: Shape) -> None:
    import torch
    import transformers

    model_class = getattr(transformers, f"{kind.classes}ForConditionalGeneration")
    config = _config(kind, shape)
    model = model_class(config).to(torch.float32)
    _randomise(model, seed)
    model.generation_config.eos_token_id = TOKEN_ID["<|im_end|>"]
    transformers.utils.logging.disable_progress_bar()  # it writes into the middle of other output
    model.save_pretrained(directory, safe_serialization=True)
    saved = json.loads((directory / "config.json").read_text())
    dump(directory / "config.json", {**saved, "architectures": [model_class.__name__]})


def _config(kind: Kind, shape: Shape) -> Any:
    import transformers

    config_class = getattr(transformers, f"{kind.classes}Config")
    parts: dict[str, Any] = {
        "text_config": {**_text_config(), **shape.text(), **kind.text},
        "vision_config": {**shape.vision(kind.vision), "patch_size": kind.patch},
        "image_token_id": TOKEN_ID["<|image_pad|>"],
        "video_token_id": TOKEN_ID["<|video_pad|>"],
        "vision_start_token_id": TOKEN_ID["<|vision_start|>"],
        "vision_end_token_id": TOKEN_ID["<|vision_end|>"],
        "tie_word_embeddings": False,
    }
    if kind.audio is None:
        return config_class(**parts)
    audio = {"audio_token_id": "<|audio_pad|>", "audio_start_token_id": "<|audio_start|>"}
    thinker = {**parts, "audio_config": kind.audio, **{key: TOKEN_ID[token] for key, token in audio.items()}}
    return config_class(thinker_config=thinker, enable_audio_output=False)


def _text_config() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "intermediate_size": 256,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": TOKEN_ID["<|endoftext|>"],
        "eos_token_id": TOKEN_ID["<|im_end|>"],
        "pad_token_id": TOKEN_ID["<|endoftext|>"],
    }


def _randomise(model: Any, seed: int) -> None:
    """Weights spread wide enough for the greedy tokens to differ from step to step and from image to image."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                fan_in = parameter.shape[-1] if "experts" in name else parameter[0].numel()
                scale = 1.0 if "embed_tokens" in name else 1.4 * fan_in**-0.5
                parameter.copy_(scale * noise)
            else:
                parameter.copy_((0.0 if name.endswith("bias") else 1.0) + 0.1 * noise)
        # Only printable ASCII is ever generated, one token a character: equal texts are equal tokens.
        head = getattr(model, "thinker", model).get_output_embeddings().weight
        alphabet = byte_alphabet()
        for index in range(VOCABULARY):
            if index >= BYTES or not "!" <= alphabet[index] <= "~":
                head[index].zero_()


def _write_processors(kind: Kind, directory: Path) -> None:
    merge = kind.vision["spatial_merge_size"]
    pixels_per_token = (kind.patch * merge) ** 2
    fewest, most = 4 * pixels_per_token, 256 * pixels_per_token
    common = {
        "min_pixels": fewest,
        "max_pixels": most,
        "size": {"shortest_edge": fewest, "longest_edge": most},
        "patch_size": kind.patch,
        "temporal_patch_size": kind.vision["temporal_patch_size"],
        "merge_size": merge,
        "image_mean": kind.mean,
        "image_std": kind.std,
        "processor_class": f"{kind.classes}Processor",
    }
    audio = {} if kind.audio is None else _audio_processor(kind.audio["num_mel_bins"])
    dump(directory / "preprocessor_config.json", {**common, **audio, "image_processor_type": kind.image_processor})
    fewest, most = kind.video_pixels or (fewest, most)
    sizes = {"min_pixels": fewest, "max_pixels": most, "size": {"shortest_edge": fewest, "longest_edge": most}}
    dump(
        directory / "video_preprocessor_config.json",
        {**common, **sizes, "video_processor_type": kind.video_processor},
    )


def _audio_processor(mel_bins: int) -> dict[str, Any]:
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": mel_bins,
        "sampling_rate": 16000,
        "hop_length": 160,
        "n_fft": 400,
        "chunk_length": 30,
        "padding_value": 0.0,
    }
