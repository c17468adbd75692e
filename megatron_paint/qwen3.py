"""The sizes of a Qwen3 checkpoint, read from its config.json; refuses what the trainer does not compute."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_paint.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Qwen3Shape:
    """Sizes of a dense Qwen3 model, in its own words; `source` is the config.json they came from."""

    source: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_groups: int  # key-value heads
    head_dim: int
    ffn_size: int
    tied: bool  # output layer shares the embedding's weight
    rope_theta: float
    norm_eps: float
    max_positions: int
    dtype: str  # of the stored weights: "bfloat16", "float32", ...

    @property
    def num_parameters(self) -> int:
        """Number of weights, the tied embedding counted once."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_groups) + 2 * self.head_dim
        layer = attention + 3 * self.hidden_size * self.ffn_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return self.num_layers * layer + embeddings + self.hidden_size


def read_shape(folder: str | Path) -> Qwen3Shape:
    """Reads and checks `folder`/config.json; UserError where it is absent, foreign or asks for more than we compute.

    Reads the keys of `transformers` 4 (rope_theta, torch_dtype) and 5 (rope_parameters, dtype).
    """
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise UserError(f"model.hf_path: {folder} is not a folder; give the folder of a Hugging Face Qwen3 checkpoint")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"model.hf_path: {folder} has no config.json; is it a Hugging Face checkpoint folder?"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"model.hf_path: {path} is not valid JSON ({error}); copy the checkpoint again") from None
    if not isinstance(raw, dict) or raw.get("model_type") != "qwen3":
        found = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
        raise UserError(f"model.hf_path: {path} has model_type {found!r}; only dense Qwen3 ('qwen3') can be trained")
    _refuse_unknown(raw, path)
    rope = raw.get("rope_parameters") or {}
    try:
        return Qwen3Shape(
            source=str(path),
            vocab_size=int(raw["vocab_size"]),
            hidden_size=int(raw["hidden_size"]),
            num_layers=int(raw["num_hidden_layers"]),
            num_heads=int(raw["num_attention_heads"]),
            num_groups=int(raw["num_key_value_heads"]),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]),
            ffn_size=int(raw["intermediate_size"]),
            tied=bool(raw.get("tie_word_embeddings", False)),
            rope_theta=float(rope.get("rope_theta") or raw["rope_theta"]),
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            max_positions=int(raw["max_position_embeddings"]),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        )
    except KeyError as error:
        raise UserError(f"model.hf_path: {path} lacks {error}; it is not a complete Qwen3 config") from None


def _refuse_unknown(raw: dict[str, Any], path: Path) -> None:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    refused = {
        "use_sliding_window": (bool(raw.get("use_sliding_window")), "sliding-window attention"),
        "attention_bias": (bool(raw.get("attention_bias")), "biases in the attention projections"),
        "attention_dropout": (bool(raw.get("attention_dropout")), "attention dropout"),
        "quantization_config": (raw.get("quantization_config") is not None, "quantised weights"),
        "hidden_act": (raw.get("hidden_act", "silu") != "silu", "an activation other than silu"),
        "rope type": (rope.get("rope_type", rope.get("type", "default")) != "default", "RoPE scaling"),
    }
    for key, (present, what) in refused.items():
        if present:
            raise UserError(f"model.hf_path: {path} asks for {what} ({key}), which the trainer does not compute")
