"""Owns a LoRA adapter of a tiny model: random weights of rank 4 for the attention of each layer."""

from __future__ import annotations

import json
from pathlib import Path

RANK = 4


def write_adapter(model: Path, directory: Path) -> Path:
    """Writes the adapter for ``model``. Returns ``directory``."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    text = config.get("text_config") or config.get("thinker_config", {}).get("text_config") or config
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    head = text.get("head_dim") or hidden // heads
    rows = {"q_proj": heads * head, "k_proj": text["num_key_value_heads"] * head}
    rows["v_proj"] = rows["k_proj"]
    draw = torch.Generator().manual_seed(1)
    weights = {}
    for layer in range(text["num_hidden_layers"]):
        for name, out in rows.items():
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{module}.lora_A.weight"] = torch.randn(RANK, hidden, generator=draw)
            weights[f"{module}.lora_B.weight"] = torch.randn(out, RANK, generator=draw)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(rows), "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory
