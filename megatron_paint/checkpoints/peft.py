"""The folder of a LoRA adapter in PEFT's format: tensor names, file names and config."""

import json
from pathlib import Path

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapter_name(weight: str, side: str) -> str:
    """Returns PEFT's name of the adapter `side` ("A" or "B") of a Hugging Face weight."""
    return f"base_model.model.{weight.removesuffix('.weight')}.lora_{side}.weight"


def write_config(folder: Path, *, rank: int, alpha: float, base: str) -> None:
    """Writes the config of adapters on all seven projections. base: path of the model that they belong to."""
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": list(PROJECTIONS),
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
