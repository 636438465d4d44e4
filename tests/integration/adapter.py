"""A random LoRA adapter for the tiny model, as PEFT writes one."""

from __future__ import annotations

import json
from pathlib import Path

_RANK = 8
_TARGETS = ("q_proj", "v_proj")


def make_adapter(directory: Path, model_path: Path, *, seed: int = 1) -> Path:
    """Writes an adapter strong enough to change most greedy answers.

    Returns:
        The directory, a PEFT adapter directory.
    """
    import torch
    from safetensors.torch import save_file

    model = json.loads((model_path / "config.json").read_text())
    width = model["hidden_size"]
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(model["num_hidden_layers"]):
        for target in _TARGETS:
            name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            weights[f"{name}.lora_A.weight"] = torch.randn(_RANK, width, generator=generator) / width**0.5
            weights[f"{name}.lora_B.weight"] = torch.randn(width, _RANK, generator=generator) * 0.2
    directory.mkdir(parents=True)
    save_file(weights, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model_path),
        "r": _RANK,
        "lora_alpha": _RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(_TARGETS),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory
