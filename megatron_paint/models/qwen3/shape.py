"""Reads the sizes of a Qwen3 checkpoint from its config.json. It refuses a config that the package cannot compute."""

import json
import math
from pathlib import Path
from typing import Any

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError
from megatron_paint.models.qwen3.rope import read_rope
from megatron_paint.models.shape import ModelShape


def read_shape(folder: str | Path) -> ModelShape:
    """Reads and checks `folder`/config.json.

    It knows the keys of `transformers` 4 (rope_theta, rope_scaling, torch_dtype, num_experts) and 5 (rope_parameters,
    dtype, num_local_experts). Raises UserError if the file is missing, is not a Qwen3 config or needs a feature that
    the package does not compute.
    """
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder; give the folder of a Hugging Face Qwen3 checkpoint")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json; is it a Hugging Face checkpoint folder?") from None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy the checkpoint again") from None
    return shape_of(raw, path)


def shape_of(raw: Any, path: Path) -> ModelShape:
    """Returns the sizes in the content of a config. path: the file of the config, for errors. Raises as read_shape."""
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a JSON object; copy the checkpoint again")
    if raw.get("model_type") not in ("qwen3", "qwen3_moe"):
        found = raw.get("model_type")
        raise UserError(f"{path} has model_type {found!r}; only 'qwen3' and 'qwen3_moe' are supported")
    _refuse_unknown(raw, path)
    try:
        shape = _shape(raw, path)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{path} has no key {error}; it is not a complete Qwen3 config") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} is not a Qwen3 config ({error}); copy the checkpoint again") from None
    _check_sizes(shape, path)
    return shape


def _shape(raw: dict[str, Any], path: Path) -> ModelShape:
    rope = read_rope(raw, path, positions=_integer(raw, "max_position_embeddings"))
    experts = {}
    if raw["model_type"] == "qwen3_moe":
        experts = {
            "num_experts": _integer(raw, "num_local_experts" if "num_local_experts" in raw else "num_experts"),
            "experts_per_token": _integer(raw, "num_experts_per_tok"),
            "expert_ffn_size": _integer(raw, "moe_intermediate_size"),
            "normalise_experts": _boolean(raw, "norm_topk_prob"),
        }
    return ModelShape(
        source=str(path),
        vocab_size=_integer(raw, "vocab_size"),
        hidden_size=_integer(raw, "hidden_size"),
        num_layers=_integer(raw, "num_hidden_layers"),
        num_heads=_integer(raw, "num_attention_heads"),
        num_groups=_integer(raw, "num_key_value_heads"),
        head_dim=_integer(raw, "head_dim") if raw.get("head_dim") is not None else _usual_head_dim(raw),
        ffn_size=_integer(raw, "intermediate_size"),
        tied=_boolean(raw, "tie_word_embeddings"),
        qk_norm=True,
        qkv_bias=False,
        rope_theta=rope.theta,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        max_positions=rope.max_positions,
        yarn=rope.yarn,
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
        **experts,
    )


def _usual_head_dim(raw: dict[str, Any]) -> int:
    """Returns the default of transformers for a config without head_dim."""
    return 128 if raw["model_type"] == "qwen3" else raw["hidden_size"] // raw["num_attention_heads"]


def _boolean(raw: dict[str, Any], key: str) -> bool:
    value = raw.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}, not true or false")
    return value


def _integer(raw: dict[str, Any], key: str) -> int:
    value = raw[key]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{key} is {value!r}, not a whole number")
    return value


def _check_sizes(shape: ModelShape, path: Path) -> None:
    sizes = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_groups,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn_size,
        "max_position_embeddings": shape.max_positions,
    }
    if shape.num_experts:
        sizes |= {"num_experts_per_tok": shape.experts_per_token, "moe_intermediate_size": shape.expert_ffn_size}
    for key, size in sizes.items():
        if not 0 < size < 2**31:
            raise UserError(f"{path} has {key}={size}; it must be a whole number from 1")
    if not 0 < shape.norm_eps < math.inf:
        raise UserError(f"{path} has rms_norm_eps={shape.norm_eps}; it must be a positive number")
    if shape.num_heads % shape.num_groups:
        raise UserError(
            f"{path} has {count_text(shape.num_heads, 'attention head')}; this must be a multiple of its "
            f"{shape.num_groups} key-value heads"
        )
    if not 0 <= shape.experts_per_token <= shape.num_experts < 2**31:
        raise UserError(
            f"{path} uses {shape.experts_per_token} of {count_text(shape.num_experts, 'expert')} for each token, which "
            "is not possible; copy it again"
        )
    if shape.dtype not in ("bfloat16", "float16", "float32"):
        raise UserError(f"{path} has dtype {shape.dtype!r}; the supported types are bfloat16, float16 and float32")


def _refuse_unknown(raw: dict[str, Any], path: Path) -> None:
    refused = {
        "use_sliding_window": (bool(raw.get("use_sliding_window")), "sliding-window attention"),
        "attention_bias": (bool(raw.get("attention_bias")), "biases in the attention projections"),
        "attention_dropout": (bool(raw.get("attention_dropout")), "attention dropout"),
        "quantization_config": (raw.get("quantization_config") is not None, "quantised weights"),
        "hidden_act": (raw.get("hidden_act", "silu") != "silu", "an activation other than silu"),
        "mlp_only_layers": (bool(raw.get("mlp_only_layers")), "dense layers among sparse ones"),
        "decoder_sparse_step": (raw.get("decoder_sparse_step", 1) != 1, "dense layers among sparse ones"),
    }
    for key, (present, what) in refused.items():
        if present:
            raise UserError(f"{path} needs {what} ({key}), which is not supported")
