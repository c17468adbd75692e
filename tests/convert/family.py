"""Tiny members of the Qwen3 family as Hugging Face folders."""

from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

COMMON = {
    "vocab_size": 64,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
MEMBERS = ("dense-tied", "dense-untied", "moe")


def make_member(folder: Path, member: str, *, dtype: torch.dtype = torch.bfloat16, shard: str = "50GB") -> Path:
    """Writes a random model of the member's architecture; norms are not all ones."""
    torch.manual_seed(len(member))
    if member == "moe":
        config = Qwen3MoeConfig(
            **COMMON,
            intermediate_size=96,
            moe_intermediate_size=24,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            tie_word_embeddings=False,
        )
        model = Qwen3MoeForCausalLM(config)
    else:
        config = Qwen3Config(**COMMON, intermediate_size=96, tie_word_embeddings=member == "dense-tied")
        model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


TOKENS = (3, 17, 5, 60, 33, 2, 9, 41, 8, 22)
LAYOUTS = {
    "tp1": {},
    "tp2-pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "tp4": {"tensor_model_parallel_size": 4},
    "ep2": {"expert_model_parallel_size": 2},
    "tp2-ep2": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    "pp2-ep2": {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
}
PROCESSES = {"tp1": 1, "tp2": 2, "pp2": 2, "tp2-pp2": 4, "tp4": 4, "ep2": 2, "tp2-ep2": 4, "pp2-ep2": 4}
